"""What this process may do: compute with several threads, and map memory.

Forks (os.fork, and multiprocessing where its start method is "fork"): a forked child has the memory of its parent but
none of the parent's threads. OpenMP does not notice this, and its next parallel loop in the child would wait for ever
for threads that do not exist. So a child is refused before its first parallel loop. A parent that computed with torch
and without qmix (an embedding model, say) leaves no trace here: then a child of the child tries the loop first.

Address space (ulimit -v) counts all that is mapped, whether or not it is in RAM: libraries, stacks of threads, pools
not yet touched.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from qmix.errors import QmixError

CURE = 'load the model in the process that uses it, started with multiprocessing.get_context("spawn")'


FORKED = 0x40  # PF_FORKNOEXEC of Linux: the process was forked and runs no program of its own
TRIAL = 5.0  # seconds after which a loop that takes microseconds counts as one that never ends


def check_threads_work(threads: int, loop: Callable[[], object]) -> None:
    """QmixError where `threads` compute threads would hang: this process was forked from one that computed with more
    than one. Called before each computation that may be a process's first. loop: one small parallel loop of as many
    threads, which is run in a forked process only, and in a child of it."""
    if threads < 2:
        return
    first = _first_to_compute.cache_info().currsize == 0
    if (first and _is_forked() and not _ends(loop)) or _first_to_compute() != os.getpid():
        raise QmixError(f"{threads} compute threads: this process was forked from one that had already computed with "
                        "several, and a forked process does not inherit them", f"{CURE}, or ask for 1 thread")


def _is_forked() -> bool:
    """Whether this process was forked and has started no thread but Python's since, as far as the system tells: one
    that has more computes with them already."""
    try:
        flags = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6]
        tasks = len(os.listdir("/proc/self/task"))
    except (OSError, IndexError):
        return False
    return bool(int(flags) & FORKED) and tasks <= threading.active_count()


def _ends(loop: Callable[[], object]) -> bool:
    """Whether `loop` comes to its end in a forked copy of this process."""
    trial = os.fork()
    if trial == 0:
        try:
            loop()
        finally:
            os._exit(0)
    deadline = time.monotonic() + TRIAL
    while os.waitpid(trial, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(trial, signal.SIGKILL)
            os.waitpid(trial, 0)
            return False
        time.sleep(0.001)
    return True


@cache
def _first_to_compute() -> int:
    """The process that first computed with several threads: the cache goes with a fork into the child."""
    return os.getpid()


def address_space_limit() -> int | None:
    """Bytes that this process may map (RLIMIT_AS); None where there is no limit."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft

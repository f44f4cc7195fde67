"""What this process may do: compute with several threads, and map memory.

Forks (os.fork, and multiprocessing where its start method is "fork"): a forked child has the memory of its parent but
none of the parent's threads. OpenMP does not notice this, and its next parallel loop in the child would wait for ever
for threads that do not exist. So a child is refused before its first parallel loop. A parent that computed with torch
and without qmix (an embedding model, say) leaves no trace here: then a child of the child tries the loop first, unless
the child has OpenMP threads of its own: these are what a child of the child would lack.

Address space (ulimit -v) counts all that is mapped, whether or not it is in RAM: libraries, stacks of threads, pools
not yet touched.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from qmix.errors import QmixError

CURE = 'load the model in the process that uses it, started with multiprocessing.get_context("spawn")'


FORKED = 0x40  # PF_FORKNOEXEC of Linux: the process was forked and runs no program of its own
OPENMP = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*$")  # libraries as /proc/self/maps names them
SETTLED = 0.5  # seconds after which OpenMP's threads have stopped to spin and sleep
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
    """Whether this process was forked and has no OpenMP threads of its own, as far as the system tells: one that has
    computes with them already."""
    try:
        flags = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6]
        return bool(int(flags) & FORKED) and not _has_openmp_threads()
    except (OSError, IndexError, ValueError):
        return False


def _has_openmp_threads() -> bool:
    """Whether a thread of this process waits inside OpenMP's library for work. Other native threads (of tokenizers, of
    a database driver) wait inside libc. A thread that stays busy counts as one of OpenMP's."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    if len(tasks) < threading.active_count():  # Python's alone
        return False
    code = _openmp_code()
    deadline = time.monotonic() + SETTLED
    while True:
        calls = [_system_call(task) for task in tasks]
        if any(first <= counter < last for call in calls if len(call) > 1 for counter in [int(call[-1], 16)]
               for first, last in code):
            return True
        busy = ["running"] in calls
        if not busy or time.monotonic() > deadline:
            return busy
        time.sleep(0.01)


def _openmp_code() -> list[tuple[int, int]]:
    """Where OpenMP's libraries are mapped: [first, last) addresses."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if OPENMP.search(line):
            first, _, last = line.split()[0].partition("-")
            found.append((int(first, 16), int(last, 16)))
    return found


def _system_call(task: Path) -> list[str]:
    """The words of /proc/.../syscall, the last of them the program counter; ["running"] for a thread outside of system
    calls, [] for one that has ended."""
    try:
        return (task / "syscall").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    except OSError:  # a kernel that does not tell
        return ["running"]


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

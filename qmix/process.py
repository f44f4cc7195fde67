"""What this process may do: compute with several threads, and map memory.

Forks (os.fork, and multiprocessing where its start method is "fork"): a forked child has the memory of its parent but
none of the parent's threads. OpenMP does not notice this, and its next parallel loop in the child would wait for ever
for threads that do not exist. So a child is refused before its first parallel loop.

Address space (ulimit -v) counts all that is mapped, whether or not it is in RAM: libraries, stacks of threads, pools
not yet touched.
"""

from __future__ import annotations

import os
from functools import cache

from qmix.errors import QmixError

CURE = 'load the model in the process that uses it, started with multiprocessing.get_context("spawn")'


def check_threads_work(threads: int) -> None:
    """QmixError where `threads` compute threads would hang: this process was forked from one that computed with more
    than one. Called before each computation that may be a process's first."""
    if threads > 1 and _first_to_compute() != os.getpid():
        raise QmixError(f"{threads} compute threads: this process was forked from one that had already computed with "
                        "several, and a forked process does not inherit them", f"{CURE}, or ask for 1 thread")


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

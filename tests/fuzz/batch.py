"""A batch of tries in a forked child under the system's limits: 3 GiB of address space beyond what the process has, and
CPU seconds a try. A child that is killed, hangs or crashes is reported with the seed that did it."""

from __future__ import annotations

import mmap
import os
import random
import resource
import signal
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from qmix.errors import QmixError

MEMORY = 3 * 2**30
CPU = 20.0  # seconds of a try
CODES = {2, 3, 4}
SHOWN = 6000  # characters of a message: a path, a key, and what was there


def run(name: str, count: int, once: Callable[[random.Random], object], seed: int = 0,
        seconds: float = 0) -> Counter[str]:
    """once(dice) for seeds from `seed` on: `count` of them, or as many as `seconds` allow. What it raises must be a
    QmixError with a documented exit code. How often each outcome came."""
    shared = mmap.mmap(-1, 4096)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        code = 1
        try:
            with open(write, "w", errors="backslashreplace") as out:
                code = _child(name, count, once, seed, seconds, shared, out)
        finally:
            os._exit(code)
    os.close(write)
    with open(read, errors="replace") as lines:
        told = lines.read()
    status = os.waitpid(pid, 0)[1]
    at = struct.unpack("<Q", shared[:8])[0]
    assert status == 0, f"{name}: seed {at}: status {os.waitstatus_to_exitcode(status)}\n{told}"
    return Counter({key: int(number) for key, number in (line.split() for line in told.splitlines())})


def _child(name: str, count: int, once: Callable[[random.Random], object], seed: int, seconds: float,
           shared: mmap.mmap, out: IO[str]) -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what native libraries say
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    found: Counter[str] = Counter()
    for number in _seeds(count, seed, seconds):
        shared[:8] = struct.pack("<Q", number)
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU)
        try:
            once(random.Random(f"{name} {number}"))
            found["read"] += 1
        except QmixError as error:
            found[f"exit-{error.exit_code}"] += 1
            if error.exit_code not in CODES or "\n" in error.message or len(error.message) > SHOWN:
                print(f"{type(error).__name__} {error.exit_code}: {error.message[:2000]!r}", file=out)
                return 1
        except BaseException:
            print(traceback.format_exc()[-6000:], file=out)
            return 1
    for key, value in found.items():
        print(key, value, file=out)
    return 0


def _seeds(count: int, seed: int, seconds: float) -> Iterator[int]:
    if not seconds:
        yield from range(seed, seed + count)
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield seed
        seed += 1

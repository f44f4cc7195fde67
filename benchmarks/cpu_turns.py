"""What cpu_attention.py and cpu_kernels.py share: the flags, and libraries measured in alternation with a bare read of
memory.

A turn is one piece of work by each library, then one bare read of as many bytes, so that each ratio is taken between
neighbours in time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peers import numbers
from peers_report import cell

from qmix import settings
from qmix.hardware.cores import last_level_cache
from qmix.kernels import native

Clock = Callable[[], float]


def make_parser(doc: str | None, memory: str) -> argparse.ArgumentParser:
    """The flags that both have. memory: what --mib counts."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default="", help="of the native kernels (default: the best here)")
    parser.add_argument("-t", "--threads", type=numbers, default=[torch.get_num_threads()])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--mib", type=int, help=f"of {memory} (default: four times the last cache, at least 160)")
    parser.add_argument("--against", type=Path, metavar="OLD.so")
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's seconds of one thread, where "
                        "other programs run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every turn")
    return parser


def check_names(parser: argparse.ArgumentParser, flag: str, text: str, known: Sequence[str]) -> list[str]:
    """The names in `text`, which commas separate; all must be known."""
    found = text.split(",")
    if unknown := [name for name in found if name not in known]:
        parser.error(f"{flag}: got {unknown[0]!r}, want {', '.join(known)}")
    return found


def level_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The instruction level that is asked for, else the best one here."""
    if not native.levels():
        parser.error(f"there are no native kernels here: {native.trouble()}")
    level = args.level or settings.native_level() or next(iter(native.levels()))
    if level not in native.levels():
        parser.error(f"--level {level}: this processor has " + ", ".join(native.levels()))
    return level


def clock_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Clock:
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time: wants -t 1")
    return time.thread_time if args.cpu_time else time.perf_counter


def bytes_of(args: argparse.Namespace) -> int:
    """Bytes to measure over, more than the last cache holds."""
    return 2**20 * args.mib if args.mib else max(160 * 2**20, 4 * last_level_cache())


def seconds(work: Callable[[], object], clock: Clock) -> float:
    start = clock()
    work()
    return clock() - start


def bare_read(tensors: Sequence[torch.Tensor], threads: int) -> Callable[[], object]:
    """Reads all of `tensors` by as many threads. By threads of Python, which sleep when they are done: torch's wait for
    more by spinning, for 0.2 s and on the cores that whoever comes next needs, which made a library look 1.2 to 1.5
    times as slow as the same one a little later (two cores)."""
    torch.set_num_threads(1)
    if threads == 1:
        return lambda: [tensor.sum() for tensor in tensors]
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    return lambda: list(pool.map(torch.Tensor.sum, tensors))


def take_turns(works: Mapping[str, Callable[[], object]], read: Callable[[], object], turns: int,
               clock: Clock) -> tuple[dict[str, list[float]], list[float]]:
    """({library: seconds of each turn}, seconds of each read), after one turn that does not count. Who comes first in a
    turn comes last in the next."""
    took: dict[str, list[float]] = {name: [] for name in works}
    reads: list[float] = []
    for turn in range(turns + 1):
        for name in list(works) if turn % 2 else reversed(list(works)):
            took[name].append(seconds(works[name], clock))
        reads.append(seconds(read, clock))
    return {name: each[1:] for name, each in took.items()}, reads[1:]


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """A cell of a table: the ratio of each turn."""
    return cell([a / b for a, b in zip(numerators, denominators, strict=True)])

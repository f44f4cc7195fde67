"""Sections of gpu.py: pieces of work with a time limit each, what they print, and how time is shared out.

A section prints JSON objects, a line each: {"row": {...}} adds a row, {"wrong": text} says that a result is not what it
must be, {"failure": {...}} keeps what one case of several died of; anything else is a figure. What was printed is kept
when the section fails, is late or is killed. gpu_worker.py runs sections, gpu_side.py is the process that they run in.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Found = dict[str, Any]
LISTS = {"row": "rows", "wrong": "wrong", "failure": "failures"}


@dataclass(frozen=True, slots=True)
class Section:
    """do: what gpu_side.py is to run, with `task`. least, most: seconds that it needs to be worth starting, and that it
    can use. needs: sections that must have been done; unless: why it cannot be run here, None where it can. alone:
    whether it has a process of its own, because it leaves settings or memory behind."""

    name: str
    do: str
    least: float
    most: float
    task: Found = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    unless: str | None = None
    alone: bool = False


def allot(waiting: Sequence[Section], left: float) -> tuple[float, list[Section]]:
    """(seconds for the first of `waiting`, those that there is no time for), in order of importance: each is sure of
    its `least` before a later one gets any, and what is not promised to the later ones goes to the first, up to its
    `most`. With 100 s left, [30 to 200 s, 40 to 50 s, 50 to 90 s]: the first gets 60, the third is dropped."""
    promised, dropped = 0.0, []
    for section in waiting:
        if promised + section.least > left:
            dropped.append(section)
        else:
            promised += section.least
    if not waiting or waiting[0] in dropped:
        return 0.0, dropped
    first = waiting[0]
    return min(first.most, left - promised + first.least), dropped


def add(found: Found, message: Found) -> None:
    """Take in one message of a section."""
    for name, value in message.items():
        if name in LISTS:
            found.setdefault(LISTS[name], []).append(value)
        else:
            found[name] = value


def parse(line: str) -> Found | None:
    """A line of a section's output as a message; None where something else printed it."""
    if not line.startswith("{"):
        return None
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def emit(**values: Any) -> None:
    """In a section's process: print figures, at once."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def short(error: BaseException) -> str:
    """"RuntimeError: CUDA error: ...", in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def emit_failure(case: str, error: BaseException) -> None:
    """One case of a section died while the section goes on: keep why, with the whole traceback."""
    emit(failure={"case": case, "reason": short(error), "traceback": "".join(traceback.format_exception(error))})

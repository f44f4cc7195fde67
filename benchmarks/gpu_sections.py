"""Sections of gpu.py: pieces of work, each a process of its own with a time limit, whose results come line by line.

A section's process prints JSON objects, a line each: {"row": {...}} adds a row, {"wrong": text} says that a result is
not what it must be, anything else is a figure. What it has printed is kept when it fails, is late or is killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

GRACE = 5.0  # seconds that a process gets between being asked to end and being made to
Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Section:
    """do: what gpu_side.py is to run, with `task`. least, most: seconds that it needs to be worth starting, and that it
    can use. needs: sections that must have been done; unless: why it cannot be run here, None where it can."""

    name: str
    do: str
    least: float
    most: float
    task: Found = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    unless: str | None = None


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


def add(found: Found, line: str) -> bool:
    """Take in one line of a section's output; whether it was one of ours."""
    if not line.startswith("{"):
        return False
    try:
        message = json.loads(line)
    except ValueError:
        return False
    for name, value in message.items():
        if name in ("row", "wrong"):
            found.setdefault("rows" if name == "row" else "wrong", []).append(value)
        else:
            found[name] = value
    return True


def run(section: Section, seconds: float, command: Sequence[str], keep: Callable[[Found], None]) -> Found:
    """Run a section; {"state", "seconds", "found", "reason"}. state: "done", "late" (what it had is kept), "failed", or
    "wrong". keep: called with that at every line."""
    found: Found = {}
    result: Found = {"state": "running", "seconds": 0.0, "limit": round(seconds, 1), "found": found}
    start = time.perf_counter()
    task = {**section.task, "seconds": seconds, "ends": time.time() + seconds}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, tempfile.TemporaryFile("w+") as errors:
        json.dump(task, file)
        file.flush()
        process = subprocess.Popen([*command, section.do, file.name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=errors, text=True, start_new_session=True)
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), end(process)))
        timer.daemon = True
        timer.start()
        try:
            for line in process.stdout or ():
                if add(found, line):
                    result["seconds"] = round(time.perf_counter() - start, 1)
                    keep(result)
            process.wait()
        finally:
            timer.cancel()
            end(process)
            if process.stdout:
                process.stdout.close()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    result["seconds"] = round(time.perf_counter() - start, 1)
    if found.get("wrong"):
        result |= {"state": "wrong", "reason": "; ".join(found["wrong"])}
    elif late.is_set():
        result |= {"state": "late", "reason": f"ended after {seconds:.0f} s"}
    elif process.returncode:
        result |= {"state": "failed", "reason": why(process.returncode, said), "stderr": said[-30:]}
    elif "unavailable" in found:
        result |= {"state": "unavailable", "reason": found["unavailable"]}
    else:
        result["state"] = "done"
    return result


def why(code: int, said: Sequence[str]) -> str:
    """Of a process that failed: its last line, or else how it ended."""
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
    return f"{ended}: {said[-1][:300]}" if said else ended


def end(process: subprocess.Popen[str]) -> None:
    """It, and all that it started: asked first, then made to."""
    if process.poll() is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def emit(**values: Any) -> None:
    """In a section's process: print figures, at once."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()

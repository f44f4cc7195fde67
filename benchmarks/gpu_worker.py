"""Runs sections in a process that serves one after another: starting Python, torch and a CUDA context anew takes 7
seconds, and gpu.py has some 25 sections.

A section that fails, is late or crashes ends its process, and the next one gets a fresh process. So does a section that
left memory behind (gpu_side.py looks), and one that must be alone has its own.

The parent writes a line of JSON for each section, {"do", "task"}; the process answers with the section's messages and
then with {"end": {"reason", "traceback", "left"}}, each None where there is nothing to say. Its stderr goes to a file,
of which each section's part is kept: warnings, tracebacks, and the stacks of all threads that faulthandler writes
there shortly before the time is up, at a crash, and at SIGTERM.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO

from gpu_sections import Found, Section, add, parse

GRACE = 5.0  # seconds that a process gets between being asked to end and being made to
KEPT = 24_000  # characters of a section's stderr: the beginning of a failure may lie before the stacks of 60 threads


class Workers:
    """The process that serves, and its successors. command: starts one; env: of it."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None):
        self._command = list(command)
        self._env = dict(os.environ if env is None else env)
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("a+b")  # noqa: SIM115  (as long as the processes)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.started = 0

    def run(self, section: Section, seconds: float, keep: Callable[[Found], None]) -> Found:
        """Run a section; {"state", "seconds", "limit", "fresh", "found", "reason", "traceback", "stderr"}. state:
        "done", "late" (what it had is kept), "failed", "unavailable" or "wrong". fresh: whether a process was started
        for it. keep: called with that at every message."""
        found: Found = {}
        start = time.perf_counter()
        fresh = self._ready(section.alone)
        result: Found = {"state": "running", "seconds": 0.0, "limit": round(seconds, 1), "fresh": fresh, "found": found}
        process, written, late = self._process, self._errors.seek(0, os.SEEK_END), threading.Event()
        assert process is not None and process.stdin is not None
        timer = threading.Timer(seconds, lambda: (late.set(), end(process)))  # type: ignore[arg-type]
        timer.daemon = True
        timer.start()
        last: Found | None = None
        try:
            task = {**section.task, "seconds": seconds, "ends": time.time() + seconds}
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps({"do": section.do, "task": task}) + "\n")
                process.stdin.flush()
            for message in self._messages(start + seconds + 3 * GRACE):
                if "end" in message:
                    last = message["end"]
                    break
                add(found, message)
                result["seconds"] = round(time.perf_counter() - start, 1)
                keep(result)
            else:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            timer.cancel()
            if last is None or last["reason"] or last["left"] or section.alone or late.is_set():
                self.close(idle=last is not None)
        self._errors.seek(written)
        said = self._errors.read().decode(errors="replace").strip()
        result["seconds"] = round(time.perf_counter() - start, 1)
        result |= judged(found, last, process, late.is_set() and last is None, seconds, said)
        if said:
            result["stderr"] = said[-KEPT:]
        return result

    def _ready(self, alone: bool) -> bool:
        """A process stands ready; whether it is a new one."""
        if self._process is not None and (alone or self._process.poll() is not None):
            self.close()
        if self._process is not None:
            return False
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._errors, text=True, start_new_session=True, env=self._env)
        self._lines = queue.SimpleQueue()  # of this process alone
        threading.Thread(target=read, args=(self._process.stdout, self._lines), daemon=True).start()
        self.started += 1
        return True

    def _messages(self, until: float) -> Iterator[Found]:
        """What the process says, until its stdout ends; or until that time, by perf_counter, since a process that waits
        for a hung driver cannot be killed."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.perf_counter()))
            except queue.Empty:
                return
            if line is None:
                return
            if (message := parse(line)) is not None:
                yield message

    def close(self, idle: bool = True) -> None:
        """End the process, if there is one. idle: it waits for a section, and a closed stdin tells it to go."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin:
            with suppress(BrokenPipeError):
                process.stdin.close()
        if idle:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        end(process)


def read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    """Pass on all lines, and None at the end; a thread of its own, since reading may never return."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def judged(found: Found, last: Found | None, process: subprocess.Popen[str], late: bool, seconds: float,
           said: str) -> Found:
    """State, reason and traceback of a section. last: its last message, None where its process ended before."""
    if found.get("wrong"):
        return {"state": "wrong", "reason": "; ".join(found["wrong"])}
    if late:
        return {"state": "late", "reason": f"ended after {seconds:.0f} s"}
    if last is None:
        return {"state": "failed", "reason": why(process.returncode, said.splitlines())}
    if last["reason"]:
        return {"state": "failed", "reason": last["reason"], "traceback": last["traceback"]}
    left = {"left": last["left"]} if last["left"] else {}
    if "unavailable" in found:
        return {"state": "unavailable", "reason": found["unavailable"], **left}
    if found.get("failures"):
        died = "; ".join(f"{failure['case']}: {failure['reason']}" for failure in found["failures"])
        return {"state": "failed", "reason": died, **left}
    return {"state": "done", **left}


def why(code: int | None, said: Sequence[str]) -> str:
    """Of a process that ended unasked: how, and its last words; faulthandler names a signal first."""
    ended = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit {code}"
    fatal = next((line for line in said if line.startswith("Fatal Python error")), None)
    return f"{ended}: {(fatal or said[-1])[:300]}" if said else ended


def end(process: subprocess.Popen[str]) -> None:
    """The process, and all that it started: asked first, then made to."""
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

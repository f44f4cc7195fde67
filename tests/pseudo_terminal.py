"""A program on a terminal of its own, driven as a user would: keys in, screen text out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from warm_python import WarmPython

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[=>()][0-9A-B]?)")
CTRL_C, CTRL_D, UP, ENTER = "\x03", "\x04", "\x1b[A", "\r"
PATIENCE = 120  # seconds until a text that does not come is a failure


class PseudoTerminal:
    """A Python program with this terminal as its stdin, stdout, stderr and controlling terminal.

    Nothing here waits by the clock: expect() reads until the text is there.
    """

    def __init__(self, python: WarmPython, program: Sequence[str], environ: Mapping[str, str], cwd: Path):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        self._before = termios.tcgetattr(slave)
        self.process = python.start(*program, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=environ,
                                    terminal=True)
        os.close(slave)
        self.raw = ""  # everything that came, escape sequences included
        self._unread = ""

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def expect(self, text: str) -> str:
        """Read until `text` is on the screen; what came before it, escape sequences taken out."""
        deadline = time.monotonic() + PATIENCE
        while text not in (plain := ESCAPES.sub("", self._unread)):
            if not self._read(deadline):
                raise AssertionError(f"{text!r} did not come; the terminal shows {plain[-2000:]!r}")
        before, _, after = plain.partition(text)
        self._unread = after
        return before

    def expect_more(self, characters: int) -> None:
        """Read until that much more is on the screen, whatever it says."""
        deadline = time.monotonic() + PATIENCE
        while len(ESCAPES.sub("", self._unread)) < characters:
            assert self._read(deadline), f"the terminal shows {self._unread[-2000:]!r}"

    def ask(self, line: str, answer: str) -> str:
        """Type a line, expect an answer and then the next prompt; all that came after the line."""
        self.send(line + ENTER)
        came = self.expect(answer) + answer
        return came + self.expect(">>>")

    def end(self) -> int:
        """Wait until the program ended; its exit code."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(PATIENCE)

    @property
    def modes_are_restored(self) -> bool:
        return termios.tcgetattr(self._master) == self._before

    def hang_up(self) -> None:
        """Close the terminal as a closed window does: SIGHUP, and no reading or writing any more."""
        os.close(self._master)
        self._master = -1

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self._master >= 0:
            os.close(self._master)

    def _read(self, deadline: float) -> bool:
        """Take what the program wrote; False when it has ended or time is up."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        data = b""
        if ready:
            with contextlib.suppress(OSError):  # EIO: the program closed its side
                data = os.read(self._master, 65536)
        text = data.decode("utf-8", "replace")
        self.raw += text
        self._unread += text
        return bool(data)

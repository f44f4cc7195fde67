"""The two streams of the chat: the answer on stdout, everything else on stderr.

No text of a model or a file reaches the terminal raw: an escape sequence in an answer could move the cursor, set the
title or fake a prompt, so control characters are shown as their pictures. If the terminal is gone (hangup), nothing
here raises an error; `gone` says so and the chat leaves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TextIO

from qmix.errors import QmixError
from qmix.render import DIM, PLAIN, clean, wants_color
from qmix.tokenizer.message import CLOSE, OPEN
from qmix.tokenizer.parts import Kind, Part

ERASE_LINE = "\r\x1b[K"


class Screen:
    """Writes the answer to `stdout` and lines for the reader to `stderr`; both flushed at once."""

    def __init__(self, stdout: TextIO, stderr: TextIO, environ: Mapping[str, str] = os.environ):
        self._out = stdout
        self._err = stderr
        self._color = wants_color(stderr, environ)
        self._out_color = wants_color(stdout, environ)
        self._transient = False
        self._last = "\n"  # the answer's last character on the screen
        self._kind: Kind | None = None  # of the last part shown
        self.gone = False

    def begin_answer(self) -> None:
        self._last = "\n"
        self._kind = None

    def show(self, part: Part) -> None:
        """A piece of the answer. Reasoning is dim, or between its tags where nothing can be dim; a blank line stands
        between reasoning, answer and calls, and blank space before the first word of each is not shown."""
        begins = part.kind != self._kind
        shown = clean(part.text.lstrip() if begins else part.text)
        if not shown:
            return
        self._erase()
        if begins:
            if self._kind is not None:
                self._end_part()
                self._write(self._out, "\n")
            self._kind = part.kind
            if part.kind == "reasoning" and not self._out_color:
                self._write(self._out, f"{OPEN}\n")
        self._last = shown[-1]
        # Each piece for itself, so that whatever happens next the terminal is not left dim.
        dim = part.kind == "reasoning" and self._out_color
        self._write(self._out, f"{DIM}{shown}{PLAIN}" if dim else shown)

    def _end_part(self) -> None:
        tag = f"{CLOSE}\n" if self._kind == "reasoning" and not self._out_color else ""
        self._write(self._out, ("" if self._last == "\n" else "\n") + tag)
        self._last = "\n"

    def end_answer(self) -> None:
        """What follows begins on a line of its own."""
        self._erase()
        self._end_part()

    def say(self, line: str = "") -> None:
        """A line on stderr."""
        self._erase()
        self._write(self._err, clean(line) + "\n")

    def dim(self, line: str) -> None:
        """A line on stderr that stays in the background."""
        self._erase()
        shown = f"{DIM}{clean(line)}{PLAIN}" if self._color else clean(line)
        self._write(self._err, shown + "\n")

    def transient(self, line: str) -> None:
        """A dim line that the next output replaces; nothing where lines cannot be erased."""
        if self._color:
            self._write(self._err, f"{DIM}{clean(line)}{PLAIN}")
            self._transient = True

    def error(self, error: QmixError) -> None:
        self.say(f"error: {error}")

    def abandon(self) -> None:
        """After the terminal is gone: send what the streams still hold nowhere, so that flushing them at
        exit is no error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (self._out, self._err):
            try:
                os.dup2(nowhere, stream.fileno())
            except (OSError, ValueError):  # closed, or no file
                continue
        os.close(nowhere)

    def _erase(self) -> None:
        if self._transient:
            self._transient = False
            self._write(self._err, ERASE_LINE)

    def _write(self, stream: TextIO, text: str) -> None:
        encoding = stream.encoding or "utf-8"
        try:
            stream.write(text.encode(encoding, "replace").decode(encoding))
            stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            self.gone = True

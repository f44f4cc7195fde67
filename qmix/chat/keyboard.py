"""The terminal's mode between and during prompts.

While the chat runs, keys are not echoed and not gathered into lines. So text that is typed while an answer streams does
not appear inside the answer, but waits for the next prompt. Ctrl-C still sends SIGINT. The editing prompt sets its own
mode; the plain one (lines.py) reads key by key.
"""

from __future__ import annotations

import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOCAL, CHARACTERS = 3, 6  # the places of local modes and control characters in termios attributes
LINE_MODES = termios.ECHO | termios.ICANON


@contextmanager
def quiet(fd: int) -> Iterator[None]:
    """No echo, no lines, each key at once; then the terminal as it was before."""
    before = termios.tcgetattr(fd)
    wanted = list(before)
    wanted[LOCAL] &= ~LINE_MODES
    wanted[CHARACTERS] = list(before[CHARACTERS])
    wanted[CHARACTERS][termios.VMIN], wanted[CHARACTERS][termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSANOW, wanted)
    try:
        yield
    finally:
        _restore(fd, before)


def _restore(fd: int, attributes: list[Any]) -> None:
    try:
        termios.tcsetattr(fd, termios.TCSANOW, attributes)
    except termios.error:
        return  # the terminal is gone: nothing is left to restore

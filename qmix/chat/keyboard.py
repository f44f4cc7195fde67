"""The terminal's mode between and during prompts.

While the chat runs, keys are not echoed and not gathered into lines: what is typed while an answer
streams does not land inside it but waits for the next prompt. Ctrl-C still sends SIGINT. The editing
prompt sets its own mode; the plain one asks for `lines`.
"""

from __future__ import annotations

import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOCAL = 3  # the local modes' place in termios attributes
LINE_MODES = termios.ECHO | termios.ICANON


@contextmanager
def quiet(fd: int) -> Iterator[None]:
    """No echo, no lines; then the terminal as it was before."""
    with _local_modes(fd, off=LINE_MODES):
        yield


@contextmanager
def lines(fd: int) -> Iterator[None]:
    """Echo, and lines edited by the terminal itself."""
    with _local_modes(fd, on=LINE_MODES):
        yield


@contextmanager
def _local_modes(fd: int, on: int = 0, off: int = 0) -> Iterator[None]:
    before = termios.tcgetattr(fd)
    wanted = list(before)
    wanted[LOCAL] = (wanted[LOCAL] | on) & ~off
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

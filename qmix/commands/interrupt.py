"""Ctrl-C while a command computes: the first ends the work tidily, the second at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qmix.config import Cancel


@contextmanager
def cancel_on_interrupt() -> Iterator[Cancel]:
    """A token that Ctrl-C sets; the second Ctrl-C interrupts at once."""
    cancel = Cancel()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if cancel:
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)

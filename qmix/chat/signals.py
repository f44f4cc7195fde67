"""Signals while the chat runs.

SIGINT (Ctrl-C) cancels the answer and nothing else: at the prompt it is a key, elsewhere it has no effect, so pressing
it twice never kills. SIGTERM and SIGHUP cancel the answer, end the prompt and set `ending`; the loop then saves the
conversation and leaves with 128 + the signal's number. Handlers only set flags and wake the prompt; all work happens in
the loop. All handlers are restored on exit.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Protocol

from qmix.config import Cancel


class Wakeable(Protocol):
    """What the signal handlers need of the prompt; both are called from a handler."""

    def interrupt(self) -> None: ...

    def leave(self) -> None: ...


class Signals:
    """Context manager; `ending` is the signal that asked the chat to end, or None."""

    def __init__(self, cancel: Cancel, prompt: Wakeable):
        self._cancel = cancel
        self._prompt = prompt
        self._previous: dict[signal.Signals, Any] = {}
        self.ending: signal.Signals | None = None

    def __enter__(self) -> Signals:
        # Python lets only the main thread set handlers; in another thread the caller owns them.
        if threading.current_thread() is threading.main_thread():
            self._install(signal.SIGINT, self._interrupt)
            for number in (signal.SIGTERM, signal.SIGHUP):
                # A signal that the parent chose to ignore (nohup) stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._install(number, self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _install(self, number: signal.Signals, handler: Any) -> None:
        previous = signal.signal(number, handler)
        self._previous[number] = signal.SIG_DFL if previous is None else previous

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._cancel.set()
        self._prompt.interrupt()

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ending = signal.Signals(number)
        self._cancel.set()
        self._prompt.leave()

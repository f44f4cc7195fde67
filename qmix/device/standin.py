"""The CPU in a GPU's place: threads are the streams, RAM is the device's memory.

The code that decides what runs when on a GPU runs here too, under stricter conditions. Another thread does the
submitted work later, with a `delay` before each piece if a test wants one. So code that forgets to wait reads the wrong
bytes here as well.

Work that raises ends its stream: what follows is dropped, and whoever waits for an event gets the error.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import psutil
import torch
from torch import Tensor

from qmix.device.device import Event, Stream, Work
from qmix.errors import QmixError


class _Event:
    def __init__(self, stream: _Stream):
        self._stream = stream
        self._over = threading.Event()

    def done(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        self._over.wait()
        if self._stream.error is not None:
            raise self._stream.error

    def passed(self) -> None:
        self._over.set()


class _Stream:
    """A thread that does what it is given, in order."""

    def __init__(self, name: str, delay: Callable[[], None] | None):
        self.error: QmixError | None = None
        self._delay = delay
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Work) -> None:
        self._queue.put(work)

    def enter(self) -> None:
        pass

    def after(self, event: Event) -> None:
        self._queue.put(event.wait)

    def record(self) -> Event:
        event = _Event(self)
        self._queue.put(event.passed)
        return event

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # torch's threads are counted by thread
        with torch.inference_mode():
            while (work := self._queue.get()) is not None:
                own = getattr(work, "__self__", None)
                if self._delay is not None and not isinstance(own, _Event):
                    self._delay()
                if self.error is None or isinstance(own, _Event):
                    self._do(work)

    def _do(self, work: Work) -> None:
        try:
            work()
        except QmixError as e:
            self.error = e
        except BaseException as e:
            self.error = QmixError(f"the device failed: {type(e).__name__}: {e}")


class StandIn:
    """See device.Device. delay: called by a stream's thread before each piece of work; half: what prompts compute in;
    triton: with Triton's kernels, which then run under its interpreter; nbytes: of memory that it has, None for as much
    as the machine; beside: bytes of it that do not go to tensors."""

    def __init__(self, delay: Callable[[], None] | None = None, half: torch.dtype = torch.bfloat16,
                 triton: bool = False, nbytes: int | None = None, beside: int = 0):
        self.name = "the CPU in a GPU's place"
        self.torch_device = torch.device("cpu")
        self.half = half
        self.trouble = ""
        self.triton = triton
        self._nbytes = nbytes
        self._beside = beside
        self.launches = 0
        self.waits = 0
        self._delay = delay
        self._streams: list[_Stream] = []
        self.compute: Stream = _Counted(self, self._new("qmix-compute"))

    def stream(self) -> _Stream:
        return self._new(f"qmix-stream-{len(self._streams)}")

    def capture(self, work: Work) -> Work:
        return lambda: self.compute.run(work)

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def synchronize(self) -> None:
        self.compute.record().wait()

    def wait(self, event: Event) -> None:
        self.waits += 1
        event.wait()

    def memory(self) -> tuple[int, int]:
        if self._nbytes is not None:
            return self._nbytes, self._nbytes
        found = psutil.virtual_memory()
        return found.available, found.total

    def taken(self) -> int:
        return 0

    def beside(self) -> int:
        return self._beside

    def limit(self, nbytes: int) -> None:
        pass

    def entered(self) -> AbstractContextManager[object]:
        return nullcontext()

    def tidy(self) -> None:
        pass

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self._streams = []

    def _new(self, name: str) -> _Stream:
        self._streams.append(_Stream(name, self._delay))
        return self._streams[-1]


class _Counted:
    """The stream that computes, with its launches counted."""

    def __init__(self, device: StandIn, stream: _Stream):
        self._device = device
        self._stream = stream

    def run(self, work: Work) -> None:
        self._device.launches += 1
        self._stream.run(work)

    def enter(self) -> None:
        pass

    def after(self, event: Event) -> None:
        self._stream.after(event)

    def record(self) -> Event:
        return self._stream.record()

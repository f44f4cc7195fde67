"""What the code above may ask of a device.

A device runs work in streams. Work in one stream runs in order, in parallel with the host and with other streams. An
event is recorded in a stream, and is over when all work that was submitted to the stream before it is done. The host
waits for events; streams wait for events of other streams. Nothing else orders anything.

Who may call. `compute` belongs to the thread that computes; every other stream to the one thread that asked for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from qmix.errors import QmixError

Work = Callable[[], None]


class Event(Protocol):
    """A place in a stream."""

    def done(self) -> bool:
        """Whether the stream has come past it; never waits."""

    def wait(self) -> None:
        """The host waits until it has. Raises what work before it raised."""


class Stream(Protocol):
    """Work in order, beside everything else."""

    def run(self, work: Work) -> None:
        """Have `work` done: a function of torch operations and kernel launches into buffers that stay where they are.
        It may run now, and only launch, or later: it reads nothing that the host may change meanwhile."""

    def after(self, event: Event) -> None:
        """What is given from now on runs when `event`, of another stream, is over."""

    def record(self) -> Event: ...

    def enter(self) -> None:
        """The calling thread gives work to no other stream from now on, so that giving it takes less time."""


class Device(Protocol):
    """name: for people. torch_device: where its tensors live. half: 16-bit floats that its products have: bf16 or fp16.

    triton: whether it runs Triton's kernels.
    trouble: what did not work and was done otherwise, to be said once; "" for nothing.
    launches, waits: how often work was given to `compute`, and how often the host waited for the device, since the
    start; for figures.
    """

    name: str
    torch_device: torch.device
    half: torch.dtype
    triton: bool
    trouble: str
    compute: Stream
    launches: int
    waits: int

    def stream(self) -> Stream:
        """One more, for copies, to be used by one thread."""

    def capture(self, work: Work) -> Work:
        """`work`, which has run before, as one launch: a CUDA graph where the device has graphs. Nothing runs until it
        is called. Captured work uses the same buffers every time, allocates nothing that outlives it, and does not
        wait for anything."""

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory that copies to and from the device run beside the host from (page-locked)."""

    def synchronize(self) -> None:
        """Torch operations on tensors of this device, called from now on, find done what was given to `compute`."""

    def wait(self, event: Event) -> None:
        """event.wait(), counted."""

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device's memory."""

    def taken(self) -> int:
        """Bytes of it that this process holds already, the driver's context among them."""

    def beside(self) -> int:
        """Bytes of it that have gone since it was opened, and not to tensors: to code, graphs and libraries; also what
        other programs have taken meanwhile, which cannot be told apart."""

    def limit(self, nbytes: int) -> None:
        """Refuse to hold more than `nbytes` of tensors there beside those that are held already."""

    def entered(self) -> AbstractContextManager[object]:
        """While it lasts, the calling thread's launches go to this device: of several cards one is current."""

    def tidy(self) -> None:
        """Give back what was only needed while loading."""

    def close(self) -> None:
        """End its streams; what was given to them is waited for."""


def failure(error: BaseException) -> QmixError:
    """What the user is told of a device that has failed: its work, and all that is asked of it later, raises `error`.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return QmixError(f"the GPU failed: {line}", "restart qmix; if it happens again, look at dmesg and the card's "
                     "temperature and power")

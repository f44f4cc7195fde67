"""The device that a model is to run on, and how much of its memory it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from qmix import hardware
from qmix.device import Device
from qmix.device.cuda import open_cuda
from qmix.errors import DoesNotFit, UsageError
from qmix.sizes import GIB, MIB, format_bytes

MARGIN = GIB // 2  # of a card's memory that `auto` leaves: to the desktop, to what torch's libraries take later
TINY = MIB // 8  # bytes of a record below which `auto` leaves the GPU alone
PINNED_WSL = 0.4  # of the memory, what `auto` page-locks at most under WSL, which refuses more than about half


@dataclass(frozen=True, slots=True)
class Placement:
    """device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", or one that is open already. vram, pin:
    bytes, None for auto. exact: see engine.load. base: bytes of the device that count as taken already, None = what the
    process holds of it now. tuned: the file of measured configurations of the GPU's kernels, where there is one; exact
    ignores it. memory: the file that keeps what of the GPU's memory torch does not count (engine.vram); None = it is
    neither read nor written. Flags that have no meaning without a GPU are refused there."""

    device: str | Device = "auto"
    vram: int | None = None
    pin: int | None = None
    exact: bool = False
    base: int | None = None
    tuned: Path | None = None
    memory: Path | None = None

    def open(self, record: int, say: Callable[[str], None]) -> Device | None:
        """The device for a model with records of so many bytes; None for the CPU. UsageError, DoesNotFit where it
        cannot be had."""
        if not isinstance(self.device, str):
            return self.device
        kind, colon, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not index.isdecimal())):
            raise UsageError(f"--device {self.device}: want auto, cpu, cuda or cuda:NUMBER")
        tiny = kind == "auto" and record < TINY and self.vram is None
        found = None if kind == "cpu" or tiny else open_cuda(int(index or 0)) if kind == "cuda" else _any(say)
        if tiny and torch.cuda.is_available():
            say("so small a model runs on the CPU: compiling the GPU's kernels takes longer (--device cuda to use it)")
        if found is None:
            for flag, value in (("--vram", self.vram), ("--pin", self.pin)):
                if value is not None:
                    raise UsageError(f"{flag} {format_bytes(value)}: no GPU is in use", f"drop {flag}")
        return found

    def vram_budget(self, device: Device) -> tuple[int, int]:
        """(bytes of the device for this process, bytes of them that count as taken already)."""
        free, taken = device.memory()[0], device.taken()
        base = taken if self.base is None else self.base
        if self.vram is None:
            return taken + max(0, free - min(MARGIN, free // 8)), base
        if self.vram > taken + free:
            raise DoesNotFit(f"--vram {format_bytes(self.vram)}: only {format_bytes(taken + free)} is available on "
                             f"{device.name}, short of {format_bytes(self.vram - taken - free)}",
                             "name a smaller one, or close other programs that use the GPU")
        return self.vram, base

    def pin_budget(self) -> int:
        """Bytes that may be page-locked: of `auto` all that --ram allows, but for WSL."""
        memory = hardware.memory().total
        if self.pin is None:
            return int(memory * PINNED_WSL) if hardware.is_wsl() else memory
        return self.pin


def _any(say: Callable[[str], None]) -> Device | None:
    """A GPU where there is one that qmix can use; else None, with the reason where one might have been expected."""
    if not torch.cuda.is_available():
        return None
    if find_spec("triton") is None:
        say("there is a GPU, but Triton is not installed (pip install triton): the CPU computes")
        return None
    try:
        return open_cuda(0)
    except (UsageError, DoesNotFit) as e:
        say(f"{e.message.removeprefix('--device cuda:0: ')}: the CPU computes")
        return None

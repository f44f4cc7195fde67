"""How fast decoding could be on a machine of these bandwidths, given what was where: the bound that gpu.py judges by.

A token reads the dense weights, its keys and values, and K records a layer. Of the records some lie in VRAM when they
are wanted; the others lie in RAM, and there are two ways to have them: copied up and computed by the GPU, or, where the
work is split, computed by the CPU where they are. So a token takes at least the longest of

    GPU      (dense + KV + records that the CPU does not compute) / VRAM bandwidth
    PCIe     records that are missing and that the CPU does not compute / PCIe bandwidth
    CPU      records that the CPU computes / bandwidth at which it does
    RAM      records that are missing / RAM bandwidth: bus and CPU read the same RAM

if all four go on at once, and the CPU computes just as many as makes that longest one shortest. Nothing is charged for
launches, for waiting on each other, for records that go down to make room, or for guesses that were wrong: they are
what keeps a program below the bound. A record that was read ahead of its time counts as missing.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """GB/s as measured: VRAM reading, PCIe to the card, the CPU computing experts out of RAM, RAM reading."""

    vram: float
    pcie: float
    cpu: float
    ram: float

    def __post_init__(self) -> None:
        for name in ("vram", "pcie", "cpu", "ram"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, want more than 0 GB/s")


@dataclass(frozen=True, slots=True)
class Token:
    """Bytes that a token reads: fixed, whatever is chosen (dense weights, keys and values); chosen, of all chosen
    records; missing, of those among them that were not in VRAM. split: whether the CPU may compute some."""

    fixed: float
    chosen: float
    missing: float
    split: bool

    def __post_init__(self) -> None:
        if not 0 <= self.missing <= self.chosen * (1 + 1e-9):
            raise ValueError(f"missing: got {self.missing}, want 0 to {self.chosen}")


@dataclass(frozen=True, slots=True)
class Bound:
    """rate: tokens a second at most; limit: "VRAM" | "PCIe" | "PCIe and CPU" | "RAM"."""

    rate: float
    limit: str


def bound(token: Token, machine: Bandwidths) -> Bound:
    """See the top. 9 GB fixed and 1 GB chosen, all of that missing, at 1000 GB/s of VRAM, 25 of PCIe, 25 of CPU and 100
    of RAM: half a GB goes each way in 20 ms while the GPU needs 9.5 ms, so 50 tokens a second."""
    device = token.fixed + token.chosen
    on_cpu = 0.0
    if token.split:
        # More of it shortens what the bus and the GPU take, and lengthens what the CPU takes: until they are equal.
        as_bus = token.missing * machine.cpu / (machine.pcie + machine.cpu)
        as_device = device * machine.cpu / (machine.vram + machine.cpu)
        on_cpu = min(token.missing, max(as_bus, as_device))
    below = max((token.missing - on_cpu) / machine.pcie, on_cpu / machine.cpu)
    seconds = {"VRAM": (device - on_cpu) / machine.vram / GB, "RAM": token.missing / machine.ram / GB,
               "PCIe and CPU" if token.split else "PCIe": below / GB}
    limit = max(seconds, key=lambda name: seconds[name])
    return Bound(1 / seconds[limit], limit)

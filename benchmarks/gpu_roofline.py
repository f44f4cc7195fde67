"""How fast decoding could be on a machine of these bandwidths, given what was where: the bound that gpu.py judges by.

A token reads the dense weights, its keys and values, and K records a layer. Of the records some lie in VRAM when they
are wanted; the others lie in RAM, and there are two ways to have them: copied up and computed by the GPU, or computed
by the CPU where they are. So a token takes at least the longer of

    GPU      (dense + KV + records, but for those that the CPU computes) / VRAM bandwidth
    below    (records that are not in VRAM) / (PCIe + CPU), at most / RAM: both read the same RAM
             with everything on the GPU: / PCIe

if the GPU works on one thing while another one comes, and of what is missing exactly the right share goes either way.
Nothing is charged for launches, for waiting on each other, for records that go down to make room, or for guesses that
were wrong: they are what keeps a program below the bound. A record that was read ahead of its time counts as missing.
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
    """See the top. 10 GB fixed and chosen, 1 GB of it missing, at 1000 GB/s of VRAM, 25 of PCIe, 25 of CPU: half a GB
    goes each way in 20 ms while the GPU needs 9.5 ms, so 50 tokens a second."""
    on_cpu = token.missing * machine.cpu / (machine.pcie + machine.cpu) if token.split else 0.0
    seconds = {"VRAM": (token.fixed + token.chosen - on_cpu) / machine.vram / GB,
               "RAM": token.missing / machine.ram / GB}
    if token.split:
        seconds["PCIe and CPU"] = token.missing / (machine.pcie + machine.cpu) / GB
    else:
        seconds["PCIe"] = token.missing / machine.pcie / GB
    limit = max(seconds, key=lambda name: seconds[name])
    return Bound(1 / seconds[limit], limit)

"""Which expert is in which slot, in a table on the device, so that the device looks up the chosen experts' slots
itself.

The table on the device changes only by work given to `compute`, in order with the kernels that read it. So a kernel
that was submitted before a record left finds its slot, and one submitted afterwards does not. The mirror on the host is
the table as the next submitted kernel will find it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.config import ExpertKey
from qmix.device import Device

NOWHERE = -1


class SlotTable:
    """Slots of a tier, by layer and expert."""

    def __init__(self, device: Device, layers: int, experts: int):
        self._device = device
        self._experts = experts
        self._slots = torch.full((layers, experts), NOWHERE, dtype=torch.int32, device=device.torch_device)
        self._mirror: list[dict[int, int]] = [{} for _ in range(layers)]

    def row(self, layer: int) -> Tensor:
        """int32 [E] on the device: the slot of each expert, NOWHERE where it is in none."""
        return self._slots[layer]

    def here(self, layer: int) -> dict[int, int]:
        """{expert: slot}, as work given from now on finds it. Not to be changed."""
        return self._mirror[layer]

    def enter(self, key: ExpertKey, slot: int) -> None:
        """The record is there, whole."""
        self._mirror[key.layer][key.expert] = slot
        self._set(key, slot)

    def leave(self, key: ExpertKey) -> None:
        """Its slot is about to be filled with something else."""
        if self._mirror[key.layer].pop(key.expert, None) is not None:
            self._set(key, NOWHERE)

    def _set(self, key: ExpertKey, slot: int) -> None:
        entry = self._slots[key.layer, key.expert]

        def work() -> None:
            entry.fill_(slot)

        self._device.compute.run(work)

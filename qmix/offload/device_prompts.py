"""The experts of a prompt on a device, many experts a launch.

When a layer's router has spoken, the experts that are in slots are given to the device at once, as the device's own
table of slots has them: the host has not seen the choice yet. Where others can be missing, the host reads the choice
meanwhile, and each other expert is given to the device when its record has come. Its tiles are the same in either case,
and so are its bits.

T tokens, K experts per token, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.device import Device
from qmix.device.device import Event
from qmix.kernels.device_ops import ExpertSlots
from qmix.kernels.prompt_experts import PromptExperts, Tiles


@dataclass(frozen=True, slots=True)
class RoutedPrompt:
    """A layer's tokens: x [T, H], their pairs in tiles, and where the results go, rows [T, K, H] fp32."""

    x: Tensor
    tiles: Tiles
    rows: Tensor


class DevicePrompts:
    """slots: the tier's, by slab, of formats that `kernels` have."""

    def __init__(self, kernels: PromptExperts, slots: Sequence[ExpertSlots], experts: int):
        self._kernels = kernels
        self._slots = slots
        self._experts = experts
        self.combine = kernels.combine

    def begin(self, x: Tensor, ids: Tensor) -> RoutedPrompt:
        """x [T, H], ids [T, K] int64 on the device."""
        rows = torch.empty(*ids.shape, x.shape[1], dtype=torch.float32, device=x.device)
        return RoutedPrompt(x, self._kernels.sort(ids, self._experts), rows)

    def in_slots(self, routed: RoutedPrompt, table: Tensor) -> None:
        """The rows of the experts that are in slots: table int32 [E] on the device has them."""
        for slots in self._slots:
            for part in routed.tiles.launches(slots, routed.x.itemsize):
                self._compute(routed, slots, part, table, -1, here)

    def one(self, routed: RoutedPrompt, kind: int, slot: int, tiles: range, arrived: Callable[[], None]) -> None:
        """The rows of the expert whose tiles these are, in a slot of the tier with records of that kind; `arrived`
        returns when its second matrix may be read."""
        slots = self._slots[kind]
        for part in routed.tiles.launches(slots, routed.x.itemsize, tiles):
            self._compute(routed, slots, part, routed.tiles.expert_of, slot, arrived)

    def _compute(self, routed: RoutedPrompt, slots: ExpertSlots, part: range, table: Tensor, slot: int,
                 arrived: Callable[[], None]) -> None:
        inner = self._kernels.gate_up(routed.x, slots, routed.tiles, part, table, slot)
        arrived()
        self._kernels.down(inner, slots, routed.tiles, part, table, routed.rows, slot)

    def try_out(self, size: int, hidden: int, top_k: int, dtype: torch.dtype) -> None:
        """One token through the expert in the first slot of each slab, in tiles of `size`: so that it is compiled."""
        device = self._slots[0].slab.device
        x, ids = torch.zeros(1, hidden, dtype=dtype, device=device), torch.arange(top_k, device=device)[None]
        rows = torch.zeros(1, top_k, hidden, device=device)
        routed = RoutedPrompt(x, self._kernels.sort(ids, self._experts, size), rows)
        for kind, slots in enumerate(self._slots):
            if len(slots.slab):
                self.one(routed, kind, slots.first, range(1), here)
        self.combine(routed.rows, torch.ones(1, top_k, device=device))

    def sizes(self) -> tuple[int, ...]:
        """Of tiles, all that prompts may have."""
        return self._kernels.sizes(self._slots[0].slab.device)


def here() -> None:
    """Of a record that is whole: nothing has to be waited for."""


class Choices:
    """A layer's choice on its way to the host, one layer behind the device: what is told of it is told when the next
    layer has been given to the device, so that the device never waits for the host.

    most: pairs of a pass, at most. tell(layer, ids [T, K] on the host).
    """

    def __init__(self, device: Device, most: int):
        self._device = device
        self._most = most
        self._rooms: list[Tensor] = []
        self._waiting: list[tuple[Tensor, Event, Callable[[Tensor], None]]] = []

    def send(self, ids: Tensor) -> tuple[Tensor, Event]:
        """Have ids [T, K] copied to the host: where to, and when. It is overwritten by the second call after this."""
        if not self._rooms:
            self._rooms = [self._device.host(self._most, dtype=torch.int64) for _ in range(2)]
        room = self._rooms.pop(0)
        self._rooms.append(room)
        there = room[:ids.numel()].view(ids.shape)
        there.copy_(ids, non_blocking=True)
        return there, self._device.compute.record()

    def read(self, sent: tuple[Tensor, Event]) -> Tensor:
        """Wait for it."""
        self._device.wait(sent[1])
        return sent[0]

    def begin(self) -> None:
        """A pass begins: what an interrupted one has left is dropped."""
        self._waiting.clear()

    def later(self, sent: tuple[Tensor, Event], tell: Callable[[Tensor], None], last: bool) -> None:
        """tell(ids on the host), when the next layer calls this, or now where this is the last one."""
        self._waiting.append((*sent, tell))
        while len(self._waiting) > (0 if last else 1):
            there, event, told = self._waiting.pop(0)
            told(self.read((there, event)))

"""A gated delta net's memory of a session on a device, where captured work finds it at the same place for every pass.

A layer has two places for each of its tensors. A pass reads one side and writes the other, and so the state before it
stays until the next one; `side`, a number on the device, says which is read. What computes elsewhere (prompts, a
snapshot, drafts taken back) leaves a tensor of its own, which is copied to its place before the next pass.

T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmix.forward.recurrent import Advance, Recurrence, RecurrentLayer
from qmix.kernels.kv_size import channels, reserved_bytes
from qmix.kernels.op import FEW
from qmix.spec import DeltaNet


class PlacedRecurrence(Recurrence):
    """pair: both places, [2, ...]."""

    def __init__(self, *shape: int, device: torch.device):
        self.pair = torch.zeros(2, *shape, device=device)
        super().__init__(*shape, device=device)

    def enter(self, side: int) -> None:
        """A pass on the device follows, which reads that side."""
        if self.now.data_ptr() != self.pair[side].data_ptr():
            self.pair[side].copy_(self.now)
            self.now = self.pair[side]

    def retrace(self, count: int) -> None:
        super().retrace(count)
        self._leave()

    def set(self, now: Tensor) -> None:
        super().set(now)
        self._leave()

    def _leave(self) -> None:
        """The tensor may be of the side that the next pass writes, and has to outlast it."""
        if self.now.untyped_storage().data_ptr() == self.pair.untyped_storage().data_ptr():
            self.now = self.now.clone()

    def passed(self, side: int, end: int, compute: Advance, inputs: tuple[Tensor, ...]) -> None:
        """It wrote this side, of these inputs, which stay until the next pass, and ended before position `end`."""
        self.now = self.pair[side]
        if end in self._marks:
            self.marked[end] = self.lend()
        if self._before is not None:
            self._done.append((compute, inputs))

    def lend(self) -> Tensor:
        """A copy: the places are written again."""
        return self.now.clone()


class PlacedLayer(RecurrentLayer):
    """mixed: q, k and v of the last pass, before the convolution and after it, [2, FEW, C]; switches: its a and b,
    [2, FEW, B]."""

    state: PlacedRecurrence
    past: PlacedRecurrence

    def __init__(self, delta: DeltaNet, device: torch.device):
        super().__init__(delta)
        self.state = PlacedRecurrence(delta.value_heads, delta.key_dim, delta.value_dim, device=device)
        self.past = PlacedRecurrence(delta.conv - 1, channels(delta), device=device)
        self.mixed = torch.zeros(2, FEW, channels(delta), device=device)
        self.switches = torch.zeros(2, FEW, delta.value_heads, device=device)
        self.nbytes = reserved_bytes(delta, placed=True)
        self._at = 0  # the position that the next pass begins at

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        return (self.state.pair.data_ptr(), self.past.pair.data_ptr(), self.mixed.data_ptr(),
                self.switches.data_ptr())

    def begin(self, start: int, count: int, retraceable: bool, marks: Sequence[int]) -> None:
        super().begin(start, count, retraceable, marks)
        self._at = start

    def keep(self, x: Tensor, mixed: Tensor, a: Tensor, b: Tensor) -> None:
        """What a pass of several tokens computes its state of, for when some are taken back."""
        for to, part in zip((*self.mixed, *self.switches), (x, mixed, a, b), strict=True):
            to[:len(part)].copy_(part)

    def enter(self, side: int) -> None:
        self.state.enter(side)
        self.past.enter(side)

    def passed(self, side: int, tokens: int, conv: Advance, delta: Advance) -> None:
        """A pass of so many tokens wrote that side. conv, delta: what computes them again."""
        self._at += tokens
        self.past.passed(side, self._at, conv, (self.mixed[0, :tokens],))
        self.state.passed(side, self._at, delta, (
            self.mixed[1, :tokens], self.switches[0, :tokens], self.switches[1, :tokens]))

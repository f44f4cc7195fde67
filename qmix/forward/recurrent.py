"""What a gated delta net remembers of a session, and how it goes back.

A recurrent state has no positions, so it cannot be trimmed. Two things take it back, both to the bit:

    a pass of up to FEW tokens   keeps the state before it and the inputs of its tokens. The state after some of them is
                                 computed from these alone, token by token as before, without the rest of the model.
    marks                        positions within a longer pass at which a copy is kept for a snapshot: the tokens up to
                                 there and those behind it are computed one after the other.

Both tensors of a layer are replaced, never written into, so that a saved one stays as it is. Whoever computes one token
in place of `advance` gets two tensors from `replace`, which change roles from token to token unless somebody keeps one.

T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qmix.kernels.kv_size import channels, reserved_bytes
from qmix.spec import DeltaNet

# (tensor, *inputs [T, ...]) -> (what an Op gives: [T, ...] each, or one of these; the tensor after T tokens)
Advance = Callable[..., tuple[Any, Tensor]]


class Recurrence:
    """A tensor that each token replaces."""

    def __init__(self, *shape: int, device: torch.device | None = None):
        self.now = torch.zeros(shape, device=device)
        self.marked: dict[int, Tensor] = {}
        self._marks: Sequence[int] = ()
        self._before: Tensor | None = None
        self._spare: Tensor | None = None  # nobody has it
        self._lent = False  # somebody may keep `now`
        self._done: list[tuple[Advance, tuple[Tensor, ...]]] = []  # since `_before`

    def begin(self, retraceable: bool, marks: Sequence[int] = ()) -> None:
        """A pass begins. retraceable: `retrace` will be able to take part of it back."""
        self.marked, self._marks, self._done = {}, marks, []
        self._before = self.now if retraceable else None
        if retraceable or marks:
            self._spare, self._lent = None, True

    def advance(self, compute: Advance, start: int, *inputs: Tensor) -> Any:
        """What `compute` gives for the tokens of positions start, start + 1, ..."""
        end = start + len(inputs[0])
        if self._before is not None:
            self._done.append((compute, tuple(x.clone() for x in inputs)))
        found, at = [], start
        for border in (*(mark for mark in self._marks if start < mark < end), end):
            part, now = compute(self.now, *(x[at - start:border - start] for x in inputs))
            found.append(part)
            # A view would keep all that it is cut from, of a convolution the inputs of a whole block.
            self.now = now.clone() if now.untyped_storage().nbytes() > now.nbytes else now
            at = border
            if border in self._marks:
                self.marked[border] = self.now
        if len(found) == 1:
            return found[0]
        return tuple(map(torch.cat, zip(*found, strict=True))) if isinstance(found[0], tuple) else torch.cat(found)

    def replace(self) -> tuple[Tensor, Tensor]:
        """(the tensor as it is, one for what the next token makes of it), which is `now` from here on."""
        old, new = self.now, torch.empty_like(self.now) if self._spare is None else self._spare
        self._spare, self._lent, self.now = None if self._lent else old, False, new
        return old, new

    def lend(self) -> Tensor:
        """`now`, for somebody who keeps it."""
        self._lent = True
        return self.now

    def retrace(self, count: int) -> None:
        """As it was after the first `count` tokens of the pass."""
        assert self._before is not None
        now, done, self._done = self._before, self._done, []
        for compute, inputs in done:
            rows = min(count, len(inputs[0]))
            if rows:
                kept = tuple(x[:rows] for x in inputs)
                now = compute(now, *kept)[1]
                self._done.append((compute, kept))
            count -= rows
        assert count == 0, "tokens that were not computed here"
        self.now = now

    def set(self, now: Tensor) -> None:
        self.begin(retraceable=False)
        self.now, self._spare, self._lent = now, None, True


class RecurrentLayer:
    """A delta net's state [value_heads, key_dim, value_dim] and the last inputs of its convolution
    [taps - 1, channels], fp32."""

    def __init__(self, delta: DeltaNet):
        self.state = Recurrence(delta.value_heads, delta.key_dim, delta.value_dim)
        self.past = Recurrence(delta.conv - 1, channels(delta))
        self.nbytes = reserved_bytes(delta)
        self._pass: range = range(0)  # positions of the last one, where it can be retraced

    def begin(self, start: int, count: int, retraceable: bool, marks: Sequence[int]) -> None:
        """`count` tokens are appended from position `start` on."""
        self._pass = range(start, start + count + 1) if retraceable else range(0)
        for part in (self.state, self.past):
            part.begin(retraceable, marks)

    def marked(self, position: int) -> tuple[Tensor, ...]:
        """`save`, at a mark of the last pass."""
        return self.state.marked[position], self.past.marked[position]

    def can_trim(self, length: int) -> bool:
        return length == 0 or length in self._pass

    def trim(self, length: int) -> None:
        if length not in self._pass:
            self.load((torch.zeros_like(self.state.now), torch.zeros_like(self.past.now)))
            return
        with torch.inference_mode():
            self.state.retrace(length - self._pass.start)
            self.past.retrace(length - self._pass.start)
        self._pass = range(self._pass.start, length + 1)

    def save(self, copy: bool) -> tuple[Tensor, ...]:
        return (self.state.lend(), self.past.lend()) if copy else (self.state.now, self.past.now)

    def load(self, saved: tuple[Tensor, ...]) -> None:
        self._pass = range(0)
        for part, now in zip((self.state, self.past), saved, strict=True):
            part.set(now)

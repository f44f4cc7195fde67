"""What lowering gives (lower.py): calls of the native library for a piece of a program, over buffers that stay.

Most of a call is the same for every token. What is not, addresses of a cache and of what the experts gave, is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qmix.forward.kv_cache import SessionCache
from qmix.forward.recurrent import RecurrentLayer
from qmix.kernels.native import CallSequence


class Unsupported(Exception):
    """The native library has no call for an Op."""


class Buffers:
    """One token's, by name: `whole`, which stay from piece to piece, and those of the piece that is lowered now."""

    def __init__(self, whole: dict[str, Tensor]):
        self.whole = whole
        self.own: dict[str, Tensor] = {}
        self.made: list[Tensor] = []  # calls point to them, also where a later layer of the piece has made another

    def __getitem__(self, name: str) -> Tensor:
        found = self.own.get(name)
        found = self.whole.get(name) if found is None else found
        if found is None:
            raise Unsupported(f"{name}, which Ops without a call make")
        return found

    def make(self, name: str, width: int, dtype: torch.dtype) -> Tensor:
        """[1, width]: the one that stays, if there is one."""
        found = self.whole.get(name)
        if found is None:
            found = self.own[name] = torch.empty(1, width, dtype=dtype)
            self.made.append(found)
        if found.dtype != dtype or found.shape[-1] != width:
            raise Unsupported(f"{name} in two shapes")
        return found


@dataclass(slots=True)
class Calls:
    """What native.CallSequence takes, and which calls are patched for each token: `taken`, the call that reads what the
    experts gave, which `take` makes for one address of that; `attends`, (call, layer, window); `states`, (call, layer,
    whether of its delta rule, else of its convolution)."""

    calls: list[tuple[int, list[bytes] | bytes]] = field(default_factory=list)
    taken: int | None = None
    take: Callable[[Tensor], tuple[int, bytes]] | None = None
    attends: list[tuple[int, int, int | None]] = field(default_factory=list)
    states: list[tuple[int, int, bool]] = field(default_factory=list)

    def add(self, kind: int, packed: list[bytes] | bytes) -> int:
        self.calls.append((kind, packed))
        return len(self.calls) - 1


@dataclass(frozen=True, slots=True)
class RopeCosSin:
    """cos, sin [1, 1, D] of the token's position; inv_freq: where a call makes them, else they are to be filled."""

    cos: Tensor
    sin: Tensor
    inv_freq: Tensor | None


def patch_states(sequence: CallSequence, states: Sequence[tuple[int, int, bool]], cache: SessionCache) -> None:
    """Where each recurrent layer's state of a session is, and where the next one goes, which is the session's from here
    on; states: as Calls has them."""
    for call, layer, of_rule in states:
        found = cache.layers[layer]
        assert isinstance(found, RecurrentLayer)
        now, after = (found.state if of_rule else found.past).replace()
        sequence.patch_state(call, now.data_ptr(), after.data_ptr())

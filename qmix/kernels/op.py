"""What every operation of a forward pass answers; ops/ has the operations.

`inputs` and `outputs`, buffers by name (an output that is also an input is overwritten); `weights`, tensors of the
model; `scratch`, bytes of the buffers that it adds; `bytes_read`, what it reads of weights and caches, which is what
decoding waits for; `flops`, of its products, two a multiplication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from qmix.spec import Tensor

WIDE = 4  # bytes of a number in a buffer: fp32, the most that it takes
FEW = 8  # tokens that get the bits that each gets alone: one and up to seven drafts
BytesOf = Callable[[Tensor], int]  # a weight's bytes, as they are stored


@dataclass(frozen=True, slots=True)
class Op:
    """What all Ops answer. READS, WRITES, WEIGHTS: the fields that name its buffers and weights."""

    READS: ClassVar[tuple[str, ...]] = ()
    WRITES: ClassVar[tuple[str, ...]] = ()
    WEIGHTS: ClassVar[tuple[str, ...]] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        return self._named(self.READS)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._named(self.WRITES)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self._named(self.WEIGHTS)

    def _named(self, fields: tuple[str, ...]) -> tuple[Any, ...]:
        """What these fields hold, those that hold several one after another, those that hold None left out."""
        found: list[Any] = []
        for value in (getattr(self, name) for name in fields):
            found += value if isinstance(value, tuple) else () if value is None else (value,)
        return tuple(found)

    def scratch(self, tokens: int) -> int:
        """Bytes of the buffers that it adds, for so many tokens, at most."""
        return 0

    def bytes_read(self, tokens: int, bytes_of: BytesOf, context: int = 0, kv_bytes: int = 2) -> int:
        """Bytes of weights, and of a cache that holds `context` positions in numbers of kv_bytes bytes."""
        return sum(map(bytes_of, self.weights))

    def flops(self, tokens: int, context: int = 0) -> int:
        """Each token times each matrix; `context`: positions that a token sees."""
        return sum(2 * tokens * t.shape[0] * t.shape[1] for t in self.weights if len(t.shape) == 2)

"""Where a tensor of the model lies in a checkpoint, as data.

A `Source` names one tensor of the checkpoint and the steps from it to the model's own tensor. Steps are records; each
knows the shape that it makes of a shape, and refuses one that it is not made for. What they do to values is in
qmix/sources.py, where torch is. E experts, F expert inner, H hidden.

gpt-oss keeps gate and up of all experts in one tensor [E, H, 2F], the rows of both taking turns. The up projection of
expert 3 is `Source("...gate_up_proj", (Index(3, E), Transpose(), Strided(1, 2)))`: [E, H, 2F] -> [H, 2F] -> [2F, H] ->
[F, H].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


class Misfit(Exception):
    """A step meets a shape that it is not made for; the text says what it wants."""


def _fit(condition: bool, shape: Shape, wanted: str) -> None:
    if not condition:
        raise Misfit(f"got shape {list(shape)}, want {wanted}")


@dataclass(frozen=True, slots=True)
class Index:
    """Entry `at` of the first dimension, which has `of` entries."""

    at: int
    of: int

    def shape_out(self, shape: Shape) -> Shape:
        _fit(len(shape) > 1 and shape[0] == self.of, shape, f"{self.of} entries in the first dimension")
        return shape[1:]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `begin` to `end` of `of`."""

    begin: int
    end: int
    of: int

    def shape_out(self, shape: Shape) -> Shape:
        _fit(bool(shape) and shape[0] == self.of, shape, f"{self.of} rows")
        return (self.end - self.begin, *shape[1:])


@dataclass(frozen=True, slots=True)
class Strided:
    """Every `step`-th row from `start` on: 1 of 2 are the odd ones."""

    start: int
    step: int

    def shape_out(self, shape: Shape) -> Shape:
        _fit(bool(shape) and shape[0] % self.step == 0, shape, f"a multiple of {self.step} rows")
        return (shape[0] // self.step, *shape[1:])


@dataclass(frozen=True, slots=True)
class Transpose:
    """[A, B] -> [B, A]."""

    def shape_out(self, shape: Shape) -> Shape:
        _fit(len(shape) == 2, shape, "two dimensions")
        return shape[1], shape[0]


@dataclass(frozen=True, slots=True)
class PerHead:
    """Rows lie head by head, each head's in parts of `sizes` rows; afterwards part by part, each for all heads. The
    first `before` rows stay where they are.

    PerHead(2, (1, 2)): [q0 g0 g0' q1 g1 g1'] -> [q0 q1 g0 g0' g1 g1'].
    """

    heads: int
    sizes: tuple[int, ...]
    before: int = 0

    def shape_out(self, shape: Shape) -> Shape:
        rows = self.before + self.heads * sum(self.sizes)
        _fit(bool(shape) and shape[0] == rows, shape, f"{rows} rows")
        return shape


@dataclass(frozen=True, slots=True)
class ColumnsPerHead:
    """As PerHead, of columns."""

    heads: int
    sizes: tuple[int, ...]

    def shape_out(self, shape: Shape) -> Shape:
        columns = self.heads * sum(self.sizes)
        _fit(len(shape) == 2 and shape[1] == columns, shape, f"{columns} columns")
        return shape


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows of each head lie in the pairs that rotate together; afterwards all first ones, then all second ones.

    Pairs(2): [a0 b0 a1 b1, c0 d0 c1 d1] -> [a0 a1 b0 b1, c0 c1 d0 d1].
    """

    heads: int

    def shape_out(self, shape: Shape) -> Shape:
        _fit(bool(shape) and shape[0] % (2 * self.heads) == 0, shape, f"a multiple of {2 * self.heads} rows")
        return shape


@dataclass(frozen=True, slots=True)
class Squeeze:
    """Without dimension `dim`, which is 1."""

    dim: int

    def shape_out(self, shape: Shape) -> Shape:
        _fit(self.dim < len(shape) and shape[self.dim] == 1, shape, f"1 in dimension {self.dim}")
        return shape[:self.dim] + shape[self.dim + 1:]


@dataclass(frozen=True, slots=True)
class OneRow:
    """[N] or [1, N] -> [1, N]: writers of GGUF files drop dimensions of 1."""

    def shape_out(self, shape: Shape) -> Shape:
        _fit(len(shape) == 1 or (len(shape) == 2 and shape[0] == 1), shape, "one row")
        return 1, shape[-1]


@dataclass(frozen=True, slots=True)
class Plus:
    """`number` is added to each, in fp32."""

    number: float

    def shape_out(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True, slots=True)
class LogOfNegative:
    """log(-x), of numbers below 0, in fp32: undoes -exp(x)."""

    def shape_out(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Blocks of 4-bit codes, [R, G, 16] bytes, are R rows of 32 G numbers (qmix/formats/mxfp4.py). The last step of a
    source with scales, and of no other."""

    def shape_out(self, shape: Shape) -> Shape:
        _fit(len(shape) == 3 and shape[2] == 16, shape, "[rows, blocks, 16]")
        return shape[0], 32 * shape[1]


ARITHMETIC = (Plus, LogOfNegative)  # steps that change numbers, not only their order
Step = (Index | Rows | Strided | Transpose | PerHead | ColumnsPerHead | Pairs | Squeeze | OneRow | Plus | LogOfNegative
        | Mxfp4)


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint's tensor `name`, and what is done to it, in order. scales: the tensor [.., R, G] of the scales of
    MXFP4 blocks, on which all steps but the last are done too."""

    name: str
    steps: tuple[Step, ...] = ()
    scales: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the checkpoint that it needs."""
        return (self.name, self.scales) if self.scales else (self.name,)

    @property
    def computes(self) -> bool:
        """Whether steps change numbers: these are then read in fp32."""
        return any(isinstance(step, ARITHMETIC) for step in self.steps)

    @property
    def of_scales(self) -> Source:
        return Source(self.scales, self.steps[:-1])

    def shape_out(self, shape: Shape) -> Shape:
        """The shape of the model's tensor where the checkpoint's has `shape`; Misfit where that cannot be."""
        for step in self.steps:
            shape = step.shape_out(shape)
        return shape


Layout = Mapping[str, Source]  # by the canonical name of the model's tensor


def halves(name: str, rows: int, *before: Step) -> tuple[Source, Source]:
    """Two tensors of `rows` rows each that lie one below the other in one."""
    return Source(name, (*before, Rows(0, rows, 2 * rows))), Source(name, (*before, Rows(rows, 2 * rows, 2 * rows)))


def per_head(prefix: str, name: str, heads: int, parts: Mapping[str, int]) -> dict[str, Source]:
    """Sources of `parts`, by the prefix and their names, that lie head by head in one tensor, of each so many rows."""
    sizes, begin, found = tuple(parts.values()), 0, {}
    for part, size in parts.items():
        end = begin + heads * size
        found[prefix + part] = Source(name, (PerHead(heads, sizes), Rows(begin, end, heads * sum(sizes))))
        begin = end
    return found

"""The program of a decode pass on a device, cut at its Experts (lower_device.py makes calls of the pieces)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmix.forward.program import embed_program, head_program, layer_program, live, pieces
from qmix.forward.run_eager import Guesses
from qmix.kernels import ops
from qmix.kernels.op import Op
from qmix.spec import Model


@dataclass(frozen=True, slots=True)
class Piece:
    """Ops up to the next Experts, which is None behind the last one. given: the buffer of what the experts before gave;
    after: buffers that are read later."""

    program: tuple[Op, ...]
    experts: ops.Experts | None
    given: str | None
    after: frozenset[str]


def decode_program(model: Model, guesses: Guesses) -> list[tuple[int | None, Op]]:
    """(layer, Op) of a decode pass, logits of all tokens included."""
    layers = [(i, op) for i in range(len(model.layers))
              for op in layer_program(model, i, guesses.depth, guesses.count) if not isinstance(op, ops.Take)]
    return [(None, embed_program(model)), *layers, *((None, op) for op in head_program(model))]


def cut(program: Sequence[Op]) -> list[Piece]:
    """A piece for each layer with records, and the rest."""
    parts = pieces(program)
    found: list[Piece] = []
    for at in range(0, len(parts), 2):
        experts, given = parts[at + 1][0] if at + 1 < len(parts) else None, parts[at - 1][1] if at else None
        assert experts is None or isinstance(experts, ops.Experts)
        assert given is None or isinstance(given, ops.Combine)
        rest = [op for part in parts[at + 1:] for op in part]
        found.append(Piece(parts[at], experts, given.out if given is not None else None, frozenset(live(rest))))
    return found

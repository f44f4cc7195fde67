"""The original model reads a text, layer by layer, straight from the checkpoint: its program (forward/program.py) in
fp32, the experts one after another as they come from the disk.

    forward = ForwardPass(checkpoint, calibration, pool)
    for each layer:
        forward.enter(layer, measure)               # up to the experts; -> forward.dense_inputs
        for each expert:
            forward.expert(key, w13, w2, measure)   # -> the inputs of w13 and of w2, summed up
        forward.leave()                             # what follows the experts; -> forward.dense_inputs

Only the data of one layer is held. The residual of all tokens stays between layers, and beside it what the experts and
the Ops behind them read: `live`. The weights are the original's throughout, not the quantized ones, so the result
depends neither on the format nor on where an interrupted run continues.

What lies between two Experts is computed one sequence a task, each with a cache of its own; what its products read is
summed up SEQUENCES sequences at a time. An expert gets its tokens CHUNK at a time, and what it gives is added to the
residual at once where nothing but that addition follows, else to the buffer that Combine fills. Sizes depend on shapes
only, and each piece is computed by one thread: no bit depends on the number of threads.

S sequences of L tokens, T = S * L in all; n of them sent to an expert; H hidden, F expert inner, K chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.config import ExpertKey
from qmix.errors import QmixError, UsageError
from qmix.forward.kv_cache import SessionCache
from qmix.forward.passes import Span
from qmix.forward.program import embed_program, head_program, layer_program, live, pieces
from qmix.forward.steps import run_ops
from qmix.kernels import ops, torch_ops
from qmix.kernels.op import Op
from qmix.quantize.calibration import Calibration
from qmix.quantize.gptq import Moments
from qmix.quantize.inputs import Inputs, Products, Sums, squares
from qmix.quantize.layer_weights import LayerWeights, Source
from qmix.spec import Model

CHUNK = 1024  # tokens that go through an expert at a time
SEQUENCES = 8  # whose inputs are summed up together
ROWS = 512  # rows of a weight that one task widens to fp32 and multiplies
Item = TypeVar("Item")
Found = TypeVar("Found")
Watch = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # (rows [n], w13 read [n, H], w2 read [n, F], it gave [n, H])


@dataclass(frozen=True, slots=True)
class LayerPieces:
    """A layer's program, cut at its experts. experts, combine: None in a layer without; after: what follows them,
    nothing where that is the addition to the residual alone, which is then done expert by expert."""

    before: tuple[Op, ...]
    experts: ops.Experts | None
    combine: ops.Combine | None
    after: tuple[Op, ...]

    @classmethod
    def of(cls, model: Model, i: int) -> LayerPieces:
        runs: list[list[Op]] = [[], []]
        experts: ops.Experts | None = None
        combine: ops.Combine | None = None
        for piece in pieces(layer_program(model, i)):
            if isinstance(piece[0], ops.Experts):
                assert isinstance(piece[1], ops.Combine)
                experts, combine = piece[0], piece[1]
            elif not isinstance(piece[0], ops.Take):  # the logits of all tokens are wanted
                runs[experts is not None] += piece
        after = tuple(runs[1])
        if combine is not None and after == (ops.Add("residual", combine.out),):
            after = ()
        return cls(tuple(runs[0]), experts, combine, after)

    @property
    def sums_up(self) -> str:
        """The buffer to which experts add."""
        assert self.combine is not None
        return self.combine.out if self.after else "residual"

    def live_widths(self, compute: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """{buffer: (numbers a token, dtype)} that stay while the experts run: what these and `after` read."""
        if self.experts is None or self.combine is None:
            return {}
        names = live((self.experts, self.combine, *self.after)) - {"residual"}
        found: dict[str, tuple[int, torch.dtype]] = {}
        for op in self.before:
            if isinstance(op, ops.Norm):
                wide = op.out is None
                found |= {name: (op.size, torch.float32 if wide or name == op.wide else compute) for name in op.outputs}
            elif isinstance(op, ops.Route):
                found |= {op.ids: (op.router.top_k, torch.int64), op.topk_weights: (op.router.top_k, torch.float32)}
        found = {name: found[name] for name in sorted(names)}
        return found if not self.after else found | {self.combine.out: (self.combine.hidden, torch.float32)}


class ForwardPass:
    """The original model on the calibration's tokens, with room for `copies` copies of their rows, or of the first
    `copied` ones (sensitivity.py, sampled.py).

    residual fp32 [T, H]; live: the buffers of LayerPieces.live_widths of the current layer, [T, ...] each. layer: the
    current one, -1 before the first. dense_inputs: those of its dense matrices, as far as they were asked for, by
    canonical name.
    """

    def __init__(self, source: Source, calibration: Calibration, pool: Executor | None = None, copies: int = 0,
                 copied: int | None = None):
        model = source.model
        if (worst := int(calibration.ids.max())) >= model.vocab:
            raise UsageError(f"the calibration has token {worst}, the model {model.vocab}")
        self.model, self._source, self._pool = model, source, pool
        self._length = calibration.length
        self.tokens = calibration.tokens
        self.copied = calibration.tokens if copied is None else copied
        self._room = calibration.tokens + copies * self.copied
        self.layer, self.pieces = -1, LayerPieces((), None, None, ())
        self.dtype = compute_dtype(model)
        self.dense_inputs: dict[str, Inputs] = {}
        self._measure = False
        self._whole = {"residual": torch.empty(self._room, model.hidden)}
        self._rows = self.tokens
        embed = (embed_program(model),)
        weights = LayerWeights.read(source, embed)
        for tokens, out in zip(calibration.ids.flatten().split(CHUNK), self.residual.split(CHUNK), strict=True):
            found = {"tokens": tokens}
            run_ops(model, embed, weights, found, (), {"residual"})
            out.copy_(found["residual"])

    @property
    def residual(self) -> Tensor:
        return self._whole["residual"][:self._rows]

    @property
    def live(self) -> dict[str, Tensor]:
        return {name: whole[:self._rows] for name, whole in self._whole.items() if name != "residual"}

    @property
    def ids(self) -> Tensor:
        """[T, K]: the experts that the current layer chose."""
        assert self.pieces.experts is not None
        return self.live[self.pieces.experts.ids or "ids"]

    @property
    def topk_weights(self) -> Tensor:
        """[T, K]: and their weights."""
        assert self.pieces.combine is not None
        return self.live[self.pieces.combine.topk_weights or "topk_weights"]

    @property
    def normed(self) -> Tensor:
        """[T, H]: what the current layer's experts read, in the dtype that the model computes in."""
        assert self.pieces.experts is not None
        return self.live[self.pieces.experts.source]

    def enter(self, layer: int, measure: bool = False) -> None:
        """The next layer up to its experts, or all of a layer without any. measure: sum up what its dense matrices
        read."""
        self.leave()
        assert layer == self.layer + 1, (layer, self.layer)
        self.layer, self._measure = layer, measure
        self.dense_inputs.clear()
        self.pieces = LayerPieces.of(self.model, layer)
        wanted = self.pieces.live_widths(self.dtype)
        if self.pieces.experts is not None and self.pieces.experts.ids is None:
            wanted |= {"ids": (1, torch.int64), "topk_weights": (1, torch.float32)}
        self._make(wanted)
        if self.pieces.experts is not None and self.pieces.experts.ids is None:  # every token meets record 0
            self.ids.zero_()
            self.topk_weights.fill_(1)
        self._run(self.pieces.before)
        if self.pieces.after:
            self.live[self.pieces.sums_up].zero_()
        self._check_finite()

    def leave(self) -> None:
        """What follows the current layer's experts; once."""
        after = self.pieces.after
        if after:
            self.pieces = LayerPieces(self.pieces.before, self.pieces.experts, self.pieces.combine, ())
            self._run(after)
            self._check_finite()

    def add_copy(self) -> None:
        """One more copy of the text's own rows, as they are now, behind those that are there."""
        before, after = self._rows, self._rows + self.copied
        for whole in self._whole.values():
            whole[before:after] = whole[:self.copied]
        self._rows = after

    def resume(self, layer: int, residual: Tensor) -> None:
        """Go on behind `layer`, with the rows that `residual` was [rows, H] then, of the text and its copies."""
        assert self.layer == -1 and len(residual) <= self._room, (self.layer, residual.shape)
        self.layer, self._rows = layer, len(residual)
        self.residual.copy_(residual)

    def _make(self, wanted: dict[str, tuple[int, torch.dtype]]) -> None:
        """Buffers of that shape, those that are there already as they are."""
        for name in self._whole.keys() - wanted.keys() - {"residual"}:
            del self._whole[name]
        for name, (width, dtype) in wanted.items():
            there = self._whole.get(name)
            if there is None or there.shape[1] != width or there.dtype != dtype:
                self._whole.pop(name, None)
                del there
                self._whole[name] = torch.empty(self._room, width, dtype=dtype)

    def _run(self, program: tuple[Op, ...]) -> None:
        """Ops between two Experts, sequence by sequence."""
        weights, needed = LayerWeights.read(self._source, program), live(program)
        products = Products(SEQUENCES * self._length) if self._measure else None
        for begin in range(0, self._rows, SEQUENCES * self._length):
            end = min(self._rows, begin + SEQUENCES * self._length)

            def run_one(start: int, begin: int = begin) -> dict[str, float]:
                return self._sequence(program, weights, needed, start, products, start - begin)

            energies = list(self._map(run_one, range(begin, end, self._length)))
            if products is not None:
                products.add_batch(end - begin, energies, self._pool)
        if products is not None:
            self.dense_inputs |= products.inputs()

    def _sequence(self, program: Sequence[Op], weights: LayerWeights, needed: Collection[str], start: int,
                  products: Products | None, inside: int) -> dict[str, float]:
        """One sequence, whose first row is `start` and in its batch `inside`: the energies of its products."""
        energies: dict[str, float] = {}

        def seen(names: tuple[str, ...], x: Tensor, outs: list[Tensor]) -> None:
            assert products is not None
            energies.update(products.keep(inside, names, x, outs))

        here = slice(start, start + self._length)
        whole = {"residual": self.residual, **self.live}
        buffers = {name: whole[name][here] for name in needed}
        written = {name for op in program for name in op.outputs} & whole.keys()
        cache = SessionCache(self.model, self._length, only=(self.layer,))
        run_ops(self.model, program, weights if products is None else weights.watched(seen), buffers,
                [Span(cache, 0, 0, self._length)], written)
        for name in written:
            found, out = buffers[name], whole[name][here]
            if found.data_ptr() != out.data_ptr():
                out.copy_(found)
        return energies

    def expert(self, key: ExpertKey, w13: Tensor, w2: Tensor, measure: bool, first: int = 0,
               watch: Watch | None = None) -> dict[str, Inputs]:
        """Add what an expert of the current layer gives to the tokens that were sent to it, or to the `first` ones
        where there are so many; w13 [2F, H], w2 [H, F] of the checkpoint. With `measure` the inputs of both, {"w13",
        "w2"}. watch: sees what every product read, chunk by chunk."""
        assert key.layer == self.layer and self.pieces.experts is not None, (key, self.layer)
        hidden, inner = w2.shape
        rows, rank = (self.ids[:first or None] == key.expert).nonzero(as_tuple=True)
        biases = self._source.expert_biases(key)
        moments = (Moments(hidden), Moments(inner)) if measure and len(rows) else None
        energy = {"w13": 0.0, "w2": 0.0}
        for token, weight in zip(rows.split(CHUNK), self.topk_weights[rows, rank].split(CHUNK), strict=True):
            x = self.normed[token].float()
            middle, out, found = self.one_chunk(x, w13, w2, biases, measure)
            for name, value in found.items():
                energy[name] += value
            if watch is not None:
                watch(token, x, middle, out)
            self.add(token, out.mul_(weight[:, None]))
            if moments is not None:
                moments[0].add(x, self._pool)
                moments[1].add(middle, self._pool)
        if moments is None:
            return {}
        return {name: Inputs(Sums(m), len(rows), energy[name]) for name, m in zip(energy, moments, strict=True)}

    def one_chunk(self, x: Tensor, w13: Tensor, w2: Tensor, biases: tuple[Tensor, Tensor] | None, measure: bool,
                  decode: Callable[[Tensor], Tensor] = Tensor.float) -> tuple[Tensor, Tensor, dict[str, float]]:
        """An expert on x [n, H] fp32: (what w2 reads [n, F], what it gives [n, H], energies: of the products alone,
        since no code changes a bias). decode: makes fp32 of some rows of a matrix."""
        assert self.pieces.experts is not None
        hidden, inner = w2.shape
        activation = self.pieces.experts.activation
        middle, out = torch.empty(len(x), inner), torch.empty(len(x), hidden)

        def widen(rows: slice) -> float:
            gate, up = (F.linear(x, decode(w[rows])) for w in (w13[:inner], w13[inner:]))
            found = squares(gate) + squares(up) if measure else 0.0
            if biases is not None:
                gate, up = gate.add_(biases[0][:inner][rows]), up.add_(biases[0][inner:][rows])
            middle[:, rows] = torch_ops.activate(activation, gate, up)
            return found

        def narrow(rows: slice) -> float:
            y = F.linear(middle, decode(w2[rows]))
            out[:, rows] = y if biases is None else y + biases[1][rows]
            return squares(y) if measure else 0.0

        of_w13, of_w2 = sum(self._map(widen, _ranges(inner))), sum(self._map(narrow, _ranges(hidden)))
        return middle, out, {"w13": of_w13, "w2": of_w2}

    def add(self, token: Tensor, out: Tensor, first: int = 0) -> None:
        """Add out [n, H], weighed, to rows `token`, counted from `first`, of what this layer's experts give."""
        name = self.pieces.sums_up
        (self.residual if name == "residual" else self.live[name])[first:].index_add_(0, token, out)

    def count(self, expert: int) -> int:
        """Tokens that the current layer sends to an expert."""
        return int((self.ids == expert).sum())

    def head(self, weight: Tensor) -> Inputs:
        """The inputs of the head [V, H], after the last layer."""
        self.leave()
        energy, moments = 0.0, Moments(self.model.hidden)
        for begin in range(0, self._rows, CHUNK):
            x = self.final(slice(begin, begin + CHUNK))

            def multiply(rows: slice, x: Tensor = x) -> float:
                return squares(F.linear(x, weight[rows].float()))

            energy += sum(self._map(multiply, _ranges(len(weight))))
            moments.add(x, self._pool)
        return Inputs(Sums(moments), self._rows, energy)

    def final(self, rows: slice) -> Tensor:
        """The normed residual that the head reads, after the last layer."""
        assert self.layer == self.model.num_layers - 1 and not self.pieces.after
        norm, head = head_program(self.model)
        found = {"residual": self.residual[rows]}
        run_ops(self.model, (norm,), LayerWeights.read(self._source, (norm,)), found, (), set(head.inputs))
        return found[head.inputs[0]]

    def _check_finite(self) -> None:
        if not math.isfinite(self.residual.sum().item()):
            raise QmixError(f"layer {self.layer}: the calibration text leads to an inf or NaN",
                            "the model overflows on it: take another text, or fetch the checkpoint again")

    def _map(self, task: Callable[[Item], Found], items: Iterable[Item]) -> Iterable[Found]:
        return (map if self._pool is None else self._pool.map)(task, items)


def compute_dtype(model: Model) -> torch.dtype:
    """What the model computes in, to which the experts' inputs are rounded."""
    return torch.float32 if model.dtype == "float32" else torch.bfloat16


def _ranges(count: int) -> list[slice]:
    return [slice(i, min(count, i + ROWS)) for i in range(0, count, ROWS)]

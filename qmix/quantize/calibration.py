"""The inputs that the matrices of a model get when it reads a text: the original model's forward pass, layer by layer,
straight from the checkpoint.

    forward = ForwardPass(checkpoint, calibration, pool)
    for each layer:
        forward.attention(layer)                    # and its router
        for each expert:
            forward.expert(key, w13, w2, measure)   # -> the inputs of w13 and of w2, summed up

Only the data of one layer is held. The residual of all tokens stays between layers, and so does each layer's normed
copy of it, which the experts read. The weights are the original's throughout, not the quantized ones, so the result
depends neither on the format nor on where an interrupted run continues.

Memory with 65536 tokens at Mixtral's width: residual 1 GiB fp32, normed copy 0.5 GiB bf16; attention's weights of
one layer 160 MiB fp32; the sums over the inputs of one expert 64 + 784 MiB. Together 2.5 GiB, beside the buffers of
the stream (two experts, 0.7 GiB) and a strip for each worker (gptq.py).

Everything is computed in fp32, the router in fp64, in pieces whose size depends on shapes only, each by one thread:
no bit depends on the number of threads.

S sequences of L tokens, T = S * L in all; n of them sent to an expert; H hidden, F expert inner, E experts, K chosen,
D head size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix import names
from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey
from qmix.errors import CheckpointError, QmixError, UsageError
from qmix.kernels.attend import attend, rotation
from qmix.kernels.layer import TORCH, rms_norm, rotate
from qmix.kernels.router import router_logits
from qmix.quantize.gptq import Factor, Moments
from qmix.store import CalibrationEntry

LENGTH = 512  # tokens of a sequence
TOKENS = 65536  # of all of them, unless asked for otherwise
CHUNK = 1024  # tokens that go through an expert at a time
SEQUENCES = 8  # that go through attention at a time
Item = TypeVar("Item")
Found = TypeVar("Found")
ROWS = 512  # rows of a weight that one task widens to fp32 and multiplies


@dataclass(frozen=True, slots=True)
class Calibration:
    """A text to calibrate on. ids: int64 [S, L], each row beginning as a text of its own does."""

    ids: Tensor

    @classmethod
    def cut(cls, head: Sequence[int], ids: Sequence[int], tokens: int, most: int) -> Calibration:
        """Cut `ids`, a text, into sequences of up to 512 tokens (or `most`, where the model takes no more), `head` in
        front of each: as many as make `tokens`, spread evenly over the text, or all that it gives. The rest of a text
        that fills no whole sequence is left out, unless there is no other.

        head [1], ids 2..9, length 4: [1 2 3 4], [1 5 6 7]; UsageError for a text without tokens.
        """
        length = min(LENGTH, most, max(len(head) + 1, tokens), len(head) + len(ids))
        body = length - len(head)
        if body < 1 or not ids:
            raise UsageError("the calibration text has no tokens", "name a longer one with --calibration")
        there = len(ids) // body
        count = min(there, max(1, tokens // length))
        starts = [there * i // count * body for i in range(count)]
        return cls(torch.tensor([[*head, *ids[start:start + body]] for start in starts]))

    def part(self, tokens: int) -> Calibration:
        """So many tokens of it, in whole sequences (one at least) spread evenly; all where it has no more."""
        count = max(1, min(len(self.ids), tokens // self.length))
        return Calibration(self.ids[torch.arange(count) * len(self.ids) // count])

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def entry(self) -> CalibrationEntry:
        """What the manifest says of it."""
        return CalibrationEntry(self.tokens, self.length, self.digest)

    @property
    def digest(self) -> str:
        """Hex digest of the ids and their cut."""
        text = repr((tuple(self.ids.shape), self.ids.flatten().tolist()))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Inputs:
    """What a matrix was given. count: inputs, n; energy: sum of its squared outputs, |X W^T|^2. Those of matrices that
    read the same share `sums`."""

    def __init__(self, sums: Sums, count: int, energy: float):
        self._sums = sums
        self.count = count
        self.energy = energy

    def factor(self, pool: Executor | None) -> Factor:
        """S of the inputs, damped and factored, in the memory of their sums; DegenerateInputs where all were zero."""
        return self._sums.factor(pool)


class Sums:
    """Moments until the first one asks for their factor."""

    def __init__(self, moments: Moments):
        self._now: Moments | Factor = moments

    def factor(self, pool: Executor | None) -> Factor:
        if isinstance(self._now, Moments):
            self._now = self._now.factor(pool)
        return self._now


class ForwardPass:
    """The original model on the calibration's tokens. residual, normed [T, H]; ids, gains [T, K]: what the router of
    the current layer chose, and its weights. layer: the one that attention was last computed of, -1 before."""

    def __init__(self, source: Checkpoint, calibration: Calibration, pool: Executor | None = None):
        config, tokens = source.config, calibration.tokens
        if (worst := int(calibration.ids.max())) >= config.vocab_size:
            raise UsageError(f"the calibration has token {worst}, the model {config.vocab_size}")
        self._source, self._config, self._pool = source, config, pool
        self._length = calibration.length
        self._inverse = rotation(config.head_dim, config.rope_theta)
        self.layer = -1
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16  # what the model computes in
        self.residual = torch.empty(tokens, config.hidden_size)
        self.normed = torch.empty(tokens, config.hidden_size, dtype=dtype)
        self.ids = torch.empty(tokens, config.experts_per_token, dtype=torch.int64)
        self.gains = torch.empty(tokens, config.experts_per_token)
        embedding = source.dense(names.EMBEDDING)
        for chunk, out in zip(calibration.ids.flatten().split(CHUNK), self.residual.split(CHUNK), strict=True):
            out.copy_(F.embedding(chunk, embedding))

    def attention(self, layer: int, measure: bool = False) -> dict[str, Inputs]:
        """Attention of the next layer, added to the residual, and its router. With `measure` the inputs of its
        matrices by name: {"q_proj", "k_proj", "v_proj"} share theirs, "o_proj" has its own."""
        assert layer == self.layer + 1, (layer, self.layer)
        self.layer = layer
        config, length = self._config, self._length
        weights = _LayerWeights.read(self._source, layer)
        cos, sin = TORCH.angles(torch.arange(length), self._inverse)
        step = SEQUENCES * length
        asked, given = torch.empty(step, config.hidden_size), torch.empty(step, config.num_heads * config.head_dim)
        moments = (Moments(asked.shape[1]), Moments(given.shape[1])) if measure else None
        energy = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 0.0)
        for begin in range(0, len(self.residual), step):
            end = min(len(self.residual), begin + step)

            def attend_one(start: int, begin: int = begin) -> dict[str, float]:
                here, inside = slice(start, start + length), slice(start - begin, start - begin + length)
                return self._attend(weights, here, cos, sin, asked[inside], given[inside], measure)

            for found in self._map(attend_one, range(begin, end, length)):
                for name, value in found.items():
                    energy[name] += value
            if moments is not None:
                moments[0].add(asked[:end - begin], self._pool)
                moments[1].add(given[:end - begin], self._pool)
        if not math.isfinite(self.residual.sum().item()):
            raise QmixError(f"layer {layer}: the calibration text leads to an inf or NaN",
                            "the model overflows on it: take another text, or fetch the checkpoint again")
        if moments is None:
            return {}
        shared, own = (Sums(m) for m in moments)
        return {name: Inputs(own if name == "o_proj" else shared, len(self.residual), value)
                for name, value in energy.items()}

    def _attend(self, weights: _LayerWeights, here: slice, cos: Tensor, sin: Tensor, asked: Tensor, given: Tensor,
                measure: bool) -> dict[str, float]:
        """One sequence: attention and router. asked, given: what q, k, v read and what o reads, filled."""
        config, residual = self._config, self.residual[here]
        asked.copy_(rms_norm(residual, weights.input_norm, config.rms_norm_eps))
        q, k, v = (F.linear(asked, weights.linear[name]) for name in ("q_proj", "k_proj", "v_proj"))
        energy = {"q_proj": _squares(q), "k_proj": _squares(k), "v_proj": _squares(v)} if measure else {}
        queries, keys = (rotate(x.view(len(x), -1, config.head_dim), cos, sin) for x in (q, k))
        values = v.view(len(v), -1, config.head_dim)
        given.copy_(attend(queries, keys.transpose(0, 1), values.transpose(0, 1), config.sliding_window))
        out = F.linear(given, weights.linear["o_proj"])
        if measure:
            energy["o_proj"] = _squares(out)
        residual.add_(out)
        normed = rms_norm(residual, weights.post_norm, config.rms_norm_eps)
        top, chosen = router_logits(normed, weights.router).topk(config.experts_per_token)
        self.gains[here] = torch.softmax(top, -1)
        self.ids[here] = chosen
        self.normed[here] = normed
        return energy

    def expert(self, key: ExpertKey, w13: Tensor, w2: Tensor, measure: bool, first: int = 0,
               ) -> dict[str, Inputs]:
        """Add what an expert of the current layer gives to the residual of the tokens that were sent to it, or of the
        `first` ones where there are so many; w13 [2F, H], w2 [H, F] of the checkpoint. With `measure` the inputs of
        both, {"w13", "w2"}."""
        assert key.layer == self.layer, (key, self.layer)
        hidden, inner = w2.shape
        rows, rank = (self.ids[:first or None] == key.expert).nonzero(as_tuple=True)
        moments = (Moments(hidden), Moments(inner)) if measure and len(rows) else None
        energy = {"w13": 0.0, "w2": 0.0}
        for token, gain in zip(rows.split(CHUNK), self.gains[rows, rank].split(CHUNK), strict=True):
            x, middle, out = self.normed[token].float(), torch.empty(len(token), inner), torch.empty(len(token), hidden)

            def widen(cut: slice, x: Tensor = x, middle: Tensor = middle) -> float:
                gate, up = (F.linear(x, w[cut].float()) for w in (w13[:inner], w13[inner:]))
                squares = _squares(gate) + _squares(up) if measure else 0.0
                torch.mul(F.silu(gate, inplace=True), up, out=middle[:, cut])
                return squares

            def narrow(cut: slice, middle: Tensor = middle, out: Tensor = out) -> float:
                y = F.linear(middle, w2[cut].float())
                out[:, cut] = y
                return _squares(y) if measure else 0.0

            energy["w13"] += sum(self._map(widen, _cuts(inner)))
            energy["w2"] += sum(self._map(narrow, _cuts(hidden)))
            self.residual.index_add_(0, token, out.mul_(gain[:, None]))
            if moments is not None:
                moments[0].add(x, self._pool)
                moments[1].add(middle, self._pool)
        if moments is None:
            return {}
        return {name: Inputs(Sums(m), len(rows), energy[name]) for name, m in zip(energy, moments, strict=True)}

    def count(self, expert: int) -> int:
        """Tokens that the current layer's router sends to an expert."""
        return int((self.ids == expert).sum())

    def head(self, weight: Tensor) -> Inputs:
        """The inputs of the head [V, H], after the last layer."""
        assert self.layer == self._config.num_layers - 1
        energy, moments = 0.0, Moments(self._config.hidden_size)
        for begin in range(0, len(self.residual), CHUNK):
            x = self.final(slice(begin, begin + CHUNK))

            def multiply(cut: slice, x: Tensor = x) -> float:
                return _squares(F.linear(x, weight[cut].float()))

            energy += sum(self._map(multiply, _cuts(len(weight))))
            moments.add(x, self._pool)
        return Inputs(Sums(moments), len(self.residual), energy)

    def final(self, rows: slice) -> Tensor:
        """The normed residual that the head reads."""
        return rms_norm(self.residual[rows], self._source.dense(names.FINAL_NORM).float(), self._config.rms_norm_eps)

    def _map(self, task: Callable[[Item], Found], items: Iterable[Item]) -> Iterable[Found]:
        return (map if self._pool is None else self._pool.map)(task, items)


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    """The dense weights of a layer, fp32, the router fp64."""

    input_norm: Tensor
    linear: Mapping[str, Tensor]
    post_norm: Tensor
    router: Tensor

    @classmethod
    def read(cls, source: Checkpoint, layer: int) -> _LayerWeights:
        def read(name: str) -> Tensor:
            full = f"{names.layer_prefix(layer)}{name}.weight"
            tensor = source.dense(full)
            if not math.isfinite(tensor.sum().item()):
                raise CheckpointError(f"{source.path}: {full} holds an inf or NaN",
                                      "no working model has such a weight: fetch the checkpoint again")
            return tensor.float()

        linear = {name: read(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        return cls(read("input_layernorm"), linear, read("post_attention_layernorm"),
                   read("block_sparse_moe.gate").double())


def _squares(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


def _cuts(count: int) -> list[slice]:
    return [slice(i, min(count, i + ROWS)) for i in range(0, count, ROWS)]

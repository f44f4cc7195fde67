"""The reference of every Op (ops.py), in torch: one function each.

A function takes its Op, `Weights`, and the buffers that the Op reads, in order; it returns the buffers that the Op
writes, in order: one tensor, or a tuple of them. Sums are fp32, those of routers and other exact Linears fp64. Up to 8
rows get the bits that each gets alone. Those with a state (Attend, Conv, Delta) get the tokens of one session and the
state of its layer; Rope gets cos and sin. Take is the runner's, and so are Experts and Combine where they are paged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.kernels import ops
from qmix.kernels.cpu import FEW, few_rows
from qmix.kernels.layer import TORCH, LayerOps, capped, rms_norm, rotate
from qmix.kernels.router import RouterTensors, choose_experts, router_logits
from qmix.spec import Activation
from qmix.spec import Norm as NormSpec
from qmix.spec import Tensor as Named


class Weights(Protocol):
    """A model's dense weights by canonical name. dtype: "compute", what the model computes in. PlainWeights has the
    meaning of each method."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, name: str) -> Tensor: ...

    def rows(self, name: str, tokens: Tensor) -> Tensor: ...

    def linears(self, x: Tensor, *names: str) -> list[Tensor]: ...

    def exact(self, x: Tensor, name: str) -> Tensor: ...

    def norm(self, weight: Named | None, spec: NormSpec) -> Tensor | None: ...

    def vector(self, weight: Named | None) -> Tensor | None: ...

    def taps(self, weight: Named) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PlainWeights:
    """All of them plain tensors, as a checkpoint has them."""

    tensors: Mapping[str, Tensor]
    dtype: torch.dtype = torch.float32

    def __getitem__(self, name: str) -> Tensor:
        """One that is no matrix of a product: a_log."""
        return self.tensors[name]

    def rows(self, name: str, tokens: Tensor) -> Tensor:
        """Those of an embedding [V, H] for tokens [T]: fp32 [T, H]."""
        return F.embedding(tokens, self.tensors[name]).float()

    def linears(self, x: Tensor, *names: str) -> list[Tensor]:
        """x [T, M], compute or fp32, times the transpose of each [N, M]: [T, N]. x is rounded to compute where the
        product takes nothing else; a result has the dtype of what the product took."""
        x = x.to(self.dtype)
        return [plain_linear(x, self.tensors[name]) for name in names]

    def exact(self, x: Tensor, name: str) -> Tensor:
        """The same summed in fp64, of a weight as it is stored: fp32 [T, N]; x fp32."""
        return router_logits(x.float(), self.tensors[name])

    def norm(self, weight: Named | None, spec: NormSpec) -> Tensor | None:
        """What a norm multiplies by, fp32; None for 1."""
        found = self.vector(weight)
        return None if found is None else spec.multiplier(found)

    def vector(self, weight: Named | None) -> Tensor | None:
        """A bias, sinks or the like, fp32."""
        return None if weight is None else self.tensors[weight.name].float()

    def taps(self, weight: Named) -> Tensor:
        """Of a convolution, [J, C] fp32."""
        return taps_of(self.tensors[weight.name])


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, M] times the transpose of weight [N, M], in x's dtype; rows of up to FEW do not depend on each other."""
    weight = weight.to(x.dtype)
    return few_rows(x, weight) if 1 < len(x) <= FEW else F.linear(x, weight)


def embed(op: ops.Embed, w: Weights, tokens: Tensor) -> Tensor:
    rows = w.rows(op.weight.name, tokens)
    return rows if op.scale == 1 else rows * op.scale


def norm(op: ops.Norm, w: Weights, source: Tensor) -> Tensor | tuple[Tensor, ...]:
    wide = rms_norm(source.float(), w.norm(op.weight, op.norm), op.norm.eps)
    if op.out is None:
        return wide
    return wide.to(w.dtype) if op.wide is None else (wide.to(w.dtype), wide)


def linear(op: ops.Linear, w: Weights, source: Tensor) -> Tensor:
    return linears((op,), w, source)[0]


def linears(group: Sequence[ops.Linear], w: Weights, source: Tensor) -> tuple[Tensor, ...]:
    """Of Linears that read the same; those that are not exact in one call."""
    together = iter(w.linears(source, *names) if (names := [op.weight.name for op in group if not op.exact]) else [])
    found = [w.exact(source, op.weight.name) if op.exact else next(together) for op in group]
    return tuple(biased(out, w.vector(op.bias)) for op, out in zip(group, found, strict=True))


def biased(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else (out.float() + bias).to(out.dtype)


def join(op: ops.Join, w: Weights, first: Tensor, second: Tensor) -> Tensor:
    return w.linears(torch.cat((first, second), 1), op.weight.name)[0].float()


def head_norm(op: ops.HeadNorm, w: Weights, buffer: Tensor) -> Tensor:
    x = buffer.float()
    if op.norm is not None:
        x = rms_norm(x.view(len(x), -1, op.size), w.norm(op.weight, op.norm), op.norm.eps).view(x.shape)
    return x if op.clip is None else x.clamp(-op.clip, op.clip)


def rope_cos_sin(positions: Tensor, inv_freq: Tensor, factor: float, layer: LayerOps = TORCH) -> tuple[Tensor, Tensor]:
    """What `rope` rotates by, fp32 [T, 1, D], of positions [T]."""
    return layer.rope_cos_sin(positions, inv_freq, factor)


def rope(op: ops.Rope, cos: Tensor, sin: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
    size, dim = op.head_dim, op.rope.dim
    found = []
    for buffer in buffers:
        heads = buffer.reshape(len(buffer), -1, size).float()
        heads = heads.clone() if heads.data_ptr() == buffer.data_ptr() else heads
        turned = rotate(heads[..., :dim], cos, sin)
        found.append(turned if dim == size else torch.cat((turned, heads[..., dim:]), -1))
    return tuple(found)


def gate(op: ops.Gate, w: Weights, buffer: Tensor, by: Tensor) -> Tensor:
    return TORCH.gate(buffer, by, op.kind)


def conv(op: ops.Conv, w: Weights, past: Tensor, *sources: Tensor, layer: LayerOps = TORCH,
         ) -> tuple[tuple[Tensor, ...], Tensor]:
    """(what Conv writes, the rows that stay); past [J - 1, C]: those that stayed before."""
    return layer.conv(w.taps(op.weight), past, *sources)


def taps_of(weight: Tensor) -> Tensor:
    """[C, J], as a checkpoint has them, as [J, C] fp32."""
    return weight.float().T.contiguous()


def delta(op: ops.Delta, w: Weights, state: Tensor, *rows: Tensor, layer: LayerOps = TORCH) -> tuple[Tensor, Tensor]:
    """(what Delta writes, the state after it); state [value_heads, key_dim, value_dim]. Up to FEW tokens one by one,
    with the bits of each alone; more in chunks (delta_rule.py has the bound)."""
    return layer.delta(op.delta, w[op.a_log.name].float(), w[op.dt_bias.name].float(), state, *rows)


def route(op: ops.Route, w: Weights, source: Tensor) -> tuple[Tensor, Tensor]:
    return choose_experts(w.exact(source, op.weight.name), router_of(op, w), op.router.top_k)


def router_of(op: ops.Route, w: Weights) -> RouterTensors:
    return RouterTensors(op.router, w[op.weight.name], w.vector(op.logit_bias), w.vector(op.choice_bias),
                         w.vector(op.expert_scale))


def guess(op: ops.Guess, w: Weights, source: Tensor) -> Tensor:
    found = choose_experts(w.exact(guess_input(op, w, source), op.route.weight.name), router_of(op.route, w), op.count)
    return found[0]


def guess_input(op: ops.Guess, w: Weights, source: Tensor) -> Tensor:
    """What the later router would read now, fp32."""
    buffers = {op.source: source}
    for step in op.steps:
        assert isinstance(step, ops.Norm | ops.Scale), step
        found = norm(step, w, buffers[step.source]) if isinstance(step, ops.Norm) else scale(
            step, w, buffers[step.buffer])
        assert isinstance(found, Tensor), step
        buffers[step.outputs[0]] = found
    return buffers[op.route.source]


def activate(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """What joins gate and up [T, F], by spec.Activation; fp32."""
    return TORCH.activate(activation, gate, up)


def mlp(op: ops.Mlp, w: Weights, source: Tensor, layer: LayerOps = TORCH) -> Tensor:
    gate, up = w.linears(source, op.gate.name, op.up.name)
    return w.linears(layer.activate(op.activation, gate, up), op.down.name)[0].float()


def experts(op: ops.Experts, w: Weights, source: Tensor, ids: Tensor) -> Tensor:
    """Of experts that lie in memory, each once for all its tokens."""
    rows = torch.empty(len(source), op.top_k, op.hidden)
    for expert in ids.unique().tolist():
        token, rank = (ids == expert).nonzero(as_tuple=True)
        name = f"layers.{op.layer}.experts.{expert}."

        def multiply(x: Tensor, part: str, name: str = name) -> Tensor:
            out = w.linears(x, name + part)[0].float()
            return out + w[f"{name}{part}_bias"].float() if op.bias else out

        x = source[token]
        rows[token, rank] = multiply(activate(op.activation, multiply(x, "gate"), multiply(x, "up")), "down")
    return rows


def combine(op: ops.Combine, w: Weights, rows: Tensor, topk_weights: Tensor | None = None) -> Tensor:
    return TORCH.combine(rows, rows.new_ones(rows.shape[:2]) if topk_weights is None else topk_weights)


def add(op: ops.Add, w: Weights, buffer: Tensor, source: Tensor) -> Tensor:
    return buffer.add_(source)


def scale(op: ops.Scale, w: Weights, buffer: Tensor) -> Tensor:
    weight = w.vector(op.weight)
    found = buffer if weight is None else buffer * weight
    return found if op.factor == 1 else found * op.factor


def head(op: ops.Head, w: Weights, source: Tensor) -> Tensor:
    logits = w.linears(source, op.weight.name)[0].float()
    return logits if op.softcap is None else capped(logits, op.softcap)

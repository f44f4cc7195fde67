"""What a layer does to a few tokens beside products and attention, in torch, and which code does it in this process.

Norm, router and rotation take and give fp32 whatever the compute dtype.
T tokens, H hidden, E experts, K chosen, F inner size of an MLP, Q query heads, KV key-value heads, D head size,
R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.kernels import delta_rule, native
from qmix.kernels.op import FEW
from qmix.kernels.router import RouterTensors, choose_experts, router_logits
from qmix.spec import Activation, DeltaNet, Norm, Router


class LayerOps(Protocol):
    """TorchLayerOps has the meaning of each."""

    name: str

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor: ...

    def head_norm(self, x: Tensor, size: int, weight: Tensor | None, eps: float | None,
                  clip: float | None = None) -> Tensor: ...

    def route(self, x: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None, normed: Tensor | None,
              ids: Tensor, topk_weights: Tensor) -> None: ...

    def guess(self, x: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None,
              ids: Tensor) -> None: ...

    def rope_cos_sin(self, positions: Tensor, inv_freq: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]: ...

    def rotate(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor,
               head_dim: int | None = None) -> tuple[Tensor, Tensor]: ...

    def combine(self, rows: Tensor, topk_weights: Tensor) -> Tensor: ...

    def activate(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor: ...

    def exact(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def gate(self, x: Tensor, by: Tensor, kind: str) -> Tensor: ...

    def conv(self, taps: Tensor, past: Tensor, *sources: Tensor) -> tuple[tuple[Tensor, ...], Tensor]: ...

    def delta(self, spec: DeltaNet, a_log: Tensor, dt_bias: Tensor, state: Tensor, *rows: Tensor,
              ) -> tuple[Tensor, Tensor]: ...


class TorchLayerOps:
    """For any number of tokens. Of up to 8 each gets the bits that it gets alone."""

    name = "torch"

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, in fp32: x [T, H] fp32 or bf16, weight [H] fp32, None for 1 -> [T, H] of
        `dtype`."""
        return rms_norm(x.float(), weight, eps).to(dtype)

    def head_norm(self, x: Tensor, size: int, weight: Tensor | None, eps: float | None,
                  clip: float | None = None) -> Tensor:
        """Each `size` neighbours of x [T, N] fp32 or bf16 normed by themselves, weight [size] fp32 or None for 1, then
        clamped to [-clip, clip]; eps None: only clamped -> [T, N] fp32."""
        wide = x.float()
        if eps is not None:
            wide = rms_norm(wide.reshape(len(x), -1, size), weight, eps).view(x.shape)
        return wide if clip is None else wide.clamp(-clip, clip)

    def route(self, x: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None, normed: Tensor | None,
              ids: Tensor, topk_weights: Tensor) -> None:
        """norm(x) into normed [T, H]; the K experts that `router` chooses by logits of norm(x) into ids [T, K] int64,
        the best first; their weights, in fp32, into topk_weights [T, K]. eps None: x [T, H] fp32 is normed already,
        and weight and normed are None."""
        wide = x if eps is None else rms_norm(x, weight, eps)
        chosen, found = choose_experts(router_logits(wide, router.weight), router, ids.shape[1])
        ids.copy_(chosen)
        topk_weights.copy_(found)
        if normed is not None:
            normed.copy_(wide)

    def guess(self, x: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None, ids: Tensor) -> None:
        """What `route` would put into ids: the router of a later layer, asked now."""
        wide = x if eps is None else rms_norm(x, weight, eps)
        ids.copy_(choose_experts(router_logits(wide, router.weight), router, ids.shape[1])[0])

    def rope_cos_sin(self, positions: Tensor, inv_freq: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """What rotates heads at `positions` [T]: (cos, signed sin), fp32 [T, 1, R], of position * inv_freq [R / 2], in
        fp32 as transformers has it, times the attention factor (kernels/rope.py). The cosine goes through fp64, so that
        its last bit does not depend on how many positions are computed together."""
        angles = (positions[:, None, None].float() * inv_freq).double()
        cos, sin = angles.cos().float() * factor, angles.sin().float() * factor
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def rotate(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor,
               head_dim: int | None = None) -> tuple[Tensor, Tensor]:
        """Rotary embedding of the first R dimensions of each head: queries [T, Q * D], keys [T, KV * D]; cos, sin
        [T, 1, R] of `rope_cos_sin`; head_dim: D, None for R -> [T, Q, D] and [T, KV, D], fp32."""
        count, _, rotary = cos.shape
        size = head_dim or rotary
        heads = torch.cat((queries.float(), keys.float()), 1).view(count, -1, size)
        rotate(heads[..., :rotary], cos, sin)
        split = queries.shape[1] // size
        return heads[:, :split], heads[:, split:]

    def combine(self, rows: Tensor, topk_weights: Tensor) -> Tensor:
        """sum_k topk_weights[:, k] * rows[:, k], strictly in order: rows [T, K, H], topk_weights [T, K] -> [T, H], all
        fp32."""
        total = rows[:, 0] * topk_weights[:, 0, None]
        for rank in range(1, rows.shape[1]):
            total += rows[:, rank] * topk_weights[:, rank, None]
        return total

    def activate(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        """What joins gate and up [T, F], fp32 or bf16, by spec.Activation -> [T, F] fp32."""
        gate, up = gate.float(), up.float()
        by = steady if len(gate) <= FEW else _as_it_is
        if activation.kind == "swiglu":
            return by(F.silu, gate) * up
        if activation.kind == "geglu":
            return by(partial(F.gelu, approximate="tanh"), gate) * up
        assert activation.alpha is not None and activation.limit is not None
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return gate * by(torch.sigmoid, activation.alpha * gate) * (up + 1)

    def exact(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, H] times the transpose of weight [N, H] of the checkpoint's dtype, summed in fp64: [T, N] fp32."""
        return router_logits(x.float(), weight)

    def gate(self, x: Tensor, by: Tensor, kind: str) -> Tensor:
        """x [T, N] times kind(by), by [T, N] or [T, 1]; each fp32 or bf16 -> [T, N] of x's dtype."""
        return (x.float() * steady(torch.sigmoid if kind == "sigmoid" else F.silu, by)).to(x.dtype)

    def conv(self, taps: Tensor, past: Tensor, *sources: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """(what Conv writes of the sources [T, n], the rows that stay); taps [J, C] fp32, past [J - 1, C]: those that
        stayed before."""
        x = torch.cat((past, torch.cat([source.float() for source in sources], 1)))
        count = len(sources[0])
        total = x[:count] * taps[0]
        for j in range(1, len(taps)):
            total += x[j:j + count] * taps[j]
        return steady(F.silu, total).split([source.shape[1] for source in sources], 1), x[count:].clone()

    def delta(self, spec: DeltaNet, a_log: Tensor, dt_bias: Tensor, state: Tensor, *rows: Tensor,
              ) -> tuple[Tensor, Tensor]:
        """(what Delta writes, the state after it) of q, k, v, a, b [T, n]; state [value_heads, key_dim, value_dim]; all
        fp32. Up to FEW tokens go one by one, with the bits of each alone; more in chunks (delta_rule.py)."""
        q, k, v, a, b = rows
        count = len(q)
        q, k = (delta_rule.unit(x.view(count, spec.key_heads, spec.key_dim)) for x in (q, k))
        log_decay = -steady(torch.exp, a_log) * steady(F.softplus, a.float() + dt_bias)
        whole = delta_rule.Rows(q * spec.key_dim**-0.5, k, v.view(count, spec.value_heads, spec.value_dim), log_decay,
                                steady(torch.sigmoid, b))
        if count <= FEW:
            out, state = delta_rule.stepwise(whole, steady(torch.exp, log_decay), state)
        else:
            out, state = delta_rule.chunked(whole, state)
        return out.view(count, -1), state


def steady(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) in fp32, by way of fp64: torch computes what is left over from whole vectors by other code, so that
    in fp32 the last bit of a row would depend on how many rows there are."""
    return function(x.double()).float()


def capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), in place; x fp32 [T, V]."""
    x.div_(cap)
    if len(x) > FEW:
        return x.tanh_().mul_(cap)
    for row in x:  # one by one: fp64 of all of them takes more memory than a plan counts
        row.copy_(steady(torch.tanh, row))
    return x.mul_(cap)


def _as_it_is(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, fp32 (Zhang & Sennrich 2019). x [T, H]; weight [H], None for 1."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021), Hugging Face's half-split order: dimension i turns with
    i + D/2. x [T, heads, D] fp32 of any strides, overwritten and returned; cos, sin [T, 1, D] of `rope_cos_sin`.

    D = 4: (a, b, c, d) -> (a cos0 - c sin0, b cos1 - d sin1, c cos0 + a sin0, d cos1 + b sin1).
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(swapped, sin)


TORCH = TorchLayerOps()


def choose_layer_ops(say: Callable[[str], None]) -> LayerOps:
    """The native code where it is built, wanted and passes a test, else torch's."""
    for level in native.wanted_levels():
        if agrees(own := native.NativeLayerOps(level)):
            return own
        say(f"the native norm and router failed their self-test here ({level}): the next best kernel is used")
    return TORCH


def agrees(own: LayerOps) -> bool:
    """Whether `own` gives what torch gives, on random numbers, up to fp32 sums."""
    random = torch.Generator().manual_seed(6)
    x, weight, matrix = (torch.randn(*shape, generator=random) for shape in ((3, 200), (200,), (8, 200)))
    biases = torch.rand(3, 8, generator=random)
    routers = [RouterTensors(Router(8, 2), matrix),
               RouterTensors(Router(8, 2, over="all", normalize=True, logit_bias=True), matrix.half(), biases[0]),
               RouterTensors(Router(8, 2, "sigmoid", normalize=True, eps=1e-20, scale=2.5, choice_bias=True,
                                    expert_scale=True, groups=4, top_groups=2, group_score="top2"), matrix.bfloat16(),
                             None, biases[1], biases[2])]
    found = [_results(ops, x, weight, routers) for ops in (own, TORCH)]
    return all(torch.allclose(got, want, rtol=1e-5, atol=1e-6) for got, want in zip(*found, strict=True))


def _results(ops: LayerOps, x: Tensor, weight: Tensor, routers: Sequence[RouterTensors]) -> list[Tensor]:
    """What `ops` makes of x [3, 200], all of it as fp32."""
    found: list[Tensor] = []
    for router in routers:
        normed, ids, topk_weights = torch.empty(3, 200), torch.empty(3, 2, dtype=torch.int64), torch.empty(3, 2)
        ops.route(x, weight, router, 1e-5, normed, ids, topk_weights)
        guesses = torch.empty(3, 2, 3, dtype=torch.int64)[:, 1]
        ops.guess(x, None, router, None, guesses)
        found += [normed, topk_weights, ids.float(), guesses.float()]
    cos, sin = ops.rope_cos_sin(torch.tensor([0, 3, 4000]), weight[:20], 1.25)
    return [*found, cos, sin, *ops.rotate(x[:, :120], x[:, 120:160].bfloat16(), cos, sin),
            *ops.rotate(x[:, :100], x[:, 100:150], cos, sin, 50),
            ops.norm(x, weight, 1e-5, torch.float32), ops.norm(x.bfloat16(), None, 1e-5, torch.float32),
            ops.head_norm(x.bfloat16(), 40, weight[:40], 1e-5, 1.5), ops.head_norm(x, 200, None, None, 0.5),
            *_recurrent_results(ops, x, routers[0].weight.bfloat16()),
            ops.combine(x.view(3, 2, 100), weight[:6].view(3, 2)),
            *(ops.activate(by, 3 * x, 2 * x.flip(1)) for by in (
                Activation(), Activation("geglu"), Activation("swiglu_clamped", 1.702, 2.5)))]


def _recurrent_results(ops: LayerOps, x: Tensor, matrix: Tensor) -> list[Tensor]:
    """What `ops` makes of x [3, 200] in a gated delta net of 2 key heads and 4 value heads."""
    spec = DeltaNet(2, 4, 10, 15, 4, Norm(1e-5))
    sources, taps, past = x[:1, :100].bfloat16().split((20, 20, 60), 1), x[1:, :200].reshape(4, 100), x[0].view(2, 100)
    found, after = ops.conv(taps, torch.cat((past, past[:1])), *sources)
    a, b, a_log, dt_bias = x[1, :16].split(4)
    state = x.view(4, 10, 15)
    out, state = ops.delta(spec, a_log, dt_bias, state, *found, a[None], b[None])
    return [*found, after, out, state, ops.exact(x.bfloat16(), matrix), ops.gate(x, x[:, 7:8], "sigmoid"),
            ops.gate(x, x.flip(1).bfloat16(), "silu")]

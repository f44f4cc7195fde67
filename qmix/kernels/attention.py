"""Which kernel attends for one token: the native one where it is built, suits the model and passes a test; else
torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qmix.kernels import native
from qmix.kernels.attend import Softmax
from qmix.spec import Attention, Model

PLAIN = "portable"  # the level without an instruction set of its own
LENGTH, ROOM, KV_HEADS, GROUP = 600, 610, 2, 5  # the test's positions (three pieces of them), capacity and heads
SCALE, SOFTCAP = 0.2, 2.5  # of the test


def choose_native_attention(head_dim: int, kv: str, say: Callable[[str], None]) -> native.Attention | None:
    """The native kernel for a cache of `kv` ("bf16" or "int8"); None where torch attends, and a line where that is
    much slower. UsageError where QMIX_NATIVE names what is not here."""
    levels = native.wanted_levels()
    if kv != "int8":
        levels = [level for level in levels if level != PLAIN]  # torch has vectors everywhere, and takes half its time
        if not levels:
            return None
    if not levels:
        reason = "the native kernel is not in use here"
    elif head_dim % native.HEAD_UNIT:
        reason = f"the native kernel needs heads of a multiple of {native.HEAD_UNIT} numbers, not {head_dim}"
    else:
        for level in levels:
            if agrees(own := native.Attention(level), head_dim, kv):
                return own
        reason = f"the native kernel failed its self-test here ({', '.join(levels)})"
    if kv == "int8":
        say(f"int8 KV cache: {reason}, so torch decodes it for every token: slower the longer the context is")
    return None


def choose_native_attentions(model: Model, kv: str, say: Callable[[str], None]) -> dict[int, native.Attention]:
    """`choose_native_attention` for each head size of a model: {head size: kernel}, without those for which there is
    none."""
    sizes = sorted({layer.mixer.head_dim for layer in model.layers if isinstance(layer.mixer, Attention)})
    return {size: own for size in sizes if (own := choose_native_attention(size, kv, say)) is not None}


def agrees(own: native.Attention, head_dim: int, kv: str) -> bool:
    """Whether `own` gives what fp64 gives on a small random cache, over a part of its positions, up to fp32 sums; also
    with sinks, a scale and a cap."""
    random = torch.Generator().manual_seed(4)
    q = torch.randn(1, KV_HEADS * GROUP, head_dim, generator=random)
    new = torch.randn(2, 1, KV_HEADS, head_dim, generator=random).bfloat16()
    if kv == "int8":
        keys, values = torch.randint(-127, 128, (2, KV_HEADS, ROOM, head_dim), generator=random).to(torch.int8)
        scales = torch.rand(2, KV_HEADS, ROOM, generator=random) / 64
        kv_layer = native.KVLayer(keys, values, scales[0].contiguous(), scales[1].contiguous())
    else:
        keys, values = torch.randn(2, KV_HEADS, ROOM, head_dim, generator=random).bfloat16()
        kv_layer = native.KVLayer(keys, values)
    begin, end = 3, LENGTH
    sinks = torch.randn(KV_HEADS * GROUP, generator=random)
    got = [own.append(kv_layer, q, new[0], new[1], begin, end, softmax).view(KV_HEADS, GROUP, head_dim).double()
           for softmax in (Softmax(), Softmax(sinks, SCALE, SOFTCAP))]
    wide = [_decoded(codes, scales)[:, begin:end] for codes, scales in (
        (kv_layer.keys, kv_layer.key_scales), (kv_layer.values, kv_layer.value_scales))]
    scores = q.view(KV_HEADS, GROUP, head_dim).double() @ wide[0].mT
    capped = torch.cat((SOFTCAP * (scores * SCALE / SOFTCAP).tanh(), sinks.double().view(KV_HEADS, GROUP, 1)), -1)
    want = [(scores / head_dim**0.5).softmax(-1) @ wide[1], capped.softmax(-1)[..., :-1] @ wide[1]]
    new_cached = torch.stack([wide[0][:, -1], wide[1][:, -1]])
    off = (new_cached - new[:, 0].double()).abs().amax() / new.double().abs().amax()
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(got, want, strict=True)) and bool(off <= 1 / 127)


def _decoded(codes: Tensor, scales: Tensor | None) -> Tensor:
    return codes.double() if scales is None else codes.double() * scales.double()[..., None]

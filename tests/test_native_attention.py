"""The native attention of one token over many positions: its pieces, at every level that this processor has.

Sums are fp32: the result is held to float64 on the same numbers to 1e-5, as over a few positions (test_kv_int8.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from bounds import FP32
from torch import Tensor

from qmix.kernels import native
from qmix.kernels.attend import PLAIN, Softmax
from qmix.kernels.attention import agrees
from qmix.kernels.native import Attention, KVLayer

LEVELS = list(native.levels())
pytestmark = pytest.mark.skipif(not LEVELS, reason="the native kernels were not built: no C compiler")
# A piece has 256 positions or more, and there are at most 32 of them (native.c).
LENGTHS = [255, 256, 257, 511, 513, 8191, 8192, 8193, 9000, 16385]


def cache(kv: str, kv_heads: int, capacity: int, size: int) -> KVLayer:
    random = torch.Generator().manual_seed(capacity + size)
    shape = (2, kv_heads, capacity, size)
    if kv == "int8":
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)
        return KVLayer(*codes, *torch.rand(2, kv_heads, capacity, generator=random) / 64)
    return KVLayer(*torch.randn(shape, generator=random).bfloat16())


def decoded(layer: KVLayer) -> tuple[Tensor, Tensor]:
    """Keys and values [KV, S, D] in fp64."""
    if layer.key_scales is None or layer.value_scales is None:
        return layer.keys.double(), layer.values.double()
    return layer.keys * layer.key_scales.double()[..., None], layer.values * layer.value_scales.double()[..., None]


def new_token(kv_heads: int, group: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, Q, D], keys and values [1, KV, D]"""
    random = torch.Generator().manual_seed(group)
    return (torch.randn(1, kv_heads * group, size, generator=random),
            *torch.randn(2, 1, kv_heads, size, generator=random))


def want(layer: KVLayer, q: Tensor, begin: int, end: int) -> Tensor:
    keys, values = (t[:, begin:end] for t in decoded(layer))
    grouped = q.double().view(len(keys), -1, q.shape[2])
    return ((grouped @ keys.mT / q.shape[2]**0.5).softmax(-1) @ values).view(1, -1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("length", LENGTHS)
def test_many_positions_against_float64(level: str, kv: str, length: int) -> None:
    """Windows that begin anywhere, and each number of query heads that go through a chunk together."""
    for kv_heads, group, size, begin in ((1, 1, 16, 0), (2, 2, 48, 5), (1, 3, 32, 70), (1, 6, 80, 300), (2, 4, 128, 1)):
        own, layer = Attention(level), cache(kv, kv_heads, begin + length + 3, size)
        own.threads = 2
        q, keys, values = new_token(kv_heads, group, size)
        got = own.append(layer, q, keys, values, begin, begin + length).double()
        wanted = want(layer, q, begin, begin + length)
        assert (got - wanted).norm() <= 1e-5 * wanted.norm(), (kv_heads, group, size)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_bits_do_not_depend_on_threads_or_on_where_the_cache_is(level: str, kv: str) -> None:
    """Also not on its capacity and the positions before a window: these only move what is read."""
    layer, begin, end = cache(kv, 2, 9000, 64), 0, 9000
    own, token = Attention(level), new_token(2, 5, 64)
    own.threads = 1
    alone = own.append(layer, *token, begin, end)
    for threads in (2, 3, 8):
        own.threads = threads
        for _ in range(5):
            assert torch.equal(own.append(layer, *token, begin, end), alone)
    longer = cache(kv, 2, 9203, 64)
    for old, new in ((layer.keys, longer.keys), (layer.values, longer.values), (layer.key_scales, longer.key_scales),
                     (layer.value_scales, longer.value_scales)):
        if old is not None and new is not None:
            new[:, 103:9103] = old
    assert torch.equal(own.append(longer, *token, 103, 9103), alone)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_in_any_piece_stays_visible(level: str, bad: float) -> None:
    for position in (0, 300, 2000, 2999):
        layer = cache("bf16", 2, 3001, 32)
        layer.values[1, position, 7] = bad
        out = Attention(level).append(layer, *new_token(2, 3, 32), 0, 3001).view(2, 3, 32)
        assert out[0].isfinite().all() and not out[1, :, 7].isfinite().any()
        assert out[1, :, :7].isfinite().all()
        layer = cache("bf16", 2, 3001, 32)
        layer.keys[1, position, 7] = math.nan
        out = Attention(level).append(layer, *new_token(2, 3, 32), 0, 3001).view(2, 3, 32)
        assert out[0].isfinite().all() and out[1].isnan().all()


@pytest.mark.parametrize("level", LEVELS)
def test_pieces_whose_scores_differ_widely(level: str) -> None:
    """One position decides, wherever it is: the other pieces' weights vanish beside its own, and so do their sums."""
    for position in (0, 255, 256, 2999):
        layer = cache("bf16", 1, 3001, 32)
        q, keys, values = new_token(1, 2, 32)
        layer.keys[0, position] = 40 * q[0, 0].bfloat16()
        got = Attention(level).append(layer, q, keys, values, 0, 3001).view(2, 32).double()
        wanted = want(layer, q, 0, 3001).view(2, 32)
        assert torch.equal(got[0], layer.values[0, position].double())
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def softmax64(layer: KVLayer, q: Tensor, begin: int, end: int, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """(attention in float64, how far fp32 may lie from it), both [1, Q * D], by Higham 2002, section 3.1.

    A score has the roundings of its D products and sums, and 6 more: of the scale, the query times it, the scale of an
    int8 key, and of a cap's quotient, tanh (2) and product. A weight is the exponential of its distance from the
    largest score: it carries the errors of both, the distance's rounding, and the 8 of an exponential; one below
    exp(-87) stays there. Numerator and denominator are sums over a piece's positions, and over the pieces and chunks.
    """
    keys, values = (t[:, begin:end] for t in decoded(layer))
    grouped, size = q.double().view(len(keys), -1, q.shape[2]), q.shape[2]
    scale = size**-0.5 if softmax.scale is None else softmax.scale
    scores, terms = grouped @ keys.mT * scale, grouped.abs() @ keys.abs().mT * scale
    if softmax.softcap is not None:
        scores = softmax.softcap * (scores / softmax.softcap).tanh()
    if softmax.sinks is not None:
        scores = torch.cat((scores, softmax.sinks.double().view(len(keys), -1, 1)), -1)
    weights = scores.softmax(-1)[..., :end - begin]
    spread = (scores.amax(-1, keepdim=True) - scores).clamp(max=87).amax(-1, keepdim=True)
    of_weights = 2 * (size + 6) * terms.amax(-1, keepdim=True) + spread + 8
    of_sums = min(end - begin, max(256, (end - begin) / 32 + 64)) + 32 + 8
    apart = 2 * (of_weights + of_sums) * FP32 * (weights @ values.abs())
    least = math.exp(-87) * values.abs().sum(1, keepdim=True)
    return (weights @ values).view(1, -1), (apart + least).view(1, -1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("length", [1, 63, 257, 9000])
def test_sinks_scale_and_cap_against_float64(level: str, kv: str, length: int) -> None:
    """Sinks below all scores, among them and far above them."""
    for kv_heads, group, size, begin in ((1, 1, 16, 0), (2, 2, 48, 5), (2, 8, 64, 70)):
        layer, own = cache(kv, kv_heads, begin + length + 3, size), Attention(level)
        q, keys, values = new_token(kv_heads, group, size)
        spread = torch.linspace(-30, 30, kv_heads * group)
        for softmax in (Softmax(), Softmax(spread), Softmax(scale=0.31), Softmax(softcap=1.5),
                        Softmax(spread / 9, 0.02, 3.0)):
            got = own.append(layer, q, keys, values, begin, begin + length, softmax).double()
            wanted, apart = softmax64(layer, q, begin, begin + length, softmax)
            assert ((got - wanted).abs() <= apart).all(), (softmax, kv_heads, group, size)


@pytest.mark.parametrize("level", LEVELS)
def test_a_sink_that_weighs_nothing_changes_no_bit(level: str) -> None:
    layer, token = cache("bf16", 2, 3001, 32), new_token(2, 3, 32)
    plain = Attention(level).append(layer, *token, 0, 3001)
    for sink in (-200.0, -math.inf):
        assert torch.equal(Attention(level).append(layer, *token, 0, 3001, Softmax(torch.full((6,), sink))), plain)
    assert not Attention(level).append(layer, *token, 0, 3001, Softmax(torch.full((6,), 200.0))).abs().gt(1e-30).any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_the_self_test_asks_for_sinks_scale_and_cap(level: str, kv: str) -> None:
    class Deaf(Attention):
        def append(self, layer: KVLayer, q: Tensor, keys: Tensor, values: Tensor, begin: int, end: int,
                   softmax: Softmax = PLAIN) -> Tensor:
            return super().append(layer, q, keys, values, begin, end, replace(softmax, **{self.name: None}))

    assert agrees(Attention(level), 48, kv)
    for left_out in ("sinks", "scale", "softcap"):
        deaf = Deaf(level)
        deaf.name = left_out
        assert not agrees(deaf, 48, kv)

"""The int8 KV cache and the native attention over it: against float64, at every level that this processor has.

A code errs by at most half a scale; sums are fp32. So the kernel is held to fp64 on the decoded numbers to 1e-5, and
the decoded numbers to the originals to half a scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import bounds
import pytest
import torch
from helpers import decode as decode_one
from helpers import naive_experts, prefill, unquantized_weights, write_tiny_checkpoint
from mixtrals import MIXTRAL_8X7B, mixtral
from test_model import naive_attention
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import Cancel, QuantConfig, Step
from qmix.engine import load
from qmix.errors import Interrupted, UsageError
from qmix.forward.kv_cache import SessionCache
from qmix.forward.kv_layers import FullLayer, Int8Layer, Query
from qmix.forward.runner import Runner
from qmix.kernels import attention as choice
from qmix.kernels import native
from qmix.kernels.attention import agrees, choose_native_attention
from qmix.kernels.kv_codes import quantize
from qmix.kernels.kv_size import kv_bytes
from qmix.kernels.table import select
from qmix.offload.needs import Needs
from qmix.offload.workspace import workspace_bytes
from qmix.quantize import quantize_checkpoint
from qmix.spec import Attention, Model

LEVELS = list(native.levels())
needs_library = pytest.mark.skipif(not LEVELS, reason="the native kernels were not built: no C compiler")
IDS = torch.randint(0, 128, (700,), generator=torch.Generator().manual_seed(3)).tolist()
SHAPES = [(1, 1, 16), (2, 1, 32), (2, 3, 48), (2, 4, 128), (1, 9, 80)]  # KV heads, query heads of each, head size


def config_of(kv_heads: int, group: int, size: int, layers: int = 2) -> Model:
    return mixtral(128, 64, 96, layers, kv_heads * group, kv_heads, size, 4, 2, 1e4, 1e-5, 4096)


def cache_of(kv: str, config: Model, room: int, own: native.Attention | None,
             dtype: torch.dtype = torch.bfloat16) -> SessionCache:
    return SessionCache(config, room, dtype, kv, {} if own is None else {config.layers[0].mixer.head_dim: own})


def layer_of(cache: SessionCache, i: int = 1) -> Int8Layer:
    """Layer i; an Int8Layer where the cache is one of codes."""
    found = cache.layers[i]
    assert isinstance(found, FullLayer)
    return cast(Int8Layer, found)


def filled(kv: str, config: Model, length: int, room: int, own: native.Attention | None,
           dtype: torch.dtype = torch.bfloat16) -> SessionCache:
    """A cache of `room` positions with `length` random ones in layer 1; heads and positions differ in size."""
    random = torch.Generator().manual_seed(length)
    cache = cache_of(kv, config, room, own, dtype)
    assert type(cache.layers[1]) is (Int8Layer if kv == "int8" else FullLayer)
    shape = (length, config.layers[0].mixer.kv_heads, config.layers[0].mixer.head_dim)
    keys, values = torch.randn(2, *shape, generator=random)
    size = torch.rand(length, config.layers[0].mixer.kv_heads, 1, generator=random) * 2 + 0.1
    layer_of(cache).append(0, keys * size, values * size.flip(0))
    cache.length = length
    return cache


def attend(cache: SessionCache, start: int, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """In layer 1. q [T, Q, D], keys and values [T, KV, D]."""
    a = Attention(q.shape[1], keys.shape[1], q.shape[2], None, window=window)
    return layer_of(cache).attend(a, None, Query(start, q, keys, values))


def new_token(config: Model, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, Q, D] in the compute dtype, keys fp32 and values [1, KV, D], as the model has them."""
    random = torch.Generator().manual_seed(9)
    q = torch.randn(1, config.layers[0].mixer.heads, config.layers[0].mixer.head_dim, generator=random) * 2
    keys, values = torch.randn(2, 1, config.layers[0].mixer.kv_heads, config.layers[0].mixer.head_dim, generator=random)
    return q.to(dtype), keys, values.to(dtype)


def decoded(cache: SessionCache, end: int) -> tuple[Tensor, Tensor]:
    """What layer 1 holds of [0, end), fp64: keys and values [KV, S, D]."""
    kv_layer = cache.kv_layer(1)
    pairs = [(kv_layer.keys, kv_layer.key_scales), (kv_layer.values, kv_layer.value_scales)]
    wide = [codes.double() * (1 if scales is None else scales.double()[..., None]) for codes, scales in pairs]
    return wide[0][:, :end], wide[1][:, :end]


# --- the kernel ---

@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize(("kv_heads", "group", "size"), SHAPES)
@pytest.mark.parametrize(("past", "window"), [(0, None), (1, None), (20, 7), (127, None), (128, 1), (300, None),
                                              (300, 129), (300, 1000)])
def test_one_token_against_float64(level: str, kv: str, kv_heads: int, group: int, size: int, past: int,
                                   window: int | None) -> None:
    config = config_of(kv_heads, group, size)
    for dtype in (torch.bfloat16, torch.float32) if kv == "int8" else (torch.bfloat16,):
        cache = filled(kv, config, past, past + 2, native.Attention(level), dtype)
        q, keys, values = new_token(config, dtype)
        got = attend(cache, past, q, keys, values, window)
        want = naive_attention(q, *decoded(cache, past + 1), window)
        assert got.dtype == dtype and got.shape == want.shape
        assert (got.double() - want).norm() <= (1e-5 if dtype == torch.float32 else 2**-8) * want.norm()


@pytest.mark.parametrize("level", LEVELS)
def test_scores_of_any_size_do_not_overflow(level: str) -> None:
    """Also where a later chunk has far larger scores than those before, and the other way round."""
    config = config_of(1, 2, 32)
    for sizes in (torch.linspace(0.01, 300, 400), torch.linspace(300, 0.01, 400)):
        cache = cache_of("int8", config, 401, native.Attention(level), torch.float32)
        vectors = torch.randn(400, 1, 32, generator=torch.Generator().manual_seed(1)) * sizes[:, None, None]
        layer_of(cache).append(0, vectors, vectors)
        q, keys, values = new_token(config, torch.float32)
        got = attend(cache, 400, q * 30, keys, values, None)
        want = naive_attention(q * 30, *decoded(cache, 401), None)
        assert (got.double() - want).norm() <= 1e-4 * want.norm()


@needs_library
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_bits_do_not_depend_on_threads(kv: str) -> None:
    config, found = config_of(8, 4, 128), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        cache = filled(kv, config, 700, 701, native.Attention(LEVELS[0]))
        found.append(attend(cache, 700, *new_token(config), None))
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_native_keeps_the_bits_that_torch_keeps(level: str, kv: str) -> None:
    config = config_of(3, 2, 48)
    by_native, by_torch = (filled(kv, config, 5, 8, own) for own in (native.Attention(level), None))
    random = torch.Generator().manual_seed(5)
    for number in range(50):
        q = torch.randn(1, 6, 48, generator=random).bfloat16()
        keys, values = torch.randn(2, 1, 3, 48, generator=random) * 10.0 ** (number % 9 - 4)
        if number % 5 == 0:  # ties, zeros
            keys, values = torch.randint(-2, 3, (2, 1, 3, 48), generator=random).float() * 63.5
            values[:, 1] = 0
        for cache in (by_native, by_torch):
            attend(cache, 5, q, keys, values.bfloat16(), None)
        for one, two in zip(decoded(by_native, 6), decoded(by_torch, 6), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("own", [None, *LEVELS])
def test_what_lies_beyond_is_not_read_and_not_written(own: str | None) -> None:
    config = config_of(2, 2, 16)
    cache = filled("int8", config, 20, 20, None if own is None else native.Attention(own))
    before = decoded(cache, 20)
    for scales in (layer_of(cache).key_scales, layer_of(cache).value_scales):
        scales[:, 6:] = math.nan
    out = attend(cache, 5, *new_token(config), None)
    assert out.isfinite().all()
    after = decoded(cache, 20)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :5], new[:, :5]) and new[:, 6:].isnan().all()
    assert not layer_of(cache, 0).keys.any() and not layer_of(cache, 0).key_scales.any()


@pytest.mark.parametrize("own", [None, *LEVELS])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(own: str | None, bad: float) -> None:
    config = config_of(2, 2, 16)
    cache = filled("int8", config, 3, 9, None if own is None else native.Attention(own))
    q, keys, values = new_token(config)
    values[0, 1, 3] = bad
    out = attend(cache, 3, q, keys, values, None).view(2, -1)
    assert out[0].isfinite().all() and not out[1].isfinite().all()


# --- the cache ---

def test_size_is_what_the_plan_counts() -> None:
    config = config_of(2, 3, 48, layers=3)
    cache = SessionCache(config, 33, torch.bfloat16, "int8")
    assert cache.nbytes == kv_bytes(config, 33, kv="int8") == Needs.of(config, QuantConfig(), 33, "int8").kv
    held = [t for i in range(3) for t in (layer_of(cache, i).keys, layer_of(cache, i).values,
                                          layer_of(cache, i).key_scales, layer_of(cache, i).value_scales)]
    assert cache.nbytes == sum(t.nbytes for t in held)
    mixtral = MIXTRAL_8X7B
    assert kv_bytes(mixtral, 1, kv="int8") == 66 * 1024
    more = workspace_bytes(config, 2000, 2, "int8") - workspace_bytes(config, 2000, 2)
    assert more == 2 * 2000 * 48 * 2 + 3 * 1024 * 48 * 4  # a head's keys and values; 1024 = 512 new of 2 heads


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_keys_and_values_ask_for_huge_pages(kv: str) -> None:
    """The kernel's flags of the mapping that holds a layer's middle: hg is MADV_HUGEPAGE's."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no transparent huge pages")
    cache = SessionCache(config_of(8, 1, 128), 40_000, torch.bfloat16, kv)  # 41 MiB or more: a mapping of its own
    for tensor in (layer_of(cache).keys, layer_of(cache).values):
        address, flags, inside = tensor.data_ptr(), "", False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(found[1], 16) <= address < int(found[2], 16)
            elif inside and line.startswith("VmFlags:"):
                flags = line
        assert "hg" in flags.split()


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="--kv-cache int4: want bf16 or int8"):
        Needs.of(config_of(1, 1, 16), QuantConfig(), 8, kv="int4")


def test_no_number_is_off_by_more_than_half_a_scale() -> None:
    x = torch.randn(40, 3, 64) * torch.logspace(-20, 20, 40)[:, None, None]
    x[3] = 0
    codes, scales = torch.empty(3, 40, 64, dtype=torch.int8), torch.empty(3, 40)
    quantize(x, codes, scales)
    assert int(codes.abs().max()) == 127
    assert torch.equal(codes.abs().amax(-1) == 127, x.transpose(0, 1).any(-1))
    error = (codes.double() * scales.double()[..., None] - x.transpose(0, 1).double()).abs()
    assert (error <= (0.5 + 1e-5) * scales.double()[..., None]).all()


@pytest.mark.parametrize("window", [None, 7, 1500])
def test_many_queries_in_pieces(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.forward.kv_layers.KV_PIECE", 16)
    config = config_of(2, 3, 16)
    cache = filled("int8", config, 50, 100, None, torch.float32)
    q, keys, values = torch.randn(20, 6, 16), torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    got = attend(cache, 50, q, keys, values, window)
    want = naive_attention(q, *decoded(cache, 70), window)
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_write_returns_what_is_kept() -> None:
    cache = filled("int8", config_of(2, 3, 16), 5, 9, None)
    keys, values = layer_of(cache).append(5, torch.randn(2, 2, 16), torch.randn(2, 2, 16))
    for got, want in zip((keys, values), decoded(cache, 7), strict=True):
        assert torch.equal(got, want.bfloat16())


# --- the choice ---

def test_the_self_test_passes_here_and_would_fail_a_wrong_kernel() -> None:
    for level in LEVELS:
        own = native.Attention(level)
        for kv in ("bf16", "int8"):
            assert agrees(own, 64, kv)

            class Wrong(native.Attention):
                def append(self, kv_layer: native.KVLayer, *call: Any) -> Tensor:
                    return super().append(kv_layer, *call[:3], call[3] + 1, call[4])

            assert not agrees(Wrong(level), 64, kv)


@pytest.mark.parametrize(("head_dim", "off", "broken", "word"), [
    pytest.param(24, False, False, "multiple of 16", marks=needs_library),
    (32, True, False, "not in use"),
    pytest.param(32, False, True, "self-test", marks=needs_library)])
def test_where_torch_attends_it_is_said(head_dim: int, off: bool, broken: bool, word: str,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMIX_NATIVE", "off" if off else LEVELS[0])
    monkeypatch.setattr(choice, "agrees", lambda *_: not broken)
    lines: list[str] = []
    assert choose_native_attention(head_dim, "int8", lines.append) is None
    assert len(lines) == 1 and word in lines[0]
    assert choose_native_attention(head_dim, "bf16", lines.append) is None
    assert len(lines) == 1


# --- a whole model ---

@pytest.fixture(scope="module", params=["plain", "window"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    more = {"sliding_window": 50} if request.param == "window" else {}
    with Checkpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("int8"), dtype=torch.float32, **more)) as opened:
        yield opened


def model_of(checkpoint: Checkpoint, kv: str, own: native.Attention | None,
             seen: Any = lambda *_: None) -> Runner:
    return Runner(checkpoint.model, unquantized_weights(checkpoint), select({"fp32"}, say=lambda line: None),
                  naive_experts(checkpoint, seen),
                  caches=lambda model, room, dtype: cache_of(kv, model, room, own, dtype))


@pytest.mark.parametrize("own", [None, *LEVELS[:1]])
def test_logits_stay_close_and_prefill_is_decode(checkpoint: Checkpoint, own: str | None) -> None:
    model = model_of(checkpoint, "int8", None if own is None else native.Attention(own))
    plain = model_of(checkpoint, "bf16", None)
    want = prefill(plain, IDS[:80], plain.new_cache(80), True)
    whole = prefill(model, IDS[:80], model.new_cache(80), True)
    cache = model.new_cache(80)
    prefill(model, IDS[:30], cache)
    steps = torch.cat([decode_one(model, token, cache) for token in IDS[30:80]])
    errors = (whole - want).norm(dim=-1) / want.norm(dim=-1)
    config = checkpoint.model
    assert 0 < errors.median() < bounds.int8_keys_and_values(config.num_layers, config.layers[0].mixer.head_dim)
    # Prefill and decode read the same numbers, but where a last bit turned a code: in few of them.
    apart = (steps - whole[30:]).norm(dim=-1) / whole[30:].norm(dim=-1)
    assert apart.median() < errors.median()


@pytest.mark.parametrize("own", [None, *LEVELS[:1]])
def test_drafts_get_the_bits_of_single_tokens(checkpoint: Checkpoint, own: str | None) -> None:
    model = model_of(checkpoint, "int8", None if own is None else native.Attention(own))
    one, several = model.new_cache(200), model.new_cache(200)
    for cache in (one, several):
        prefill(model, IDS[:150], cache)
    want = torch.cat([decode_one(model, token, one) for token in IDS[150:157]])
    got = model.forward(torch.tensor(IDS[150:157]), torch.arange(150, 157), [several], Step("decode"), True)
    assert torch.equal(got, want)
    several.trim(152)  # two were right: what follows is as if the others had never been
    one.trim(152)
    assert torch.equal(decode_one(model, 7, several), decode_one(model, 7, one))


def test_a_cancelled_pass_leaves_the_cache(checkpoint: Checkpoint) -> None:
    cancel = Cancel()
    own = native.Attention(LEVELS[0]) if LEVELS else None
    stopping = model_of(checkpoint, "int8", own, lambda layer, *_: cancel.set() if layer == 1 else None)
    model = model_of(checkpoint, "int8", own)
    cache, same = stopping.new_cache(60), model.new_cache(60)
    stopping.forward(torch.tensor(IDS[:8]), torch.arange(8), [cache], Step("prefill"))
    prefill(model, IDS[:8], same)
    for count, phase in ((12, "prefill"), (1, "decode")):
        with pytest.raises(Interrupted):
            stopping.forward(torch.tensor(IDS[8:8 + count]), torch.arange(8, 8 + count), [cache],
                             Step(phase, cancel=cancel))
        assert cache.length == 8
        cancel.clear()
    assert torch.equal(decode_one(model, 5, cache), decode_one(model, 5, same))


def test_the_engine_loads_it_within_its_plan(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from tokenizer_files import spm_model

    source = write_tiny_checkpoint(tmp_path / "tiny", vocab_size=512)
    (source / "tokenizer.model").write_bytes(spm_model())
    with Checkpoint.open(source) as opened:
        quantize_checkpoint(opened, tmp_path / "store", QuantConfig())
    lines: list[str] = []
    with load(tmp_path / "store", threads=1, context=64, kv="int8", say=lines.append) as engine:
        session = engine.session()
        assert all(isinstance(layer, Int8Layer) for layer in session.cache.layers)
        assert session.cache.nbytes == engine.plan.ram.kv
        session.prefill([1, 5, 9])
        session.decode(4)
    assert any("int8 KV cache" in line for line in lines)
    with pytest.raises(UsageError, match="--kv-cache fp8"):
        load(tmp_path / "store", kv="fp8")

"""The model against its own definition: naive attention and rotation, prefill against decode, several
sessions against one, and what it hands to the experts. Parity with transformers is test_model_parity."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from helpers import (
    KEEP,
    decode,
    keep_model,
    keep_weights,
    naive_experts,
    prefill,
    stored_model,
    write_tiny_checkpoint,
)
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import Cancel, QuantConfig, Step
from qmix.errors import Interrupted, StoreError, UsageError
from qmix.formats import pack
from qmix.forward.kv_cache import SessionCache
from qmix.forward.kv_layers import FullLayer
from qmix.forward.program import model_program
from qmix.forward.run_eager import Guesses
from qmix.forward.runner import Runner
from qmix.forward.weights import assemble, compute_dtype
from qmix.kernels.attend import attend, rotation
from qmix.kernels.kv_size import kv_bytes
from qmix.kernels.layer import TORCH, rms_norm, rotate
from qmix.kernels.table import select
from qmix.models import read_model
from qmix.sizes import MatrixSpec

CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {}, "mha": {"num_key_value_heads": 4}, "window": {"sliding_window": 7},
    "head_dim": {"head_dim": 24}, "tied": {"tie_word_embeddings": True}, "top-1": {"num_experts_per_tok": 1},
    "top-3 of 5": {"num_local_experts": 5, "num_experts_per_tok": 3},
}
IDS = torch.randint(0, 128, (1500,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.float32)
    with Checkpoint.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Runner:
    return keep_model(checkpoint)


def close(got: Tensor, want: Tensor, relative: float = 1e-5) -> bool:
    """Largest difference, relative to the largest value."""
    return bool((got - want).abs().max() <= relative * want.abs().max())


# --- layers ---

def test_rms_norm_against_float64() -> None:
    x, weight = torch.randn(9, 64) * 3, torch.randn(64)
    wide = x.double()
    want = weight * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(rms_norm(x, weight, 1e-5).double(), want, atol=1e-6)
    assert torch.equal(rms_norm(x, None, 1e-5) * weight, rms_norm(x, weight, 1e-5))


def test_rotation_turns_pairs_of_halves() -> None:
    """Dimensions i and i + D/2 are one complex number, turned by position * theta^(-2i/D)."""
    size, theta = 16, 100.0
    x, positions = torch.randn(3, 2, size), torch.tensor([0, 5, 40])
    got = rotate(x.clone(), *TORCH.angles(positions, rotation(size, theta)))
    for t, position in enumerate(positions.tolist()):
        for i in range(size // 2):
            turn = cmath.exp(1j * position * theta ** (-2 * i / size))
            for head in range(2):
                want = complex(x[t, head, i], x[t, head, i + size // 2]) * turn
                assert got[t, head, i] == pytest.approx(want.real, abs=1e-5)
                assert got[t, head, i + size // 2] == pytest.approx(want.imag, abs=1e-5)


def test_rotation_of_a_position_does_not_depend_on_its_neighbours() -> None:
    together = TORCH.angles(torch.arange(3000), rotation(128, 1e6))
    for position in (0, 1, 17, 511, 2999):
        for alone, row in zip(TORCH.angles(torch.tensor([position]), rotation(128, 1e6)), together, strict=True):
            assert torch.equal(alone[0], row[position])


def naive_attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """float64, one query and head at a time."""
    count, heads, size = q.shape
    kv_heads, length, _ = keys.shape
    out = torch.zeros(count, heads, size, dtype=torch.float64)
    for t in range(count):
        position = length - count + t
        lowest = 0 if window is None else max(0, position - window + 1)
        for h in range(heads):
            seen = slice(lowest, position + 1)
            scores = keys[h // (heads // kv_heads), seen].double() @ q[t, h].double() / math.sqrt(size)
            out[t, h] = scores.softmax(0) @ values[h // (heads // kv_heads), seen].double()
    return out.view(count, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 20), (2, 5), (20, 20), (7, 20), (1, 9)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_against_a_loop(count: int, length: int, window: int | None, kv_heads: int,
                                  dtype: torch.dtype) -> None:
    q = torch.randn(count, 6, 16).to(dtype)
    room = torch.randn(2, kv_heads, length + 9, 16).to(dtype)  # a cache with room left, as the model has
    keys, values = room[0, :, :length], room[1, :, :length]
    got = attend(q, keys, values, window).double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(got, naive_attention(q, keys, values, window), atol=tolerance)


# --- the cache ---

def test_cache_size_is_what_the_plan_counts(checkpoint: Checkpoint) -> None:
    for dtype, item in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = SessionCache(checkpoint.model, 33, dtype)
        assert cache.nbytes == 33 * kv_bytes(checkpoint.model, 1, item)


def test_cache_hands_out_views(checkpoint: Checkpoint) -> None:
    cache = SessionCache(checkpoint.model, 10, torch.bfloat16)
    new = torch.randn(3, 2, 16)
    layer = cache.layers[1]
    assert isinstance(layer, FullLayer)
    keys, values = layer.append(0, new, -new)
    again, _ = layer.append(3, new, new)
    assert keys.data_ptr() == again.data_ptr()
    assert torch.equal(again[:, :3], keys)
    assert torch.equal(keys, new.bfloat16().transpose(0, 1))
    assert torch.equal(values, -keys)


def test_full_cache_is_an_error_with_the_numbers(model: Runner) -> None:
    cache = model.new_cache(10)
    with pytest.raises(UsageError, match=r"0 \+ 11 tokens do not fit a context of 10"):
        prefill(model, IDS[:11], cache)
    prefill(model, IDS[:10], cache)
    with pytest.raises(UsageError, match=r"10 \+ 1 tokens do not fit a context of 10"):
        decode(model, 1, cache)
    assert cache.length == 10


@pytest.mark.parametrize("length", [-1, 6])
def test_trim_refuses_what_is_not_there(model: Runner, length: int) -> None:
    cache = model.new_cache(10)
    prefill(model, IDS[:5], cache)
    with pytest.raises(ValueError, match="want 0 to 5"):
        cache.trim(length)


def test_trim_then_extend_equals_fresh(model: Runner) -> None:
    used = model.new_cache(200)
    prefill(model, IDS[:100], used)
    used.trim(60)
    assert used.length == 60
    fresh = model.new_cache(200)
    prefill(model, IDS[:60], fresh)
    # Positions 0 to 59 were computed in another company, so the last bits may differ.
    assert close(prefill(model, IDS[200:240], used, True), prefill(model, IDS[200:240], fresh, True))
    used.trim(0)
    once = model.new_cache(200)
    assert torch.equal(prefill(model, IDS[:30], used, True), prefill(model, IDS[:30], once, True))


# --- prefill, decode, passes ---

@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_agree(tmp_path: Path, name: str) -> None:
    with Checkpoint.open(write_tiny_checkpoint(tmp_path, dtype=torch.float32, **CONFIGS[name])) as opened:
        model = keep_model(opened)
    together = prefill(model, IDS[:40], model.new_cache(40), True)
    cache = model.new_cache(40)
    for position, token in enumerate(IDS[:40]):
        assert close(decode(model, token, cache)[0], together[position])


def test_follow_up_turns_extend_the_cache(model: Runner) -> None:
    together = prefill(model, IDS[:90], model.new_cache(90), True)
    cache = model.new_cache(90)
    first = prefill(model, IDS[:50], cache, True)
    decoded = [decode(model, token, cache) for token in IDS[50:60]]
    then = prefill(model, IDS[60:90], cache, True)
    assert close(torch.cat([first, *decoded, then]), together)


@pytest.mark.parametrize("count", [511, 512, 513, 1025])
def test_blocks_of_attention(model: Runner, count: int) -> None:
    """Prompts on either side of the 512-token border, against the same prompt in pieces of 100."""
    got = prefill(model, IDS[:count], model.new_cache(count), True)
    cache = model.new_cache(count)
    parts = [prefill(model, IDS[i:min(count, i + 100)], cache, True) for i in range(0, count, 100)]
    assert close(got, torch.cat(parts))


def test_long_prompts_take_several_passes(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    model = keep_model(checkpoint, lambda layer, x, ids, w, step, ahead:
                       calls.append((layer, len(x), len(step.sequence))))
    whole = prefill(model, IDS, model.new_cache(1500), True)
    assert calls == [(layer, 1500, 0) for layer in range(3)]
    calls.clear()
    monkeypatch.setattr(model._eager, "_most", 1024)
    cache = model.new_cache(1500)
    step = Step("prefill", (7,) * 1500)
    parts = model.forward(torch.tensor(IDS), torch.arange(1500), [cache], step, all_logits=True)
    assert calls == [(layer, count, count) for count in (1024, 476) for layer in range(3)]
    assert cache.length == 1500
    assert close(parts, whole)
    cache.trim(0)
    last = model.forward(torch.tensor(IDS), torch.arange(1500), [cache], step)
    assert close(last[0], parts[-1])


def test_in_the_last_layer_only_what_is_read_is_computed(checkpoint: Checkpoint,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[tuple[int, list[int] | None]] = []
    model = keep_model(checkpoint)
    experts = model._eager.experts

    def noted(layer: int, *how: Any) -> Tensor:
        wanted.append((layer, None if how[-1] is None else how[-1].tolist()))
        return experts(layer, *how)

    monkeypatch.setattr(model._eager, "experts", noted)
    monkeypatch.setattr(model._eager, "_most", 512)
    model.forward(torch.tensor(IDS[:700]), torch.arange(700), [model.new_cache(700)], Step("prefill"))
    assert wanted == [(0, None), (1, None), (2, []), (0, None), (1, None), (2, [187])]
    wanted.clear()
    prefill(model, IDS[:20], model.new_cache(20), True)
    assert wanted == [(0, None), (1, None), (2, None)]
    wanted.clear()
    caches = [model.new_cache(20) for _ in range(2)]
    model.forward(torch.tensor(IDS[:9]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]), caches,
                  Step("prefill", (0,) * 4 + (1,) * 5))
    assert wanted == [(0, None), (1, None), (2, [3, 8])]


# --- several sessions ---

@pytest.mark.parametrize("name", ["gqa", "window"])
def test_sessions_together_give_what_each_gives_alone(tmp_path: Path, name: str) -> None:
    """Equal up to rounding: plain fp32 and bf16 products differ in the last bits with the number of rows
    (int4 and int8 kernels do not), attention is computed per session and never differs."""
    with Checkpoint.open(write_tiny_checkpoint(tmp_path, dtype=torch.float32, **CONFIGS[name])) as opened:
        model = keep_model(opened)
    prompts = [IDS[:5], IDS[5:6], IDS[10:40], IDS[50:53]]
    alone, want = [model.new_cache(64) for _ in prompts], []
    for ids, cache in zip(prompts, alone, strict=True):
        want.append(prefill(model, ids, cache)[0])
    caches = [model.new_cache(64) for _ in prompts]
    tokens = torch.tensor([t for p in prompts for t in p])
    got = model.forward(tokens, torch.cat([torch.arange(len(p)) for p in prompts]), caches,
                        Step("prefill", tuple(n for n, p in enumerate(prompts) for _ in p)))
    assert close(got, torch.stack(want))
    assert [c.length for c in caches] == [5, 1, 30, 3]
    for turn in range(3):
        ids = IDS[100 + turn * 4:104 + turn * 4]
        want = [decode(model, t, c)[0] for t, c in zip(ids, alone, strict=True)]
        positions = torch.tensor([c.length for c in caches])
        got = model.forward(torch.tensor(ids), positions, caches, Step("decode", (0, 1, 2, 3)))
        assert close(got, torch.stack(want))


@pytest.mark.parametrize("quant", [QuantConfig("int4", "int8", "rtn", 32),
                                   QuantConfig("int4", "int4", "rtn", 64)])
def test_quantized_sessions_decode_to_the_same_bits_together(tmp_path: Path, quant: QuantConfig) -> None:
    path = write_tiny_checkpoint(tmp_path / "checkpoint", num_hidden_layers=4)
    model = stored_model(path, tmp_path / "store", quant)
    alone, together = ([model.new_cache(64) for _ in range(5)] for _ in range(2))
    for i in range(5):
        prefill(model, IDS[i * 7:i * 9 + 3], alone[i])
        prefill(model, IDS[i * 7:i * 9 + 3], together[i])
    for turn in range(20):
        ids = IDS[turn * 5:turn * 5 + 5]
        want = torch.cat([decode(model, token, cache) for token, cache in zip(ids, alone, strict=True)])
        positions = torch.tensor([c.length for c in together])
        got = model.forward(torch.tensor(ids), positions, together, Step("decode", tuple(range(5))))
        assert torch.equal(got, want)


def test_decoding_beside_a_prefill(model: Runner) -> None:
    first, second = model.new_cache(50), model.new_cache(50)
    prefill(model, IDS[:9], first)
    got = model.forward(torch.tensor([IDS[9], *IDS[20:45]]), torch.tensor([9, *range(25)]), [first, second],
                        Step("prefill", (4,) + (9,) * 25))
    alone = model.new_cache(50)
    assert close(got[0], prefill(model, IDS[:10], alone)[0])
    assert close(got[1], prefill(model, IDS[20:45], model.new_cache(50))[0])


@pytest.mark.parametrize("sequence", [(0, 0, 0), (0, 1), (0, 1, 0), (0, 1, 2)])
def test_sequence_must_match_the_caches(model: Runner, sequence: tuple[int, ...]) -> None:
    caches = [model.new_cache(4), model.new_cache(4)]
    with pytest.raises(ValueError, match="3 tokens, 2 caches"):
        model.forward(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 0]), caches, Step("prefill", sequence))


# --- what the experts see ---

def test_experts_get_what_the_design_says(checkpoint: Checkpoint) -> None:
    calls: list[tuple[Any, ...]] = []
    model = keep_model(checkpoint, lambda *call: calls.append(
        tuple(c.clone() if isinstance(c, Tensor) else c for c in call)))
    cache = model.new_cache(50)
    prefill(model, IDS[:20], cache)
    decode(model, 3, cache)
    assert [call[0] for call in calls] == [0, 1, 2, 0, 1, 2]
    for i, (layer, x, ids, weights, step, ahead) in enumerate(calls):
        count = 20 if i < 3 else 1
        assert x.shape == (count, 64)
        assert ids.shape == weights.shape == (count, 2)
        assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
        router = checkpoint.dense(f"layers.{layer}.router.weight")
        chosen, where = (x.double() @ router.double().T).topk(2)
        assert torch.equal(ids, where)
        assert torch.allclose(weights.double(), chosen.softmax(-1), atol=1e-5)
        assert step.phase == ("prefill" if i < 3 else "decode")
        assert (ahead is None) == (i < 3 or layer == 2)


@pytest.mark.parametrize(("guesses", "depth"), [(1, 1), (2, 1), (4, 2), (2, 9)])
def test_ahead_is_the_next_router_on_this_residual(checkpoint: Checkpoint, guesses: int, depth: int) -> None:
    """Without output of attention and experts the residual never changes: the guess must come true."""
    weights = keep_weights(checkpoint)
    for layer in range(3):
        weights.matrices[f"layers.{layer}.attention.o"]["weight"].zero_()
    seen: list[tuple[Tensor, Tensor | None]] = []

    def experts(layer: int, x: Tensor, ids: Tensor, gains: Tensor, step: Step,
                ahead: Tensor | None, wanted: Tensor | None) -> Tensor:
        seen.append((ids.clone(), None if ahead is None else ahead.clone()))
        return torch.zeros_like(x)

    model = Runner(checkpoint.model, weights, select({"fp32"}, say=lambda line: None), experts, Guesses(depth, guesses))
    caches = [model.new_cache(4) for _ in range(3)]
    model.forward(torch.tensor(IDS[:3]), torch.zeros(3, dtype=torch.int64), caches, Step("decode", (0, 1, 2)))
    assert seen[-1][1] is None
    chosen = [ids for ids, _ in seen]
    for layer, (_, ahead) in enumerate(seen[:-1]):
        assert ahead is not None
        assert ahead.shape[1] == min(depth, len(seen) - 1 - layer)
        assert ahead.shape == (3, ahead.shape[1], guesses)
        shared = min(guesses, 2)
        for distance in range(ahead.shape[1]):
            assert torch.equal(ahead[:, distance, :shared], chosen[layer + 1 + distance][:, :shared])
    assert not torch.equal(seen[0][0], seen[1][0])


def test_no_guess_where_none_is_wanted(checkpoint: Checkpoint) -> None:
    seen: list[Tensor | None] = []
    model = Runner(checkpoint.model, keep_weights(checkpoint), select({"fp32"}, say=lambda line: None),
                   naive_experts(checkpoint, lambda *call: seen.append(call[-1])))
    decode(model, 3, model.new_cache(4))
    assert seen == [None] * 3


def test_guessing_does_not_change_the_result(checkpoint: Checkpoint, model: Runner) -> None:
    plain = Runner(checkpoint.model, keep_weights(checkpoint), select({"fp32"}, say=lambda line: None),
                   naive_experts(checkpoint))
    one, two = model.new_cache(20), plain.new_cache(20)
    for token in IDS[:20]:
        assert torch.equal(decode(model, token, one), decode(plain, token, two))


# --- cancellation and errors leave the caches as they were ---

@pytest.mark.parametrize("at", [0, 1])
def test_cancel_between_layers(checkpoint: Checkpoint, model: Runner, at: int) -> None:
    cancel, reached = Cancel(), []

    def seen(layer: int, *_: Any) -> None:
        reached.append(layer)
        if layer == at:
            cancel.set()

    stopping = keep_model(checkpoint, seen)
    cache, same = stopping.new_cache(40), model.new_cache(40)
    prefill(model, IDS[:8], same)
    stopping.forward(torch.tensor(IDS[:8]), torch.arange(8), [cache], Step("prefill"))
    cancel.clear()
    reached.clear()
    step = Step("prefill", cancel=cancel)
    with pytest.raises(Interrupted):
        stopping.forward(torch.tensor(IDS[8:20]), torch.arange(8, 20), [cache], step)
    assert reached == list(range(at + 1))
    assert cache.length == 8
    cancel.clear()
    assert torch.equal(prefill(stopping, IDS[8:20], cache), prefill(model, IDS[8:20], same))


def test_failure_in_a_later_pass_restores_every_cache(checkpoint: Checkpoint,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_late(*call: Any) -> None:
        calls.append(call[0])
        if len(calls) == 5:
            raise OSError("disk gone")

    model = keep_model(checkpoint, fail_late)
    monkeypatch.setattr(model._eager, "_most", 512)
    caches = [model.new_cache(1000), model.new_cache(1000)]
    with pytest.raises(OSError, match="disk gone"):
        model.forward(torch.tensor(IDS[:1200]), torch.cat([torch.arange(700), torch.arange(500)]), caches,
                      Step("prefill", (0,) * 700 + (1,) * 500))
    assert [c.length for c in caches] == [0, 0]


def test_logits_may_be_changed_in_place(model: Runner) -> None:
    logits = prefill(model, IDS[:4], model.new_cache(4))
    logits[0].div_(2).add_(1)
    assert not logits.is_inference()


# --- weights and compute dtype ---

def test_bf16_weights_compute_in_bf16(tmp_path: Path) -> None:
    with Checkpoint.open(write_tiny_checkpoint(tmp_path / "half")) as opened:
        half = keep_model(opened)
    wide_path = write_tiny_checkpoint(tmp_path / "wide", dtype=torch.float32)
    with Checkpoint.open(wide_path) as opened:
        wide = keep_model(opened)
    cache = half.new_cache(40)
    got = prefill(half, IDS[:40], cache, True)
    assert got.dtype == torch.float32
    assert cache.nbytes == 40 * kv_bytes(opened.model, 1)
    want = prefill(wide, IDS[:40], wide.new_cache(40), True)
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert errors.median() < bounds.model_rounded(opened.model.num_layers)


@pytest.mark.parametrize(("dtype", "experts", "dense", "want"), [
    ("float32", "keep", "keep", torch.float32), ("float16", "keep", "keep", torch.float32),
    ("bfloat16", "keep", "keep", torch.bfloat16), ("float32", "keep", "bf16", torch.bfloat16),
    ("float32", "int4", "keep", torch.bfloat16), ("float16", "nf4", "bf16", torch.bfloat16),
])
def test_compute_dtype(checkpoint: Checkpoint, dtype: str, experts: str, dense: str,
                       want: torch.dtype) -> None:
    raw = {**checkpoint.raw_config, "dtype": dtype}
    quant = QuantConfig(experts, dense) if experts == "int4" else QuantConfig(experts, dense, "", 0, 0)
    assert compute_dtype(read_model(raw), quant) == want


def test_tied_head_shares_the_embedding(tmp_path: Path) -> None:
    with Checkpoint.open(write_tiny_checkpoint(tmp_path, tie_word_embeddings=True)) as opened:
        weights = keep_weights(opened)
    assert weights.matrices["embedding"]["weight"].data_ptr() == weights.tensors["embedding"].data_ptr()


def test_every_dense_tensor_is_used(checkpoint: Checkpoint) -> None:
    used = {weight.name for op in model_program(checkpoint.model) for weight in op.weights}
    assert used == {tensor.name for tensor in checkpoint.model.tensors()}


@pytest.mark.parametrize(("name", "bad"), [
    ("layers.1.attention.v", torch.zeros(32, 64)),
    ("layers.1.attention.v", pack(torch.zeros(32, 63), MatrixSpec("fp32", 32, 63))),
    ("layers.2.router.weight", torch.zeros(5, 64)),
    ("final_norm", pack(torch.zeros(1, 64), MatrixSpec("fp32", 1, 64))),
])
def test_misshapen_weights_are_named(checkpoint: Checkpoint, name: str, bad: Any) -> None:
    roles = {t.name: t.role for t in checkpoint.model.tensors()}

    def read(asked: str) -> Any:
        tensor = checkpoint.dense(asked)
        if asked == name:
            return bad
        packed = roles[asked] in ("linear", "head")
        return pack(tensor, MatrixSpec("fp32", *tensor.shape)) if packed else tensor

    with pytest.raises(StoreError, match=rf"{name}: got"):
        assemble(checkpoint.model, compute_dtype(checkpoint.model, KEEP), read)

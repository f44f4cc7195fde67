"""Passes of the model: prefill against decode, several sessions against one, what the experts are given, and what an
interrupt or an error leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runners
import torch
from helpers import (
    decode,
    naive_experts,
    prefill,
    stored_model,
    unquantized_model,
    unquantized_weights,
    write_tiny_checkpoint,
)
from tiny_runners import CONFIGS, IDS, close
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import Cancel, QuantConfig, Step
from qmix.errors import Interrupted
from qmix.forward.run_eager import Guesses
from qmix.forward.runner import Runner
from qmix.kernels.table import select

checkpoint = pytest.fixture(scope="module")(tiny_runners.checkpoint)
model = pytest.fixture(scope="module")(tiny_runners.model)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_agree(tmp_path: Path, name: str) -> None:
    with Checkpoint.open(write_tiny_checkpoint(tmp_path, dtype=torch.float32, **CONFIGS[name])) as opened:
        model = unquantized_model(opened)
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
    model = unquantized_model(checkpoint, lambda layer, x, ids, w, step, ahead:
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
    model = unquantized_model(checkpoint)
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
        model = unquantized_model(opened)
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
    model = unquantized_model(checkpoint, lambda *call: calls.append(
        tuple(c.clone() if isinstance(c, Tensor) else c for c in call)))
    cache = model.new_cache(50)
    prefill(model, IDS[:20], cache)
    decode(model, 3, cache)
    assert [call[0] for call in calls] == [0, 1, 2, 0, 1, 2]
    for i, (layer, x, ids, topk_weights, step, ahead) in enumerate(calls):
        count = 20 if i < 3 else 1
        assert x.shape == (count, 64)
        assert ids.shape == topk_weights.shape == (count, 2)
        assert (ids.dtype, topk_weights.dtype) == (torch.int64, torch.float32)
        router = checkpoint.dense(f"layers.{layer}.router.weight")
        chosen, where = (x.double() @ router.double().T).topk(2)
        assert torch.equal(ids, where)
        assert torch.allclose(topk_weights.double(), chosen.softmax(-1), atol=1e-5)
        assert step.phase == ("prefill" if i < 3 else "decode")
        assert (ahead is None) == (i < 3 or layer == 2)


@pytest.mark.parametrize(("guesses", "depth"), [(1, 1), (2, 1), (4, 2), (2, 9)])
def test_ahead_is_the_next_router_on_this_residual(checkpoint: Checkpoint, guesses: int, depth: int) -> None:
    """Without output of attention and experts the residual never changes: the guess must come true."""
    weights = unquantized_weights(checkpoint)
    for layer in range(3):
        weights.matrices[f"layers.{layer}.attention.o"]["weight"].zero_()
    seen: list[tuple[Tensor, Tensor | None]] = []

    def experts(layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, step: Step,
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
    model = Runner(checkpoint.model, unquantized_weights(checkpoint), select({"fp32"}, say=lambda line: None),
                   naive_experts(checkpoint, lambda *call: seen.append(call[-1])))
    decode(model, 3, model.new_cache(4))
    assert seen == [None] * 3


def test_guessing_does_not_change_the_result(checkpoint: Checkpoint, model: Runner) -> None:
    plain = Runner(checkpoint.model, unquantized_weights(checkpoint), select({"fp32"}, say=lambda line: None),
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

    stopping = unquantized_model(checkpoint, seen)
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

    model = unquantized_model(checkpoint, fail_late)
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

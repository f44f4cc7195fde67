"""A program as calls of a device beside the same program Op by Op, to the bit, on every configuration that runs and on
specs that reach the other branches: one token, drafts, several sessions, all experts resident or asked for layer by
layer. And what a device does not compute, by name. Everything is in fp32, and torch computes what both have."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_pairs import IDS, LAYER, NORM, SPECS, Pair, mixer, model_of, moe
from helpers import UNQUANTIZED
from model_configs import ON_DEVICE, RUN
from torch import Tensor

from qmix.config import Cancel, Step
from qmix.device import StandIn
from qmix.errors import Interrupted
from qmix.forward.kv_cache import SessionCache
from qmix.forward.lower_device import not_on_device
from qmix.forward.snapshots import TAIL
from qmix.kernels.kv_size import placed_bytes
from qmix.kernels.op import FEW
from qmix.offload.needs import Needs
from qmix.spec import (
    Model,
    Norm,
    Norms,
    Router,
)


@pytest.mark.parametrize(("name", "how"), [
    *((name, ("resident", "by layer")[at % 2]) for at, name in enumerate(SPECS)),
    *((name, how) for name in ON_DEVICE for how in ("resident", "by layer", "late"))])
def test_the_same_bits_as_op_by_op(name: str, how: str) -> None:
    model = SPECS[name]
    assert not_on_device(model) == ""
    with closing(StandIn()) as device:
        pair = Pair(model, device, how == "resident", how == "late", "bf16")
        pair.agree(IDS, [1], [7], [32])
        pair.agree(IDS, [1, 3, 1], [2, 9, 4], [24, 24, 60])


def test_drafts_of_a_recurrent_state_are_taken_back() -> None:
    """To the bits of the tokens that stay, whichever side of its places the state is on; a pass that fails changes
    nothing, and a prompt, a snapshot and another session may come between. The plan counts both places."""
    model, needs = SPECS["delta nets"], Needs.of(SPECS["delta nets"], UNQUANTIZED, 64)
    places = SessionCache(model, 64, placed=True).nbytes - SessionCache(model, 64).nbytes
    assert places == placed_bytes(model) == needs.on_device.kv - needs.kv > 2 * 3 * 4 * 2 * 4 * 8 * 6
    with closing(StandIn()) as device:
        pair = Pair(SPECS["delta nets"], device, True, False, "bf16")
        caches, other = [one.new_cache(64) for one in (pair.eager, pair.runner)], pair.runner.new_cache(40)
        ends = random.Random(4)

        def both(count: int, phase: str) -> None:
            at = caches[0].length
            given, step = torch.tensor(IDS[at % 20:at % 20 + count]), Step(phase)
            want = pair.eager.forward(given, caches[:1], step, all_logits=True)
            got = pair.runner.forward(given, torch.arange(at, at + count), caches[1:], step, all_logits=True)
            assert torch.equal(got, want)

        both(9, "prefill")
        for turn in range(12):
            before, count = caches[0].length, ends.randint(1, 6)
            both(count, "decode")
            if count > 1:
                kept = ends.randint(0, count)
                for cache in caches:
                    cache.trim(before + kept)
            if turn == 5:
                both(10, "prefill")
                saved = [cache.snapshot() for cache in caches]
                pair.runner.forward(torch.tensor([4, 5]), torch.arange(2), [other], Step("decode"))
            if turn == 8:
                for cache, one in zip(caches, saved, strict=True):
                    cache.restore(one)
                cancel = Cancel()
                cancel.set()
                with pytest.raises(Interrupted):
                    pair.runner.forward(torch.tensor([6]), torch.tensor([caches[1].length]), caches[1:],
                                        Step("decode", cancel=cancel))


class Sessions:
    """Of recurrent states, each Op by Op and on a device, which have to agree to the bit."""

    def __init__(self, device: StandIn, prompts: list[int]):
        self.pair = Pair(SPECS["delta nets"], device, True, False, "bf16")
        self.caches = [[one.new_cache(64) for _ in prompts] for one in (self.pair.eager, self.pair.runner)]
        self.give([IDS[:count] for count in prompts], "prefill")

    def give(self, tokens: list[list[int]], phase: str = "decode") -> None:
        """More than FEW are given to the sessions Op by Op one after another, as many at a time as a device takes."""
        mine, theirs = self.caches
        step = Step(phase, tuple(i for i, part in enumerate(tokens) for _ in part))
        given = torch.tensor([token for part in tokens for token in part])
        positions = torch.cat([torch.arange(cache.length, cache.length + len(part))
                               for cache, part in zip(theirs, tokens, strict=True)])
        if phase == "decode" and len(given) > FEW:
            want = torch.cat([self.pair.eager.forward(piece, [cache], Step(phase), all_logits=True) for cache, part in
                              zip(mine, tokens, strict=True) for piece in torch.tensor(part).split(FEW)])
        else:
            want = self.pair.eager.forward(given, mine, step, all_logits=True)
        assert torch.equal(self.pair.runner.forward(given, positions, theirs, step, all_logits=True), want)

    def trim(self, session: int, length: int) -> None:
        for caches in self.caches:
            caches[session].trim(length)


def test_all_drafts_are_taken_back_and_then_others() -> None:
    """The state before them is of the side that the next pass writes."""
    with closing(StandIn()) as device:
        sessions = Sessions(device, [9])
        sessions.give([[5]])
        for length, ids in ((10, [6, 7, 8]), (12, [6, 17, 18, 19]), (12, [1, 2])):
            sessions.give([ids])
            sessions.trim(0, length)
        sessions.give([[4]])


def test_more_than_few_tokens_of_recurrent_sessions() -> None:
    """Those of one stay together, and its drafts can be taken back; of a session with many there is a snapshot."""
    with closing(StandIn()) as device:
        sessions = Sessions(device, [9, 4])
        sessions.give([IDS[:5], IDS[5:11]])
        sessions.trim(0, 11)
        sessions.trim(1, 7)
        sessions.give([[5], [6]])
        sessions.give([IDS[:3], IDS[9:33]])
        sessions.trim(0, 14)
        mine, theirs = (caches[1] for caches in sessions.caches)
        assert theirs.rewind(31) == 8 + 24 - TAIL
        mine.trim(0)
        for part, phase in ((IDS[:4], "prefill"), (IDS[5:8], "decode"), ([6], "decode"), (IDS[9:17], "decode")):
            sessions.pair.eager.forward(torch.tensor(part), [mine], Step(phase))
        sessions.give([[7, 8], [9]])


def test_a_pass_that_fails_in_a_later_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or when all are through."""
    with closing(StandIn()) as device:
        sessions = Sessions(device, [9, 4])
        theirs, runner = sessions.caches[1], sessions.pair.runner
        decode = runner._decode
        assert decode is not None
        for count in (6, 24):
            sessions.give([[5], [6]])
            given = torch.tensor(IDS[:5 + count])
            positions = torch.cat([torch.arange(cache.length, cache.length + more)
                                   for cache, more in zip(theirs, (5, count), strict=True)])
            for fails, error in (("end", ZeroDivisionError), ("decode", Interrupted)):
                step = Step("decode", (0,) * 5 + (1,) * count)

                def cancelled(*what: Any, step: Step = step) -> Tensor:
                    found = decode(*what)
                    step.cancel.set()
                    return found

                with monkeypatch.context() as patch, pytest.raises(error):
                    if fails == "end":
                        patch.setattr(theirs[1], "end", lambda: 1 / 0)
                    else:
                        patch.setattr(runner, "_decode", cancelled)
                    runner.forward(given, positions, theirs, step)
            sessions.give([[7, 8], [9]])


@pytest.mark.parametrize("name", ["long rope", "other heads", "qwen3_moe", "sinks", "a cap and a scale"])
def test_int8_keys_and_values(name: str) -> None:
    """A prompt decodes keys to the compute dtype, a token of a device attends to its codes as the eager runner does."""
    with closing(StandIn()) as device:
        pair = Pair(SPECS[name], device, False, False, "int8")
        pair.agree(IDS, [1], [7], [32])
        pair.agree(IDS, [2, 1], [3, 5], [32, 40])


def test_a_pass_ends_between_two_layers() -> None:
    with closing(StandIn()) as device:
        pair = Pair(SPECS["qwen3_moe"], device, False, True, "bf16")
        cache, cancel = pair.runner.new_cache(16), Cancel()
        pair.runner.forward(torch.tensor([5]), torch.tensor([0]), [cache], Step("decode"))
        cancel.set()
        with pytest.raises(Interrupted):
            pair.runner.forward(torch.tensor([6]), torch.tensor([1]), [cache], Step("decode", cancel=cancel))
        assert cache.length == 1


REFUSED: dict[str, tuple[Callable[[], Model], str]] = {
    "shared keys": (lambda: model_of(LAYER, mixer(kv_source=0)), r"Rope of queries alone \(layer 1\)"),
    "shared keys without a rope": (lambda: model_of(mixer(rope=None), mixer(rope=None, kv_source=0)),
                                   r"Attend with another layer's keys \(layer 1\)"),
    "no norm": (lambda: model_of(replace(LAYER, norms=Norms(NORM, None))), r"Experts that read no norm \(layer 0\)"),
    "another eps": (lambda: model_of(LAYER, replace(LAYER, norms=Norms(NORM, Norm(1e-6)))),
                    r"Guess by another norm than the layer's own router has \(layer 0\)"),
    "choices": (lambda: model_of(LAYER, moe(router=Router(6, 3))), "its layers choose different numbers of experts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_device_does_not_compute(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(AssertionError, match="qmix's GPU kernels do not compute made: " + words):
        raise AssertionError(not_on_device(make()))


def test_all_that_the_cpu_runs_a_device_computes() -> None:
    assert ON_DEVICE == RUN

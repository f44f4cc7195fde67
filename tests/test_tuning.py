"""Which configuration is taken, with kernels and timers that the test makes up; and the real kernels, tiny, under
Triton's interpreter, with a timer that reads no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mixtrals import mixtral
from model_configs import TINY as TINY_KEYS
from model_configs import with_keys
from test_cuda import DEVICE, needs_triton
from torch import Tensor

from qmix.config import QuantConfig
from qmix.errors import QmixError
from qmix.kernels.attend import attend_torch
from qmix.kernels.configs import INTERPRETED, KERNELS, Attention, Configs, Dense, Gemv, Matmul, capability
from qmix.kernels.cuda_prompt import prompt_attention
from qmix.kernels.tuning import Case, Outcome, Work, candidates, choose
from qmix.models import read_model

DEFAULT = Configs()


class Card:
    """Kernels whose seconds and results are a function of the configuration; `now` is what runs while it is timed."""

    def __init__(self, seconds: Callable[[Gemv], float], result: Callable[[Gemv], Tensor] = lambda _: torch.ones(4)):
        self.seconds = seconds
        self.result = result
        self.now = DEFAULT.gemv
        self.timings = 0

    def case(self, name: str = "a case") -> Case:
        def start(configs: Configs) -> Work:
            def work(i: int) -> Tensor:
                self.now = configs.gemv
                return self.result(configs.gemv)

            return work

        return Case(name, start)

    def timer(self, work: Work) -> float:
        work(0)
        self.timings += 1
        return self.seconds(self.now)

    def choose(self, cases: int = 1) -> Outcome:
        return choose("gemv", DEFAULT, candidates("gemv"), [self.case(f"case {i}") for i in range(cases)], self.timer)


@pytest.mark.parametrize(("faster", "taken"), [(0.5, True), (1 / 1.04, True), (1 / 1.02, False), (2.0, False)])
def test_what_gains_little_keeps_the_default(faster: float, taken: bool) -> None:
    other = Gemv(64, 8)
    found = Card(lambda c: faster if c == other else 1.0).choose()
    assert found.changed == taken and found.chosen == (other if taken else DEFAULT.gemv)
    assert found.gain == pytest.approx(max(0, 1 / faster - 1)) and found.tried == 12 and found.skipped == ()


def test_the_fastest_is_taken_by_the_mean_over_cases() -> None:
    """Twice as fast in one case and half as fast in the other is no gain."""
    order: list[str] = []
    card = Card(lambda c: 1.0)

    def case(name: str) -> Case:
        def start(configs: Configs) -> Work:
            def work(i: int) -> Tensor:
                order.append(name)
                card.now = configs.gemv
                return torch.ones(1)

            return work

        return Case(name, start)

    def timer(work: Work) -> float:
        work(0)
        return {(32, "few"): 0.5, (32, "many"): 2.0, (64, "few"): 0.9, (64, "many"): 1.0}.get(
            (card.now.threads, order[-1]), 1.0)

    found = choose("gemv", DEFAULT, candidates("gemv"), [case("few"), case("many")], timer)
    assert isinstance(found.chosen, Gemv) and found.chosen.threads == 64
    assert found.gain == pytest.approx((1 / 0.9) ** 0.5 - 1)


def test_a_gain_that_does_not_come_again_is_none() -> None:
    """Another program had the card while the default was timed first."""
    card = Card(lambda c: 3.0 if card.timings == 1 else 1.0)
    found = card.choose()
    assert not found.changed and found.gain == pytest.approx(0)


def test_candidates_that_fail_or_are_wrong_are_skipped_and_counted() -> None:
    def result(config: Gemv) -> Tensor:
        if config.threads == 256:
            raise LookupError("out of resource: shared memory, Required: 200000\nmore")  # as foreign as Triton's
        if config.threads == 32:
            return torch.full((4,), float("nan") if config.unroll == 8 else 1 + 1e-3)
        return torch.ones(4) * (1 + 1e-6 * config.unroll)

    found = Card(lambda c: 0.5 if c.threads != 64 else 0.9, result).choose()
    assert found.tried == 12 and {c for c, _ in found.skipped} == {Gemv(t, u) for t in (32, 256) for u in (2, 4, 8)}
    reasons = dict(found.skipped)
    assert reasons[Gemv(256, 2)] == "LookupError: out of resource: shared memory, Required: 200000"
    assert "0.001 off" in reasons[Gemv(32, 2)] and "nan off" in reasons[Gemv(32, 8)]
    assert isinstance(found.chosen, Gemv) and found.chosen.threads == 128


def test_a_default_that_fails_is_an_error_and_so_is_a_broken_card() -> None:
    broken: list[bool] = []

    def breaks(config: Gemv) -> Tensor:
        if broken or config.threads == 32:
            broken.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return torch.ones(4)

    with pytest.raises(QmixError, match=r"tuning gemv: the built-in configuration failed: .* illegal memory access"):
        Card(lambda c: 1.0, breaks).choose()
    with pytest.raises(QmixError, match="gives NaN or infinity"):
        Card(lambda c: 1.0, lambda c: torch.full((1,), float("inf"))).choose()


def test_candidates_are_few_different_and_of_their_kernel() -> None:
    for kernel, kind in zip(KERNELS, (Gemv, Matmul, Dense, Attention), strict=True):
        options = candidates(kernel)
        assert all(type(option) is kind for option in options) and len(set(options)) == len(options) <= 20


TINY = mixtral(40, 32, 32, 2, 2, 1, 16, 3, 2, 1e6, 1e-5, 128)
FEW_OPTIONS = {"gemv": [Gemv(32, 2)], "dense": [Dense(8, 32, 2)], "matmul": [Matmul(64, 64, 4, 2)],
               "attention": [Attention(16, 16, 4, 1)]}


@needs_triton
class TestTrials:
    """What a model calls, on the real kernels."""

    @staticmethod
    def timer(work: Work) -> float:
        return 1.0  # without a call: the interpreter is slow

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_each_kernel_is_called_checked_and_timed(self, kernel: str) -> None:
        from qmix.kernels import trials

        shapes = replace(trials.Shapes.of("tiny", TINY, QuantConfig(group_size=32)), prompts=((20, 0), (20, 7)))
        at = trials.Place(DEVICE, torch.float16, 2000, 2**20)
        cases = trials.cases(kernel, shapes, at)
        assert len({case.name for case in cases}) == len(cases) > 0
        found = choose(kernel, INTERPRETED, FEW_OPTIONS[kernel], cases, self.timer)
        assert found.skipped == () and found.tried == 1 and not found.changed

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_calls_take_turns_among_the_weights(self, kernel: str) -> None:
        from qmix.kernels import trials

        shapes = replace(trials.Shapes.of("tiny", TINY, QuantConfig(group_size=32, dense="keep")), prompts=((20, 0),))
        for case in trials.cases(kernel, shapes, trials.Place(DEVICE, torch.float16, 2000, 2**20)):
            work = case.start(INTERPRETED)
            first = work(0).clone()
            assert not torch.equal(work(1), first), case.name

    def test_a_wrong_kernel_is_found_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from qmix.kernels import trials

        real = trials.attend_many

        def wrong(*args: Tensor, config: Attention) -> Tensor:
            return real(*args, config=config) * (1.1 if config.tokens == 16 else 1.0)

        monkeypatch.setattr(trials, "attend_many", wrong)
        shapes = replace(trials.Shapes.of("tiny", TINY, QuantConfig()), prompts=((20, 0),))
        cases = trials.cases("attention", shapes, trials.Place(DEVICE, torch.float16, 1, 1))
        found = choose("attention", INTERPRETED, FEW_OPTIONS["attention"], cases, self.timer)
        assert [reason for _, reason in found.skipped] == [
            "wrong numbers (20 tokens after 0, 2 heads of 16 on 1: 0.1 off)"]

    def test_mixtral_and_models_without_a_use_for_a_kernel(self) -> None:
        from qmix.kernels import trials

        shapes = trials.mixtral()
        assert [layout.nbytes for layout in shapes.layouts] == [99_090_432]
        assert [(m.format, m.rows, m.cols) for m in shapes.dense] == [
            ("int8", 6144, 4096), ("int8", 4096, 4096), ("int8", 32000, 4096)]
        at = trials.Place(DEVICE, torch.float16, 1, 1)
        kept = trials.Shapes.of("kept", TINY, QuantConfig("keep", "int4"))
        assert trials.cases("gemv", kept, at) == trials.cases("dense", kept, at) == []

    def test_each_shape_of_a_model_once(self) -> None:
        """Qwen3-MoE with dense layers in between, q and k wider than the hidden size; a dense model with a tied head; a
        model whose layers attend in two ways."""
        from qmix.kernels import trials

        config = read_model(with_keys(TINY_KEYS["qwen3_moe"], {
            "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "mlp_only_layers": [0], "vocab_size": 50}))
        shapes = trials.Shapes.of("qwen3", config, QuantConfig(group_size=32))
        assert [(m.rows, m.cols) for m in shapes.dense] == [(256, 64), (64, 128), (96, 64), (64, 96), (50, 64)]
        assert shapes.attentions == ((4, 2, 32),) and (shapes.experts, shapes.chosen) == (
            config.num_experts, config.top_k)
        tied = read_model(with_keys(TINY_KEYS["mistral"], {"tie_word_embeddings": True, "vocab_size": 50}))
        dense = trials.Shapes.of("mistral", tied, QuantConfig(group_size=32))
        assert (dense.experts, dense.chosen, len(dense.dense), len(dense.attentions)) == (1, 1, 3, 1)
        layers = [replace(layer, mixer=replace(layer.mixer, head_dim=16 * (1 + i % 2), rope=None))
                  for i, layer in enumerate(config.layers)]
        mixed = trials.Shapes.of("mixed", replace(config, layers=tuple(layers)), QuantConfig(group_size=32))
        assert mixed.attentions == ((4, 2, 16), (4, 2, 32)) and len(mixed.dense) == 7
        ours = prompt_attention(capability(DEVICE), Attention()) is not attend_torch
        cases = trials.cases("attention", mixed, trials.Place(DEVICE, torch.float16, 1, 1))
        assert len({case.name for case in cases}) == len(cases) == 2 * len(mixed.prompts) * ours

    @pytest.mark.parametrize(("card", "tuned"), [((7, 5), set()), ((9, 0), {"matmul"}),
                                                 ((8, 6), {"matmul", "attention"})])
    def test_what_torch_does_on_a_card_is_not_tuned(self, card: tuple[int, int], tuned: set[str],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
        from qmix.kernels import trials

        monkeypatch.setattr(trials, "capability", lambda place: card)
        shapes = replace(trials.Shapes.of("tiny", TINY, QuantConfig(group_size=32)), prompts=((20, 0),))
        at = trials.Place(DEVICE, torch.float16, 1, 2**20)
        assert {kernel for kernel in ("matmul", "attention") if trials.cases(kernel, shapes, at)} == tuned

    def test_copies_outgrow_the_cache_within_the_room(self) -> None:
        from qmix.kernels import trials

        place = trials.Place(DEVICE, torch.float16, 50, 1000)
        assert [place.copies(10), place.copies(400), place.copies(2000), place.copies(10, 40)] == [16, 2, 1, 40]


@needs_triton
@pytest.mark.parametrize(("launch", "before"), [(0.1, 1), (0.5, 2), (2.0, 7)])
def test_the_cards_timer_takes_the_median_of_calls_and_fills_the_card_before_each(
        launch: float, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With events whose clock the calls themselves advance: call i takes 10 * i ms, a copy a second. The host takes
    `launch` seconds for a call; three times as long the card is busy before it."""
    from qmix.kernels import trials

    clock, host, copies = [0.0], [0.0], [0]

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def copying(self: torch.Tensor, other: torch.Tensor) -> None:
        clock[0] += 1000.0
        copies[0] += 1

    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda place: None)
    monkeypatch.setattr("torch.empty", lambda *size, dtype, device: (sizes.append(size), torch.zeros(2, 4))[1])
    monkeypatch.setattr("torch.Tensor.copy_", copying)
    timer = trials.event_timer(torch.device("cpu"), 200 * 2**20, lambda: host[0])
    called: list[int] = []

    def work(i: int) -> Tensor:
        called.append(i)
        clock[0] += 10.0 * i
        host[0] += launch
        return torch.ones(1)

    assert timer(work) == pytest.approx(0.010 * (trials.TIMED // 2))
    assert called == [0, 0, *range(trials.TIMED)] and copies[0] == 2 + before * trials.TIMED
    assert sizes == [(2, 600 * 2**20)], "more than the cache"

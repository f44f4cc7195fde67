"""Layers beside Mixtral's as calls of the native library: a decoded token, alone and among drafts, has the bits that
it has Op by Op, and no piece of it is left to Op by Op."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from forward_models import IDS, PROMPT, plain_experts
from test_forward_eager import NORM, random_weights
from test_forward_runner import SIZE, decoded, packed
from torch import Tensor

from qmix.config import QuantConfig, Step
from qmix.forward import weights
from qmix.forward.kv_cache import SessionCache
from qmix.forward.recurrent import RecurrentLayer
from qmix.forward.run_eager import Guesses
from qmix.forward.runner import Runner
from qmix.kernels import native, torch_ops
from qmix.kernels.attention import choose_native_attentions
from qmix.kernels.table import select
from qmix.kernels.torch_ops import PlainWeights
from qmix.offload.needs import resident_dense_bytes
from qmix.sizes import dense_bytes
from qmix.spec import (
    Activation,
    Attention,
    DeltaNet,
    Expert,
    Layer,
    Mixer,
    Mlp,
    Model,
    Moe,
    Norm,
    Norms,
    Rope,
    Router,
    Yarn,
)

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native kernels were not built: no C compiler")
GLM_ROUTER = Router(8, 3, "sigmoid", normalize=True, eps=1e-20, scale=2.5, choice_bias=True, groups=4, top_groups=2,
                    group_score="top2")
YARN = Rope(150000.0, SIZE, Yarn(64, 4.0, truncate=False))
CLAMPED = Activation("swiglu_clamped", 1.702, 2.0)


def model(*layers: tuple[Attention, Moe | Mlp]) -> Model:
    return Model("test", 32, 96, 512, tuple(Layer(mixer, mlp, Norms(NORM, NORM)) for mixer, mlp in layers), NORM,
                 "bfloat16")


def glm() -> Model:
    """A dense layer first, partial rotary, norms of q and k, biases of q, k and v, a shared expert."""
    mixer = Attention(4, 2, SIZE, Rope(1000.0, SIZE // 2), q_norm=NORM, k_norm=NORM, bias="qkv")
    moe = Moe(GLM_ROUTER, Expert(24), shared=Mlp(40))
    return model((mixer, Mlp(56)), (mixer, moe), (mixer, moe))


def gpt_oss() -> Model:
    """Sinks, windows in every other layer, YaRN, every bias."""
    full = Attention(8, 2, SIZE, YARN, bias="qkvo", sinks=True)
    windowed = Attention(8, 2, SIZE, YARN, bias="qkvo", sinks=True, window=12)
    moe = Moe(Router(8, 3, logit_bias=True), Expert(24, CLAMPED, bias=True))
    return model((windowed, moe), (full, moe), (windowed, moe))


def others() -> Model:
    """Scores with a scale and a cap, dense layers of several widths behind each other, other activations."""
    mixer = Attention(4, 2, SIZE, Rope(1000.0, SIZE), scale=0.3, softcap=4.0)
    moe = Moe(Router(8, 3), Expert(24), shared=Mlp(24, Activation("geglu")))
    return model((mixer, Mlp(40, Activation("geglu"))), (mixer, moe), (mixer, Mlp(24, CLAMPED)), (mixer, Mlp(72)))


def qwen3_5() -> Model:
    """Gated delta nets, attention whose output is gated, partial rotary, norms by 1 + w, a shared expert's gate."""
    norm = Norm(1e-5, "one_plus")
    delta = DeltaNet(2, 4, 12, 20, 4, Norm(1e-5))
    attention = Attention(4, 2, SIZE, Rope(1000.0, SIZE // 4), q_norm=norm, k_norm=norm, output_gate=True)
    moe = Moe(Router(8, 3, over="all", normalize=True), Expert(24), shared=Mlp(40), shared_gate=True)
    mixers: tuple[Mixer, ...] = (delta, delta, attention, delta)
    return Model("test", 32, 96, 512, tuple(Layer(mixer, moe, Norms(norm, norm)) for mixer in mixers), norm, "bfloat16")


MODELS = {"qwen3_5": qwen3_5, "glm": glm, "gpt_oss": gpt_oss, "others": others}


def runner_of(spec: Model, kv: str, guesses: Guesses) -> Runner:
    drawn = random_weights(spec)
    kernels = select({"int4", "bf16"}, [32], say=lambda line: None, activations="auto")
    attends = choose_native_attentions(spec, kv, lambda line: None)
    experts = plain_experts(spec, PlainWeights(drawn))
    return Runner(spec, packed(spec, drawn, "int4", torch.bfloat16), kernels,
                  lambda layer, x, *how: experts(layer, x.float(), *how), guesses,
                  partial(SessionCache, kv=kv, native=attends))


@pytest.mark.parametrize("guesses", [Guesses(), Guesses(1, 4)], ids=["", "guesses"])
@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("name", MODELS)
def test_all_of_a_token_is_native_and_has_the_same_bits(name: str, level: str, kv: str, guesses: Guesses,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    if level == "portable" and kv == "bf16":
        pytest.skip("torch attends here")
    monkeypatch.setenv("QMIX_NATIVE", level)
    spec = MODELS[name]()
    runner, by_ops = runner_of(spec, kv, guesses), runner_of(spec, kv, guesses)
    by_ops._asked = True  # its single tokens are never native
    want = decoded(by_ops, IDS, PROMPT)
    assert torch.equal(decoded(runner, IDS, PROMPT), want) and want.std() > 0.5
    assert by_ops.single_tokens == "" and runner.single_tokens == "native" and runner._native is not None
    assert [run.reason for run in runner._native.runs] == [""] * len(runner._native.runs)
    assert runner._native._head is not None
    drafts_are_exact(runner, want)


def drafts_are_exact(runner: Runner, want: Tensor) -> None:
    """Two to eight tokens at once."""
    cache, at = runner.new_cache(64), PROMPT
    runner.forward(IDS[:PROMPT], torch.arange(PROMPT), [cache], Step("prefill"))
    for count in range(2, 9):
        found = runner.forward(IDS[at:at + count], torch.arange(at, at + count), [cache], Step("decode"), True)
        assert torch.equal(found, want[at:at + count])
        cache.trim(at)


def test_layers_that_choose_different_numbers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QMIX_NATIVE", raising=False)
    mixer = Attention(4, 2, SIZE, Rope(1000.0, SIZE))
    runner = runner_of(model((mixer, Moe(Router(8, 3), Expert(24))), (mixer, Moe(Router(8, 2), Expert(24)))), "int8",
                       Guesses())
    decoded(runner, IDS[:6], 4)
    assert runner.single_tokens == "layers choose different numbers of experts (2, 3)"


def test_taps_of_convolutions_are_made_once_in_fp32_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """For prompts, drafts and native tokens together."""
    monkeypatch.delenv("QMIX_NATIVE", raising=False)
    made: list[Tensor] = []

    def taps_of(weight: Tensor) -> Tensor:
        made.append(torch_ops.taps_of(weight))
        return made[-1]

    monkeypatch.setattr(weights, "taps_of", taps_of)
    spec, quant = qwen3_5(), QuantConfig()
    runner = runner_of(spec, "int8", Guesses())
    drafts_are_exact(runner, decoded(runner, IDS, PROMPT))
    assert runner.single_tokens == "native" and len(made) == 3
    stored = sum(4 * prod(t.shape) if t.role == "norm" else dense_bytes(spec, quant, t) for t in spec.tensors())
    assert resident_dense_bytes(spec, quant) - stored == sum(taps.nbytes for taps in made) == 3 * 4 * 4 * 128


def test_a_state_that_somebody_keeps_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native tokens write a state into memory of an earlier one: not of a snapshot, nor where the token fails."""
    monkeypatch.delenv("QMIX_NATIVE", raising=False)
    runner = runner_of(qwen3_5(), "int8", Guesses())
    cache, experts, failing = runner.new_cache(64), runner._eager.experts, False

    def maybe(layer: int, *given: Any) -> Tensor:
        if failing and layer == 2:
            raise MemoryError
        return experts(layer, *given)

    def four() -> Tensor:
        return torch.cat([runner.forward(IDS[at:at + 1], torch.tensor([at]), [cache], Step("decode"))
                          for at in range(PROMPT, PROMPT + 4)])

    runner._eager.experts = maybe
    runner.forward(IDS[:PROMPT], torch.arange(PROMPT), [cache], Step("prefill"))
    before = cache.snapshot()
    want = four()
    assert runner.single_tokens == "native"
    for _ in range(2):
        cache.restore(before)
        failing = True
        with pytest.raises(MemoryError):
            four()
        failing = False
        assert torch.equal(four(), want)
    four_layers = [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    taken = {(layer.state.now.data_ptr(), layer.past.now.data_ptr()) for layer in four_layers}
    cache.length -= 2
    runner.forward(IDS[:1], torch.tensor([cache.length]), [cache], Step("decode"))
    runner.forward(IDS[:1], torch.tensor([cache.length]), [cache], Step("decode"))
    assert taken == {(layer.state.now.data_ptr(), layer.past.now.data_ptr()) for layer in four_layers}  # no third one

"""The runner on packed weights: Mistral, Qwen3-MoE and OLMoE against transformers by way of a provider of experts, and
through the native kernels against torch; guesses, layers that are looked through alone, the bytes of a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bounds
import pytest
import torch
import transformers
from forward_models import BASE, IDS, PROMPT, canonical, eager, plain_experts, reference, run
from test_forward_eager import MOE, NORM, random_weights, spec_of
from test_forward_parity import build
from test_forward_program import MODELS
from torch import Tensor

from qmix.config import Step
from qmix.formats import Packed, pack, unpack
from qmix.forward.kv_cache import SessionCache
from qmix.forward.passes import Span
from qmix.forward.program import layer_program, pieces
from qmix.forward.recurrent import RecurrentLayer
from qmix.forward.run_eager import Guesses
from qmix.forward.runner import Runner
from qmix.forward.steps import run_ops
from qmix.forward.weights import PACKED, DenseWeights, assemble
from qmix.kernels import native, ops
from qmix.kernels.attention import choose_native_attentions
from qmix.kernels.kv_size import kv_bytes, recurrent_bytes
from qmix.kernels.table import select
from qmix.kernels.torch_ops import PlainWeights
from qmix.quantize.methods import quantize
from qmix.sizes import MatrixSpec
from qmix.spec import Attention, DeltaNet, Expert, Layer, Mlp, Model, Moe, Norm, Norms, Rope, Router

KEPT = {"residual", "normed", "ids", "topk_weights"}
SIZE = 16  # of a head: what the native kernels of attention take
needs_library = pytest.mark.skipif(not native.levels(), reason="the native kernels were not built: no C compiler")


def mistral() -> tuple[Any, Any, Model]:
    config = transformers.MistralConfig(**{**BASE, "intermediate_size": 40, "sliding_window": 12, "head_dim": SIZE})
    spec = build(config, "mistral", {"window": 12}, [Mlp(40)] * 3)
    return transformers.MistralForCausalLM, config, spec


def qwen3_moe() -> tuple[Any, Any, Model]:
    config = transformers.Qwen3MoeConfig(**{
        **BASE, "intermediate_size": 40, "head_dim": SIZE, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 16, "mlp_only_layers": [1], "norm_topk_prob": True})
    norm, moe = Norm(config.rms_norm_eps), Moe(Router(8, 3, over="all", normalize=True), Expert(16))
    return transformers.Qwen3MoeForCausalLM, config, build(
        config, "qwen3_moe", {"q_norm": norm, "k_norm": norm}, [moe, Mlp(40), moe])


def olmoe(bias: bool = False) -> tuple[Any, Any, Model]:
    config = transformers.OlmoeConfig(**{**BASE, "hidden_size": 64, "intermediate_size": 24, "num_experts": 8,
                                         "num_experts_per_tok": 3, "clip_qkv": 0.9, "attention_bias": bias})
    norm, moe = Norm(config.rms_norm_eps), Moe(Router(8, 3, over="all"), Expert(24))
    return transformers.OlmoeForCausalLM, config, build(config, "olmoe", {
        "q_norm": norm, "k_norm": norm, "norm_over": "whole", "clip_qkv": 0.9, "bias": "qkvo" if bias else "none",
    }, [moe] * 3)


MODELS_OF: dict[str, Callable[[], tuple[Any, Any, Model]]] = {"mistral": mistral, "qwen3_moe": qwen3_moe,
                                                              "olmoe": olmoe}


def packed(spec: Model, weights: dict[str, Tensor], kind: str, dtype: torch.dtype) -> DenseWeights:
    """Its dense matrices in a format: "fp32", "bf16" or "int4"."""
    roles = {t.name: t.role for t in spec.tensors()}

    def read(name: str) -> Packed | Tensor:
        tensor = weights[name].contiguous()
        if roles[name] not in PACKED:
            return tensor
        extra = {"group_size": 32, "block": 32} if kind == "int4" else {}
        spec = MatrixSpec(kind, *tensor.shape, **extra)
        return quantize(tensor, spec, "rtn") if extra else pack(tensor, spec)

    return assemble(spec, dtype, read)


def decoded(runner: Runner, ids: Tensor, prompt: int) -> Tensor:
    """Logits [T, V] of all tokens: the prompt at once, then token by token."""
    cache = runner.new_cache(len(ids) + 8)
    found = [runner.forward(ids[:prompt], torch.arange(prompt), [cache], Step("prefill"), True)]
    found += [runner.forward(ids[at:at + 1], torch.tensor([at]), [cache], Step("decode"))
              for at in range(prompt, len(ids))]
    return torch.cat(found)


@pytest.mark.parametrize("name", MODELS_OF)
def test_packed_in_fp32_it_gives_what_transformers_gives(name: str) -> None:
    model_class, config, spec = MODELS_OF[name]()
    model = reference(model_class, config)
    weights = canonical(model, spec)
    kernels = select({"fp32"}, say=lambda line: None)
    runner = Runner(spec, packed(spec, weights, "fp32", torch.float32), kernels,
                    plain_experts(spec, PlainWeights(weights)))
    with torch.inference_mode():
        want = model(IDS[None], use_cache=False).logits[0]
    assert want.std() > 1
    assert (decoded(runner, IDS, PROMPT) - want).abs().max() < 1e-4


@needs_library
@pytest.mark.parametrize("name", MODELS_OF)
def test_native_is_close_to_torch_and_drafts_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the unpacked numbers in fp32. Every activation is rounded to bf16, some of them twice."""
    monkeypatch.delenv("QMIX_NATIVE", raising=False)
    model_class, config, spec = MODELS_OF[name]()
    weights = canonical(reference(model_class, config), spec)
    dense = packed(spec, weights, "int4", torch.bfloat16)
    rounded = weights | {name: unpack(matrix) for name, matrix in dense.matrices.items()}
    runner = native_runner(model_class, config, spec, rounded)
    got = decoded(runner, IDS, PROMPT)
    want = run(eager(spec, rounded), IDS, PROMPT)
    errors = (got - want).norm(dim=1) / want.norm(dim=1)
    assert 0 < errors.median() < bounds.model_apart(3)
    on_portable = next(iter(native.levels())) == "portable"
    assert (runner.single_tokens == "native") == (not on_portable)
    cache, count = runner.new_cache(64), len(IDS) - PROMPT
    runner.forward(IDS[:PROMPT], torch.arange(PROMPT), [cache], Step("prefill"))
    for begin in range(PROMPT, len(IDS), 8):
        ids = IDS[begin:begin + 8]
        positions = torch.arange(begin, begin + len(ids))
        together = runner.forward(ids, positions, [cache], Step("decode"), True)
        assert torch.equal(together, got[begin:begin + 8])
    assert cache.length == PROMPT + count


def test_guesses_are_what_the_next_routers_would_say() -> None:
    """Of a router that reads the residual in its own way, behind a layer without experts, and a softmax over all."""
    own = Router(5, 2, over="all", normalize=True, input="residual", input_norm=NORM, input_scale=True,
                 input_factor=0.5, choice_bias=True, groups=1)
    mlps = [MOE, Moe(own, Expert(32)), Mlp(16), MOE]
    mixer = Attention(4, 2, 8, Rope(1000.0, 8))
    spec = Model("test", 32, 96, 512, tuple(Layer(mixer, mlp, Norms(NORM, NORM)) for mlp in mlps), NORM, "float32")
    weights, seen = random_weights(spec), []
    experts = plain_experts(spec, PlainWeights(weights))

    def watched(layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, step: Step, ahead: Tensor | None,
                wanted: Tensor | None) -> Tensor:
        seen.append((layer, None if ahead is None else ahead.clone()))
        return experts(layer, x, ids, topk_weights, step, ahead, wanted)

    kernels = select({"fp32"}, say=lambda line: None)
    runner = Runner(spec, packed(spec, weights, "fp32", torch.float32), kernels, watched, Guesses(2, 3))
    cache = runner.new_cache(16)
    runner.forward(IDS[:9], torch.arange(9), [cache], Step("prefill"))
    assert [found for _, found in seen] == [None] * 3
    seen.clear()
    runner.forward(IDS[9:11], torch.arange(9, 11), [cache], Step("decode"), True)
    assert [(layer, None if found is None else tuple(found.shape)) for layer, found in seen] == [
        (0, (2, 2, 3)), (1, (2, 1, 3)), (3, None)]
    residual = routed_residual(spec, weights, cache)
    own_input = residual / (residual.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[
        "layers.1.router.input_norm"] * weights["layers.1.router.input_scale"] * 0.5
    scores = (own_input @ weights["layers.1.router.weight"].T).softmax(-1) + weights["layers.1.router.choice_bias"]
    assert torch.equal(seen[0][1][:, 0], scores.topk(3).indices)


def routed_residual(spec: Model, weights: dict[str, Tensor], cache: SessionCache) -> Tensor:
    """What the router of layer 0 sees of the last two tokens, computed by its Ops over a cache of its own."""
    alone = SessionCache(spec, 16, only={0})
    buffers = {"residual": weights["embedding"][IDS[:11]].clone()}
    program = pieces(layer_program(spec, 0))[0]
    run_ops(spec, program, PlainWeights(weights), buffers, [Span(alone, 0, 0, 11)], {"residual"})
    return buffers["residual"][9:]


@pytest.mark.parametrize("kind", ["full", "window", "delta"])
def test_a_layer_alone_gives_what_it_gives_in_a_pass(kind: str) -> None:
    """Two sequences at once, as calibration looks through a layer; every Op is seen with what it reads."""
    spec = spec_of(kind)
    weights, seen = random_weights(spec), []
    w = PlainWeights(weights)
    want: Any = [run(eager(spec, weights), ids, len(ids)) for ids in (IDS[:9], IDS[20:29])]
    residual = weights["embedding"][torch.cat((IDS[:9], IDS[20:29]))].clone()
    experts = plain_experts(spec, w)
    for i in range(len(spec.layers)):
        caches = [SessionCache(spec, 9, only={i}) for _ in range(2)]
        spans = [Span(cache, 0, at * 9, at * 9 + 9) for at, cache in enumerate(caches)]
        buffers = {"residual": residual}
        for piece in pieces(layer_program(spec, i)):
            op = piece[0]
            if isinstance(op, ops.Experts):
                buffers["moe"] = experts(i, buffers["normed"], buffers["ids"], buffers["topk_weights"],
                                         Step("prefill"), None, None)
            elif not isinstance(op, ops.Take):
                run_ops(spec, piece, w, buffers, spans, KEPT, lambda op, inputs: seen.append((op, inputs)))
        residual = buffers["residual"]
    head, want = eager(spec, weights).head(residual), torch.cat(want)
    assert (head - want).norm() < 1e-4 * want.norm()  # other sums of products; a wrong position moves it by a tenth
    linear = [(op.weight.name, tuple(inputs[0].shape)) for op, inputs in seen if isinstance(op, ops.Linear)]
    assert ("layers.1.attention.o", (18, 32)) in linear


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("rings", [False, True])
@pytest.mark.parametrize("name", ["full", "window", "delta", "mixtral", "everything"])
def test_bytes_of_a_cache_are_known_beforehand(name: str, rings: bool, kv: str) -> None:
    if rings and kv == "int8":
        pytest.skip("no ring of codes")
    spec = MODELS[name] if name in MODELS else spec_of(name)
    for capacity in (5, 200):
        for dtype in (torch.bfloat16, torch.float32):
            cache = SessionCache(spec, capacity, dtype, kv, rings=rings)
            assert cache.nbytes == kv_bytes(spec, capacity, dtype.itemsize, kv, rings)
            recurrent = [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]
            others = [layer for layer in cache.layers if layer is not None and layer not in recurrent]
            held = {t.data_ptr(): t.nbytes for layer in others for t in vars(layer).values() if isinstance(t, Tensor)}
            assert sum(held.values()) == sum(layer.nbytes for layer in others)
            nets = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, DeltaNet)]
            assert [layer.state.now.nbytes + layer.past.now.nbytes for layer in recurrent] == \
                [recurrent_bytes(net) for net in nets]  # and room for earlier ones
            assert len(cache.addresses) == len(spec.layers)


def native_runner(class_: Any, config: Any, spec: Model, of_experts: dict[str, Tensor] | None = None,
                  kind: str = "int4") -> Runner:
    weights = canonical(reference(class_, config), spec)
    kernels = select({"int4", "bf16"}, [32], say=lambda line: None)
    caches = partial(SessionCache, native=choose_native_attentions(spec, "bf16", lambda line: None))
    experts = plain_experts(spec, PlainWeights(of_experts or weights))
    return Runner(spec, packed(spec, weights, kind, torch.bfloat16), kernels,
                  lambda layer, x, *how: experts(layer, x.float(), *how), caches=caches)


@needs_library
def test_what_the_native_kernels_lack_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in bf16; of Qwen3-MoE with a dense layer in int4 nothing is."""
    level = next(iter(native.levels()))
    if level == "portable":
        pytest.skip("torch attends here")
    monkeypatch.setenv("QMIX_NATIVE", level)
    runner = native_runner(*qwen3_moe())
    assert runner.single_tokens == ""
    decoded(runner, IDS[:3], 2)
    assert runner.single_tokens == "native" and runner._native is not None
    assert [run.reason for run in runner._native.runs] == ["", "", ""]
    assert runner._native._head is not None
    runner = native_runner(*qwen3_moe(), kind="bf16")
    decoded(runner, IDS[:3], 2)
    assert "bf16, which the native kernels do not compute" in runner.single_tokens


def test_an_observer_changes_no_bit_of_a_prompt() -> None:
    spec = spec_of("full")
    weights = random_weights(spec)
    found = []
    for seen in (None, lambda op, inputs: None):
        model = eager(spec, weights, seen=seen)
        found.append(model.forward(IDS[:20], [model.new_cache(20)], Step("prefill"), True))
    assert torch.equal(*found)

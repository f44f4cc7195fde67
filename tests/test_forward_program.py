"""A model's program: it uses every tensor of the spec, it sums up to what is known of Mixtral, and its cuts fit."""

from __future__ import annotations

from math import prod

import pytest
from test_forward_spikes import gemma4_layer
from transformers import Gemma4TextConfig

from qmix.errors import ConfigError
from qmix.forward.program import layer_program, live, model_program, pieces
from qmix.kernels import ops
from qmix.kernels.op import BytesOf
from qmix.spec import (
    Attention,
    Branch,
    DeltaNet,
    Expert,
    Layer,
    LongRope,
    Mlp,
    Model,
    Moe,
    Norm,
    Norms,
    Proportional,
    Rope,
    Router,
    Tensor,
)

NORM, NONE = Norm(1e-5), Norm(1e-5, "none")
ROPE = Rope(1e6, 128)
MIXTRAL = Model("mixtral", 4096, 32000, 32768, (Layer(
    Attention(32, 8, 128, ROPE), Moe(Router(8, 2), Expert(14336)), Norms(NORM, NORM)),) * 32, NORM)
ALL = Attention(4, 2, 8, Rope(1e4, 4), 0.3, 5, NORM, NORM, NORM, "whole", "qkvo", 2.0, True, True, 30.0)
ROUTER = Router(8, 2, "sigmoid", "all", True, 1e-20, True, True, 4, 2, "top2", 2.0, True, "residual", NORM, True, 0.5)
EVERYTHING = Moe(ROUTER, Expert(16, bias=True), Branch(NORM, NORM), Mlp(24), False, (Mlp(8), Branch(NORM, NORM)))
MODELS = {
    "mixtral": MIXTRAL,
    "dense": Model("x", 64, 96, 512, (Layer(ALL, Mlp(40), Norms(NORM, NORM, NORM, NORM), True),) * 2, NORM, tied=True),
    "everything": Model("x", 64, 96, 512, (
        Layer(ALL, EVERYTHING, Norms(NORM, None, NORM, NORM), True), Layer(ALL, Mlp(40), Norms(None, None)),
        Layer(DeltaNet(2, 4, 8, 12, 4, NORM), Moe(Router(4, 1), Expert(8), shared=Mlp(8), shared_gate=True),
              Norms(NONE, NORM)), Layer(Attention(4, 2, 8, None, v_from_k=True), EVERYTHING, Norms(NORM, NORM)),
        Layer(Attention(8, 2, 8, None, bias="qkv", kv_source=3), Mlp(8), Norms(NORM, NORM))), NORM),
}


def size_of(bits: float = 16) -> BytesOf:
    return lambda tensor: int(prod(tensor.shape) * bits) // 8


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_the_spec_is_used_and_no_other(name: str) -> None:
    """v_from_k reads the key projection twice, tied embeddings are the head too: else each is used once."""
    model = MODELS[name]
    used = [t for op in model_program(model) for t in op.weights]
    assert set(used) == set(model.tensors())
    twice = {t.name for t in used if used.count(t) > 1}
    assert twice == {"mixtral": set(), "dense": {"embedding"}, "everything": {"layers.3.attention.k"}}[name]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_read_before_it_is_written(name: str) -> None:
    program = model_program(MODELS[name])
    assert live(program) == {"tokens"}
    for i in range(len(MODELS[name].layers)):
        assert live(layer_program(MODELS[name], i)) == {"residual"}


@pytest.mark.parametrize("name", MODELS)
def test_pieces_are_the_program_cut_at_experts_and_at_the_last_rows(name: str) -> None:
    program = model_program(MODELS[name])
    cut = pieces(program)
    assert tuple(op for piece in cut for op in piece) == program
    for piece in cut:
        kinds = [type(op) for op in piece]
        assert kinds in ([ops.Take], [ops.Experts, ops.Combine]) or not {ops.Take, ops.Experts, ops.Combine} & {*kinds}
    takes = [op for op in program if isinstance(op, ops.Take)]
    assert len(takes) == 1
    at = program.index(takes[0])
    last, after = program[at - 1], program[at + 1:]
    given = {last.out} if isinstance(last, ops.Combine) else set()  # the wanted rows alone, already
    assert live(after) == set(takes[0].buffers) | given
    experts = [op for op in program if isinstance(op, ops.Experts)]
    assert [op for op in experts if op.last] == (experts[-1:] if given else [])
    assert not any(isinstance(op, ops.Attend | ops.Conv | ops.Delta | ops.Route) for op in after)


def test_what_a_token_of_mixtral_reads_and_computes() -> None:
    """By hand, at 16 bits: the dense part and two of eight experts a layer; of the embedding one row; at a context of
    1000, keys and values of 8 heads of 128. Two operations a weight, and 4 a position and dimension in attention."""
    program = model_program(MIXTRAL)
    attention, expert, router, norms = 4096 * (2 * 4096 + 2 * 1024), 3 * 4096 * 14336, 8 * 4096, 2 * 4096
    weights = 32 * (attention + 2 * expert + router + norms) + 32000 * 4096 + 4096 + 4096
    assert sum(op.bytes_read(1, size_of(), 1000) for op in program) == 2 * (weights + 32 * 1000 * 2 * 8 * 128)
    products = 32 * (attention + 2 * expert + router) + 32000 * 4096
    assert sum(op.flops(1, 1000) for op in program) == 2 * products + 32 * 4 * 1000 * 32 * 128


def test_what_many_tokens_read() -> None:
    """Of the experts all, once; of a window no more than itself."""
    layer = layer_program(MIXTRAL, 0)
    experts = next(op for op in layer if isinstance(op, ops.Experts))
    one = 3 * 4096 * 14336 * 2
    assert [experts.bytes_read(tokens, size_of()) for tokens in (1, 3, 512)] == [2 * one, 6 * one, 8 * one]
    attend = next(op for op in layer_program(MODELS["everything"], 0) if isinstance(op, ops.Attend))
    assert attend.bytes_read(1, size_of(), 1000, kv_bytes=1) == 2 * 5 * 2 * 8 + 2 * 4  # 4 sinks
    delta = next(op for op in layer_program(MODELS["everything"], 2) if isinstance(op, ops.Delta))
    assert delta.bytes_read(1, size_of(), 1000) == 4 * 4 * 8 * 12 + 2 * (4 + 4)


def test_scratch_is_the_buffers_that_are_added() -> None:
    """A layer of Mixtral, one token: normed, q, k, v, attended, mixed, normed and wide, ids and weights, rows, moe."""
    want = 4 * (4096 + 4096 + 2 * 1024 + 4096 + 4096 + 2 * 4096 + 2 * 4096 + 4096) + 2 * (8 + 4)
    assert sum(op.scratch(1) for op in layer_program(MIXTRAL, 0)) == want
    assert sum(op.scratch(7) for op in layer_program(MIXTRAL, 0)) == 7 * want


def test_gemma4_reads_the_same_residual_three_ways() -> None:
    config = Gemma4TextConfig(num_hidden_layers=4, hidden_size=32, enable_moe_block=True, attention_k_eq_v=True,
                              num_global_key_value_heads=1, layer_types=["sliding_attention", "full_attention"] * 2)
    model = Model("gemma4", 32, 96, 256, tuple(gemma4_layer(config, i, 1) for i in range(4)), NORM)
    norms = [op for op in layer_program(model, 0) if isinstance(op, ops.Norm) and op.source == "residual"]
    assert [op.weight and op.weight.name.removeprefix("layers.0.") for op in norms] == [
        "before_mixer", "router.input_scale", "routed.norm_in", "beside.norm_in"]


def broken() -> dict[str, object]:
    layer = MIXTRAL.layers[0]
    other = Layer(Attention(4, 1, 8, None, kv_source=0), layer.mlp, layer.norms)
    return {
        "layers.1.kv_source: got 0, want a layer with keys and values of its own, in the same heads":
            lambda: Model("x", 64, 96, 512, (Layer(ALL, EVERYTHING, Norms(NORM, NORM)), other), NORM),
        "layers.0.kv_source: got 0, want a layer before 0": lambda: Model("x", 64, 96, 512, (other,), NORM),
        "router.input: got 'mlp', want 'residual'": lambda: Router(8, 2, input_scale=True),
        "router.input_norm: got None, want a norm of the residual": lambda: Router(8, 2, input="residual"),
        "router.group_score: got 'top2', want groups of two": lambda: Router(8, 2, groups=8, top_groups=2,
                                                                             group_score="top2"),
        "router.eps: got -1": lambda: Router(8, 2, eps=-1.0),
        "moe.shared_gate: got True, want a shared MLP": lambda: Moe(Router(8, 2), Expert(8), shared_gate=True),
        "moe.shared_gate: got True, want no norm": lambda: Moe(Router(8, 2), Expert(8), Branch(NORM), Mlp(8), True),
        "rope.scaling.short_factor: got 3, want dim / 2 = 4":
            lambda: Rope(1e4, 8, LongRope(64, (1.0,) * 3, (2.0,) * 3)),
        "rope.scaling.rotated: got 10, want": lambda: Rope(1e4, 8, Proportional(10)),
    }


@pytest.mark.parametrize("message", broken())
def test_a_spec_that_no_program_can_run_is_refused(message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        broken()[message]()  # type: ignore[operator]
    assert message in str(caught.value)


def test_a_layer_without_experts_in_a_model_with_them_is_dense() -> None:
    assert Tensor("layers.1.mlp.gate", (40, 64), "mlp") in MODELS["everything"].tensors()
    assert {key.layer for key in MODELS["everything"].expert_keys} == {0, 2, 3}

"""The operations of decoding that Mixtral does not launch, at the shapes of models that do, for launches.py to compile:
routers of many experts and of every rule, norms of heads, heads of which a part rotates or nothing, attention with
sinks, a scale and a cap, dense MLPs, a packed embedding, and experts of Qwen3-30B-A3B's size and of gpt-oss's, which
have biases.

T tokens, H hidden, E experts, K chosen per token, Q query heads, KV key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from dry_launches import Launches
from torch import Tensor

from qmix.formats.packed import TORCH_DTYPES, Packed
from qmix.kernels import configs, cuda_prompt
from qmix.kernels.attend import Softmax
from qmix.kernels.device_ops import DeviceOps, ExpertSlots, Later
from qmix.kernels.router import RouterTensors
from qmix.sizes import MatrixSpec, RecordLayout, with_layout
from qmix.spec import Activation, Router

LAYERS, GUESSES, CAPACITY = 3, 8, 8192
SIZES = ((2048, 128, 8), (2048, 512, 10))  # hidden, experts, chosen: Qwen3-30B-A3B, Qwen3-Next
RULES = {
    "softmax over all": {"over": "all"},
    "normalized": {"over": "all", "normalize": True},
    "biased sigmoid in groups": {"score": "sigmoid", "normalize": True, "eps": 1e-20, "scale": 2.5, "groups": 8,
                                 "top_groups": 4, "group_score": "top2", "choice_bias": True},
    "biased, scaled": {"logit_bias": True, "expert_scale": True},
}
# Query heads, key-value heads, head size, dimensions that rotate: those that differ most come first, GLM-4.5-Air (part
# of a head rotates), an odd size with a key-value head for each query head, and a layer without positions; then
# Qwen3-30B-A3B, Qwen3-235B-A22B and OLMoE.
HEADS = ((96, 8, 128, 64), (8, 8, 80, 80), (8, 2, 96, 0), (32, 4, 128, 128), (64, 4, 128, 128), (16, 16, 128, 128))


def router(experts: int, k: int, hidden: int, rule: dict[str, object]) -> RouterTensors:
    """A router of the rule, bf16."""
    spec = Router(experts, k, **rule)  # type: ignore[arg-type]

    def vector(wanted: bool) -> Tensor | None:
        return _floats(experts) if wanted else None

    return RouterTensors(spec, torch.empty(experts, hidden, dtype=torch.bfloat16), vector(spec.logit_bias),
                         vector(spec.choice_bias), vector(spec.expert_scale))


def launch_ops(ops: DeviceOps, found: Launches, tokens: int, half: torch.dtype, models: int = len(HEADS)) -> None:
    """Each of them once, for `tokens` at a time, within `recording`. half: of the card's 16-bit values, in caches;
    models: of how many of HEADS, each of which takes seconds to compile. With fewer than all each rule of routers is
    compiled for one of SIZES in turn, else for each."""
    found.label = f"ops, decode {tokens}"
    for call in (*_routers(ops, tokens, models), *_heads(ops, tokens, half, models), _own_scores(ops, tokens, half),
                 *_rows(ops, tokens), *_experts(ops, tokens)):
        call()


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape)


def _routers(ops: DeviceOps, tokens: int, models: int) -> Iterator[Callable[[], None]]:
    each = [(size, rule) for i, rule in enumerate(RULES.values()) for j, size in enumerate(SIZES)
            if models == len(HEADS) or i % len(SIZES) == j]
    for (hidden, experts, k), rule in each:
        def ask(hidden: int = hidden, experts: int = experts, k: int = k, rule: dict[str, object] = rule) -> None:
            every = [router(experts, k, hidden, rule) for _ in range(LAYERS)]
            later = Later([_floats(hidden)] * 2, every[1:], torch.empty(tokens, 2, GUESSES, dtype=torch.int32))
            ops.route(_floats(tokens, hidden), _floats(hidden), every[0], 1e-6, _floats(tokens, hidden),
                      torch.empty(tokens, k, dtype=torch.int32), _floats(tokens, k), later)

        yield ask


def _heads(ops: DeviceOps, tokens: int, half: torch.dtype, models: int) -> Iterator[Callable[[], None]]:
    for heads, kv, size, turned in HEADS[:models]:
        def attend(heads: int = heads, kv: int = kv, size: int = size, turned: int = turned) -> None:
            qkv, cos_sin = _floats(tokens, (heads + 2 * kv) * size), _floats(tokens, turned) if turned else None
            ops.head_norm(qkv[:, :heads * size], size, _floats(size), 1e-6)
            ops.head_norm(qkv[:, :heads * size], heads * size, _floats(heads * size), 1e-5, 8.0)
            ops.head_norm(qkv, size, None, None, 8.0)
            if cos_sin is not None:
                ops.rope_cos_sin(torch.zeros(tokens, dtype=torch.int64), _floats(turned // 2), cos_sin, 1.25)
            for dtype in (half, torch.int8) if heads == HEADS[0][0] else (half,):
                keys, values = torch.empty(2, kv, CAPACITY, size, dtype=dtype).unbind()
                scales = torch.empty(2, kv, CAPACITY).unbind() if dtype == torch.int8 else None
                ops.rope_attend(qkv, cos_sin, keys, values, torch.zeros(tokens, dtype=torch.int64), None,
                                _floats(tokens, heads * size), scales)  # type: ignore[arg-type]

        yield attend


def _own_scores(ops: DeviceOps, tokens: int, half: torch.dtype) -> Callable[[], None]:
    """Of gpt-oss's heads, in a window, in decoding and in a prompt."""
    heads, kv, size, window = 64, 8, 64, 128

    def attend() -> None:
        softmax, cache = Softmax(_floats(heads), 0.2, 30.0), torch.empty(2, kv, CAPACITY, size, dtype=half)
        ops.rope_attend(_floats(tokens, (heads + 2 * kv) * size), _floats(tokens, size), cache[0], cache[1],
                        torch.zeros(tokens, dtype=torch.int64), window, _floats(tokens, heads * size), None, softmax)
        card = cuda_prompt.capability(cache.device)
        prompt = cuda_prompt.choose_prompt_attention(card, configs.built_in(card).attention)
        query = torch.empty(512, heads, size, dtype=half)
        prompt(query, cache[0, :, :512], cache[1, :, :512], window, softmax)

    return attend


def _rows(ops: DeviceOps, tokens: int) -> Iterator[Callable[[], None]]:
    x, y = _floats(tokens, 2048), _floats(tokens, 2048)
    both = _floats(tokens, 2 * 6144)
    for activation in (Activation(), Activation("geglu"), Activation("swiglu_clamped", 1.702, 7.0)):
        yield partial(ops.activate, activation, both[:, :6144], both[:, 6144:], both[:, :6144])
    spec = MatrixSpec(rows=4096, cols=2048, **with_layout("q6_k"))
    packed = Packed.of(spec, {t.name: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in spec.tensors})
    yield lambda: ops.embed(torch.empty(tokens, dtype=torch.int64), packed, x)
    yield lambda: ops.combine(_floats(tokens, 8, 2048), _floats(tokens, 8), x)
    yield lambda: ops.gate(x, y)
    yield lambda: ops.gate(x, y[:, :1], "silu")
    yield lambda: ops.add(x, y)
    yield lambda: ops.scale(x, y[0], 0.5)
    yield lambda: ops.scale(x, factor=0.5)
    yield lambda: ops.norm(x, None, 1e-6, y)
    yield lambda: ops.norm(x, y[0], 1e-6, y, _floats(tokens, 8, 2048), _floats(tokens, 8))


def _experts(ops: DeviceOps, tokens: int) -> Iterator[Callable[[], None]]:
    for hidden, inner, experts, k, biased in ((2048, 768, 128, 8, False), (2880, 2880, 32, 4, True)):
        how = Activation("swiglu_clamped", 1.702, 7.0) if biased else Activation()
        record = RecordLayout(MatrixSpec("int4", 2 * inner, hidden, 2, 64, 64, bias=biased, activation=how),
                              MatrixSpec("int4", hidden, inner, 1, 64, 64, bias=biased))

        def compute(record: RecordLayout = record, experts: int = experts, k: int = k) -> None:
            slots, hidden = ExpertSlots(torch.empty(16, record.nbytes, dtype=torch.uint8), record, ()), record.w2.rows
            ids = torch.zeros(tokens, k, dtype=torch.int32)
            ops.experts(_floats(tokens, hidden), slots, ids, torch.zeros(experts, dtype=torch.int32),
                        _floats(tokens, k, hidden))

        yield compute

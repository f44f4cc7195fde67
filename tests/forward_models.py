"""Tiny random transformers models as oracles of qmix/forward, and their weights by canonical name, mapped by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qmix.config import Step
from qmix.forward.kv_cache import SessionCache
from qmix.forward.run_eager import Eager, ExpertsBy, program_of
from qmix.kernels import ops, torch_ops
from qmix.kernels.layer import TORCH
from qmix.kernels.torch_ops import PlainWeights
from qmix.spec import Model

IDS = torch.randint(0, 96, (46,), generator=torch.Generator().manual_seed(1))
PROMPT = 33
BASE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None,
                        "bos_token_id": 1, "eos_token_id": 2}

# What follows "model.layers.3." -> what follows "layers.3."; of a whole model without that.
NAMES: dict[str, str] = {
    r"model\.embed_tokens\.weight": "embedding", r"model\.norm\.weight": "final_norm", r"lm_head\.weight": "head",
    r"input_layernorm\.weight": "before_mixer", r"post_attention_layernorm\.weight": "before_mlp",
    r"self_attn\.([qkvo])_proj\.weight": r"attention.\1", r"self_attn\.([qkvo])_proj\.bias": r"attention.\1_bias",
    r"self_attn\.([qk]_norm)\.weight": r"attention.\1", r"self_attn\.sinks": "attention.sinks",
    r"mlp\.(?:gate|router)\.weight": "router.weight", r"mlp\.router\.bias": "router.logit_bias",
    r"mlp\.gate\.e_score_correction_bias": "router.choice_bias",
    r"mlp\.(gate|up|down)_proj\.weight": r"mlp.\1",
    r"mlp\.shared_experts?\.(gate|up|down)_proj\.weight": r"shared.\1",
    r"mlp\.shared_expert_gate\.weight": "shared.switch",
    r"linear_attn\.(?:A_log)": "delta.a_log", r"linear_attn\.dt_bias": "delta.dt_bias",
    r"linear_attn\.norm\.weight": "delta.norm", r"linear_attn\.out_proj\.weight": "delta.o",
    r"linear_attn\.in_proj_([zba])\.weight": r"delta.\1",
}
GEMMA: dict[str, str] = {
    r"post_attention_layernorm\.weight": "after_mixer", r"layer_scalar": "output_scale",
    r"pre_feedforward_layernorm\.weight": "beside.norm_in", r"post_feedforward_layernorm_1\.weight": "beside.norm_out",
    r"pre_feedforward_layernorm_2\.weight": "routed.norm_in",
    r"post_feedforward_layernorm_2\.weight": "routed.norm_out", r"post_feedforward_layernorm\.weight": "after_mlp",
    r"router\.scale": "router.input_scale", r"router\.per_expert_scale": "router.expert_scale",
    r"router\.proj\.weight": "router.weight", r"mlp\.(gate|up|down)_proj\.weight": r"beside.\1",
}


def reference(model_class: Any, config: Any, seed: int = 0) -> Any:
    """transformers' model with every parameter and every buffer of its state random: none is 0 or 1 for the many."""
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = model_class(config).float().eval()
    random = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=random)
        if tensor.numel() == 1:  # as far from 0 and 1 as norms are for the most part
            tensor.copy_(1 + drawn.sign() * (0.1 + 0.1 * drawn.abs()))
            continue
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            drawn *= 1.5 * tensor.shape[-1 if tensor.shape[-2] != 32 else -2] ** -0.5
        elif tensor.dim() == 3:  # the taps of a convolution
            drawn *= 0.5
        elif "embed_tokens" in name:
            drawn *= 2.0 if not config.tie_word_embeddings else 0.6
        elif "bias" in name or "sinks" in name or "A_log" in name:
            drawn *= 0.5
        elif tensor.dim() == 2:
            drawn *= (3.0 if "lm_head" in name else 2.0 if "gate.weight" in name or "router" in name else 1.0
                      ) * tensor.shape[-1] ** -0.5
        else:  # norms and scales; Qwen3.5's norms are 1 + weight, but for one
            one_plus = config.model_type.startswith(("qwen3_5", "qwen3_next")) and "linear_attn" not in name
            drawn = 0.3 * drawn + (not one_plus)
        tensor.copy_(drawn)
    return model


def canonical(model: Any, spec: Model, names: dict[str, str] = NAMES) -> dict[str, Tensor]:
    """Its weights by qmix's names: every one of them used, none missing, all of the shapes that the spec says."""
    dense = not spec.moe_layers
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if spec.tied and name == "lm_head.weight":
            continue
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        prefix, rest = (f"layers.{layer[1]}.", layer[2]) if layer else ("", name)
        for part, value in _parts(rest, tensor, spec, int(layer[1]) if layer else 0, names):
            part = part.replace("mlp.", "experts.0.") if dense else part
            assert prefix + part not in found, name
            found[prefix + part] = value
    wanted = [*spec.tensors(), *(t for key in spec.expert_keys for t in spec.expert_tensors(key))]
    assert {t.name: t.shape for t in wanted} == {name: tuple(t.shape) for name, t in found.items()}
    return found


def _parts(name: str, tensor: Tensor, spec: Model, layer: int, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """What one tensor of a checkpoint becomes."""
    mixer: Any = spec.layers[layer].mixer
    if re.search(r"(^|\.)experts\.", name):
        yield from _experts(name, tensor, spec.architecture)
    elif name.startswith("self_attn.q_proj.") and mixer.output_gate:
        q, gate = tensor.unflatten(0, (mixer.heads, 2, mixer.head_dim)).unbind(1)
        bias = "_bias" if name.endswith("bias") else ""
        yield from ((f"attention.q{bias}", q.flatten(0, 1)), (f"attention.gate{bias}", gate.flatten(0, 1)))
    elif name == "linear_attn.in_proj_qkv.weight":
        keys = mixer.key_heads * mixer.key_dim
        yield from zip(("delta.q", "delta.k", "delta.v"),
                       tensor.split((keys, keys, len(tensor) - 2 * keys)), strict=True)
    elif name == "linear_attn.conv1d.weight":
        yield "delta.conv", tensor[:, 0]
    else:
        fitting = [(re.fullmatch(pattern, name), new) for pattern, new in names.items()]
        match, new = next((match, new) for match, new in fitting if match)
        yield match.expand(new), tensor


def _experts(name: str, tensor: Tensor, architecture: str) -> Iterator[tuple[str, Tensor]]:
    bias = "_bias" if name.endswith("_bias") else ""
    for e, one in enumerate(tensor):
        if architecture == "gpt_oss" and not bias:
            one = one.T
        if "down" in name:
            yield f"experts.{e}.down{bias}", one
        else:
            gate, up = (one[::2], one[1::2]) if architecture == "gpt_oss" else one.chunk(2)
            yield from ((f"experts.{e}.gate{bias}", gate), (f"experts.{e}.up{bias}", up))


def eager(spec: Model, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32,
          seen: Callable[..., None] | None = None) -> Eager:
    """The eager runner with all experts in memory, and rings for windows."""
    w = PlainWeights(weights, dtype)
    return Eager(spec, w, plain_experts(spec, w), caches=partial(SessionCache, rings=True), observe=seen)


def plain_experts(spec: Model, w: PlainWeights) -> ExpertsBy:
    """What pages experts, over plain tensors that all lie in memory."""
    found = {op.layer: op for op in program_of(spec) if isinstance(op, ops.Experts)}

    def experts(layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, step: Step, ahead: Tensor | None = None,
                wanted: Tensor | None = None) -> Tensor:
        if wanted is not None:
            x, ids, topk_weights = x[wanted], ids[wanted], topk_weights[wanted]
        return TORCH.combine(torch_ops.experts(found[layer], w, x, ids), topk_weights)

    return experts


def run(model: Eager, ids: Tensor, prompt: int, cache: SessionCache | None = None) -> Tensor:
    """Logits [T, V] of all tokens: the prompt at once, then token by token over the cache."""
    cache = model.new_cache(len(ids) + 3) if cache is None else cache
    found = [model.forward(ids[:prompt], [cache], Step("prefill"), all_logits=True)]
    found += [model.forward(ids[at:at + 1], [cache], Step("decode")) for at in range(prompt, len(ids))]
    return torch.cat(found)


def assert_parity(model: Any, spec: Model, names: dict[str, str] = NAMES) -> None:
    """Teacher-forced logits within 1e-4, and the same best token wherever the reference's gap exceeds 2e-4."""
    with torch.inference_mode():
        want = model(IDS[None], use_cache=False, output_hidden_states=True).logits[0]
    got = run(eager(spec, canonical(model, spec, names)), IDS, PROMPT)
    assert want.std() > 1  # flat logits would agree by themselves
    error = (got - want).abs().max().item()
    print(f"std {want.std():.2f}, largest logit {want.abs().max():.2f}, largest error {error:.1e}")
    assert error < 1e-4
    best = want.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2e-4
    assert sure.sum() > len(IDS) / 2
    assert torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])

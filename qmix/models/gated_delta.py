"""What Qwen3-Next, Qwen3.5 and 3.6 share: layers with gated delta nets beside layers with gated attention, and a shared
MLP with a gate beside the experts. Norms weigh by 1 + w, but not the one within the delta net."""

from __future__ import annotations

from qmix.models.keys import Keys
from qmix.models.parts import LLAMA, read_experts
from qmix.models.source import PerHead, Rows, Source
from qmix.spec import Attention, DeltaNet, Expert, Mlp, Moe, Norm, Rope, Router

LINEAR, FULL = "linear_attention", "full_attention"


def read_kinds(keys: Keys, count: int) -> tuple[str, ...]:
    """LINEAR or FULL of each layer."""
    every = keys.count("full_attention_interval", 4)
    kinds = keys.texts("layer_types", [LINEAR if (i + 1) % every else FULL for i in range(count)])
    keys.want(len(kinds) == count, "layer_types", len(kinds), f"num_hidden_layers = {count} of them")
    keys.want(set(kinds) <= {LINEAR, FULL}, "layer_types", kinds, f"{LINEAR} or {FULL}")
    return kinds


def read_gated_attention(keys: Keys, norm: Norm, rope: Rope) -> Attention:
    heads, kv = keys.count("num_attention_heads", 16), keys.count("num_key_value_heads", 2)
    keys.want(heads % kv == 0, "num_key_value_heads", kv, f"a divisor of num_attention_heads = {heads}")
    return Attention(heads, kv, keys.count("head_dim", 256), rope, q_norm=norm, k_norm=norm,
                     bias="qkvo" if keys.boolean("attention_bias", False) else "none", output_gate=True)


def read_delta(keys: Keys, eps: float) -> DeltaNet:
    of_keys, values = keys.count("linear_num_key_heads", 16), keys.count("linear_num_value_heads", 32)
    keys.want(values % of_keys == 0, "linear_num_value_heads", values,
              f"a multiple of linear_num_key_heads = {of_keys}")
    return DeltaNet(of_keys, values, keys.count("linear_key_head_dim", 128), keys.count("linear_value_head_dim", 128),
                    keys.count("linear_conv_kernel_dim", 4), Norm(eps))


def read_moe(keys: Keys, experts: int, top_k: int, normalize: bool = True) -> Moe:
    """experts, top_k: where config.json has none."""
    experts, top_k = read_experts(keys, "num_experts", experts, top_k)
    router = Router(experts, top_k, over="all", normalize=normalize)
    return Moe(router, Expert(keys.count("moe_intermediate_size", 512)),
               shared=Mlp(keys.count("shared_expert_intermediate_size", 512)), shared_gate=True)


NAMES = {
    **{name: source for name, source in LLAMA.items() if name not in ("attention.q", "attention.q_bias")},
    "delta.a_log": "linear_attn.A_log", "delta.dt_bias": "linear_attn.dt_bias", "delta.norm": "linear_attn.norm.weight",
    "delta.o": "linear_attn.out_proj.weight",
    **{f"shared.{p}": f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")},
    "shared.switch": "mlp.shared_expert_gate.weight",
}


def gated_attention_sources(mixer: Attention, name: str) -> dict[str, Source]:
    """Of q and its gate, which lie head by head in one tensor; name: of that in the checkpoint, without ".weight"."""
    rows, found = mixer.heads * mixer.head_dim, {}
    apart = PerHead(mixer.heads, (mixer.head_dim, mixer.head_dim))
    for part, begin in (("q", 0), ("gate", rows)):
        steps = apart, Rows(begin, begin + rows, 2 * rows)
        found[f"attention.{part}"] = Source(f"{name}.weight", steps)
        if mixer.bias != "none":
            found[f"attention.{part}_bias"] = Source(f"{name}.bias", steps)
    return found

"""The shapes of the other models that synthetic.py writes: Qwen3-30B-A3B, gpt-oss-20b, Qwen3.6-35B-A3B.

H hidden, F expert inner, E experts, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from synthetic_recipe import BIAS, EXPERT_SHARE, Recipe, Values, rounded

Recalls = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Qwen3Recipe(Recipe):
    """The shape of Qwen3-30B-A3B, which has 48 layers: many small experts."""

    recall: float = 0.8
    hidden: int = 2048
    inner: int = 768

    experts: ClassVar[int] = 128
    chosen: ClassVar[int] = 8
    vocab: ClassVar[int] = 151936
    eps: ClassVar[float] = 1e-6
    recalls: ClassVar[Recalls] = (
        (0.0, 1.0), (0.14, 0.877), (0.203, 0.829), (0.251, 0.794), (0.292, 0.765), (0.363, 0.717), (0.426, 0.676),
        (0.484, 0.64), (0.62, 0.567), (0.75, 0.506))
    chosen_length: ClassVar[float] = 0.3862
    gguf: ClassVar[str] = "qwen3moe"

    @property
    def heads(self) -> int:
        return self.hidden // 64  # q is twice as wide as the residual

    @property
    def kv_heads(self) -> int:
        return self.heads // 8

    def raw_config(self) -> dict[str, object]:
        """config.json, that of Qwen3-30B-A3B with other counts."""
        return {**self.common_config(), "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
                "intermediate_size": 8 * self.inner, "moe_intermediate_size": self.inner, "num_experts": self.experts,
                "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
                "max_position_embeddings": 40960, "rope_theta": self.theta, "use_sliding_window": False}

    def gguf_keys(self) -> dict[str, object]:
        return {"rope_dimension_count": self.head_dim, "expert_feed_forward_length": self.inner,
                "key_length": self.head_dim, "value_length": self.head_dim}


@dataclass(frozen=True, slots=True)
class GptOssRecipe(Recipe):
    """The shape of gpt-oss-20b, which has 24 layers: experts in MXFP4, biases throughout, sinks, a window of 128 in
    every second layer, YaRN. The rms of the clamped SwiGLU, (u + 1) g sigmoid(1.702 g), is of normal u and g."""

    recall: float = 0.8
    hidden: int = 2880
    inner: int = 2880

    experts: ClassVar[int] = 32
    chosen: ClassVar[int] = 4
    expert_format: ClassVar[str] = "mxfp4"
    vocab: ClassVar[int] = 201088
    head_dim: ClassVar[int] = 64
    theta: ClassVar[float] = 150000.0
    widths: ClassVar[tuple[int, int]] = (64, 32)
    recalls: ClassVar[Recalls] = (
        (0.0, 1.0), (0.14, 0.891), (0.203, 0.848), (0.251, 0.817), (0.292, 0.791), (0.363, 0.75), (0.426, 0.715),
        (0.484, 0.685), (0.62, 0.62), (0.75, 0.566))
    chosen_length: ClassVar[float] = 0.5402
    activated: ClassVar[float] = 0.9202
    gguf: ClassVar[str] = "gpt-oss"
    gguf_names: ClassVar[Mapping[str, str]] = MappingProxyType({"before_mlp": "post_attention_norm.weight"})

    WINDOW: ClassVar[int] = 128
    YARN: ClassVar[tuple[float, int]] = (32.0, 4096)  # factor, positions before it

    @property
    def heads(self) -> int:
        return 8 * self.kv_heads

    @property
    def kv_heads(self) -> int:
        return max(1, self.hidden // 360)

    def raw_config(self) -> dict[str, object]:
        """config.json, that of gpt-oss-20b with other counts."""
        factor, before = self.YARN
        kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(self.layers)]
        return {**self.common_config(), "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
                "attention_bias": True, "experts_per_token": self.chosen, "intermediate_size": self.inner,
                "layer_types": kinds, "max_position_embeddings": 131072, "num_local_experts": self.experts,
                "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": factor,
                                 "original_max_position_embeddings": before, "rope_type": "yarn", "truncate": False},
                "rope_theta": self.theta, "sliding_window": self.WINDOW, "swiglu_limit": 7.0}

    def gguf_keys(self) -> dict[str, object]:
        from gguf import RopeScalingType

        factor, before = self.YARN
        return {"expert_feed_forward_length": self.inner, "key_length": self.head_dim, "value_length": self.head_dim,
                "sliding_window": self.WINDOW, "rope_dimension_count": self.head_dim,
                "rope_scaling_type": RopeScalingType.YARN, "rope_scaling_factor": factor,
                "rope_scaling_orig_ctx_len": before}

    def plain(self, name: str, shape: tuple[int, ...]) -> Values:
        """q's bias is k's, copied as its weights are; a sink is as large as a score of an unrelated token."""
        part, layer = name.split(".")[-1], int(name.split(".")[1]) if name.startswith("layers.") else 0
        if part == "q_bias":
            keys = self.plain(name.replace("q_bias", "k_bias"), (self.kv_heads * self.head_dim,))
            return keys.reshape(self.kv_heads, -1).repeat(self.heads // self.kv_heads, axis=0).reshape(shape)
        if part.endswith("bias") or part == "sinks":
            deviation = 1.0 if part == "sinks" else BIAS
            return deviation * self.stream(part, layer).standard_normal(shape, dtype=np.float32)
        return super(GptOssRecipe, self).plain(name, shape)


@dataclass(frozen=True, slots=True)
class Qwen35Recipe(Recipe):
    """The shape of Qwen3.5-35B-A3B and Qwen3.6-35B-A3B, which have 40 layers: three of four are gated delta nets, the
    fourth has gated attention in heads twice as wide; a shared expert adds as much as the routed ones.

    A delta net forgets quickly here (large A), so that, as attention, it sees mostly the token itself; what it gives
    is normed and times silu(z), attention's output times sigmoid(gate), of a normal z and gate.
    """

    recall: float = 0.75
    hidden: int = 2048
    inner: int = 512

    experts: ClassVar[int] = 256
    chosen: ClassVar[int] = 8
    vocab: ClassVar[int] = 248320
    head_dim: ClassVar[int] = 256
    eps: ClassVar[float] = 1e-6
    theta: ClassVar[float] = 1e7
    widths: ClassVar[tuple[int, int]] = (256, 32)
    recalls: ClassVar[Recalls] = (
        (0.0, 1.0), (0.14, 0.86), (0.203, 0.806), (0.251, 0.766), (0.292, 0.733), (0.363, 0.678), (0.426, 0.632),
        (0.484, 0.594), (0.62, 0.511), (0.75, 0.445))
    chosen_length: ClassVar[float] = 0.3805
    gguf: ClassVar[str] = "qwen35moe"
    gguf_names: ClassVar[Mapping[str, str]] = MappingProxyType({
        "before_mlp": "post_attention_norm.weight", "attention.gate": "attn_q.weight",
        **{f"delta.{part}": "attn_qkv.weight" for part in ("q", "k", "v")}, "delta.z": "attn_gate.weight",
        "delta.a": "ssm_alpha.weight", "delta.b": "ssm_beta.weight", "delta.conv": "ssm_conv1d.weight",
        "delta.a_log": "ssm_a", "delta.dt_bias": "ssm_dt.bias", "delta.norm": "ssm_norm.weight",
        "delta.o": "ssm_out.weight",
        **{f"shared.{part}": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")},
        "shared.switch": "ffn_gate_inp_shexp.weight"})

    STATE: ClassVar[int] = 128  # size of a delta net's keys and values
    CONV: ClassVar[int] = 4
    INTERVAL: ClassVar[int] = 4  # the last of so many layers is attention
    SIGMOID: ClassVar[float] = 0.5418  # root mean square of sigmoid(g) for normal g

    @property
    def heads(self) -> int:
        return self.hidden // 128

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 8)

    @property
    def delta_heads(self) -> tuple[int, int]:
        """(keys, values)."""
        return self.hidden // 128, self.hidden // 64

    def key_heads(self, name: str) -> tuple[int, int]:
        if ".delta." in name:
            return self.delta_heads[0], 1
        return self.kv_heads, self.heads // self.kv_heads

    def raw_config(self) -> dict[str, object]:
        """config.json, that of Qwen3.6-35B-A3B's language model with other counts."""
        keys, values = self.delta_heads
        rope = {"rope_type": "default", "rope_theta": self.theta, "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10], "mrope_interleaved": True}
        kinds = ["linear_attention" if (i + 1) % self.INTERVAL else "full_attention" for i in range(self.layers)]
        return {**self.common_config(), "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text",
                "attn_output_gate": True, "full_attention_interval": self.INTERVAL, "layer_types": kinds,
                "linear_num_key_heads": keys, "linear_num_value_heads": values, "linear_key_head_dim": self.STATE,
                "linear_value_head_dim": self.STATE, "linear_conv_kernel_dim": self.CONV,
                "moe_intermediate_size": self.inner, "shared_expert_intermediate_size": self.inner,
                "num_experts": self.experts, "max_position_embeddings": 262144, "rope_parameters": rope}

    def gguf_keys(self) -> dict[str, object]:
        keys, values = self.delta_heads
        return {"rope_dimension_count": self.head_dim // 4, "rope_dimension_sections": [11, 11, 10, 0],
                "key_length": self.head_dim, "value_length": self.head_dim, "expert_feed_forward_length": self.inner,
                "expert_shared_feed_forward_length": self.inner, "full_attention_interval": self.INTERVAL,
                "ssm_conv_kernel": self.CONV, "ssm_inner_size": values * self.STATE, "ssm_state_size": self.STATE,
                "ssm_time_step_rank": values, "ssm_group_count": keys}

    def spread(self, matrix: str, layer: int = 0) -> float:
        if matrix == "o":
            return self.added(layer, 1 - EXPERT_SHARE) / (self.SIGMOID * math.sqrt(self.heads * self.head_dim))
        if matrix == "delta.o":
            return self.added(layer, 1 - EXPERT_SHARE) / (
                self.activated * math.sqrt(self.delta_heads[1] * self.STATE))
        if matrix in ("w2", "shared.down"):
            factor = self.chosen_length if matrix == "w2" else self.SIGMOID
            return self.added(layer, EXPERT_SHARE / 2) / (self.activated * factor * math.sqrt(self.inner))
        return 1 / math.sqrt(self.hidden)

    def plain(self, name: str, shape: tuple[int, ...]) -> Values:
        """Norms weigh by 1 + w, but not a delta net's; a convolution sees mostly the token itself."""
        part = name.split(".", 2)[2] if name.startswith("layers.") else name
        if part in ("delta.a", "delta.b", "shared.switch"):
            return self._normal(name, shape) / np.float32(math.sqrt(self.hidden))
        if part == "delta.a_log":
            return np.log(1 + 15 * self.stream(name).random(shape, np.float32))
        if part == "delta.dt_bias":
            return np.float32(0.1) * self._normal(name, shape)
        if part == "delta.conv":
            taps, (keys, _) = np.float32(0.1) * self._normal(name, shape), self.delta_heads
            taps[:, -1] += 1
            taps[:keys * self.STATE] = taps[keys * self.STATE:2 * keys * self.STATE]  # q's as k's
            return taps
        if part in ("router.weight", "delta.norm"):
            return super(Qwen35Recipe, self).plain(name, shape)
        return np.zeros(shape, np.float32)

    def gguf_plain(self, name: str, shape: tuple[int, ...]) -> Values:
        """llama.cpp keeps 1 + w of the norms that qmix adds 1 to, -exp(A_log) of A_log, and the value heads in another
        order: the first of each key head, then the second of each."""
        found, part = rounded(self.plain(name, shape)), name.split(".")[-1]
        keys, values = self.delta_heads
        if part in ("a", "b", "a_log", "dt_bias"):
            found = _first_of_each(found, keys)
        if part == "conv":
            before = 2 * keys * self.STATE
            found[before:] = _first_of_each(found[before:].reshape(values, -1), keys).reshape(-1, self.CONV)
        if part == "a_log":
            return -np.exp(found)
        return found + 1 if part in ONE_PLUS else found

    def _normal(self, name: str, shape: tuple[int, ...]) -> Values:
        return self.stream(name).standard_normal(shape, dtype=np.float32)


ONE_PLUS = ("before_mixer", "before_mlp", "q_norm", "k_norm", "final_norm")


def _first_of_each(rows: Values, groups: int) -> Values:
    """[a0 a1 b0 b1] in two groups -> [a0 b0 a1 b1]."""
    return rows.reshape(groups, len(rows) // groups, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


@dataclass(frozen=True, slots=True)
class Qwen35MtpRecipe(Qwen35Recipe):
    """The same with its multi-token-prediction head, which guesses noise: for what a guess costs."""

    def raw_config(self) -> dict[str, object]:
        return {**super(Qwen35MtpRecipe, self).raw_config(), "mtp_num_hidden_layers": 1}


RECIPES: dict[str, type[Recipe]] = {"mixtral": Recipe, "qwen3": Qwen3Recipe, "gpt-oss": GptOssRecipe,
                                  "qwen35": Qwen35Recipe, "qwen35-mtp": Qwen35MtpRecipe}

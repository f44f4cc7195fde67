"""The shapes of the other models that synthetic.py writes: Qwen3-30B-A3B, gpt-oss-20b, Qwen3.6-35B-A3B.

H hidden, F expert inner, E experts, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from synthetic_recipe import BIAS, Recipe, Values

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


RECIPES: dict[str, type[Recipe]] = {"mixtral": Recipe, "qwen3": Qwen3Recipe, "gpt-oss": GptOssRecipe}

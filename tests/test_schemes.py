"""quantization_config: every method that is read, and what is refused by name with the cure."""

from __future__ import annotations

from typing import Any

import pytest
from lowbit_checkpoints import AWQ, CASES, FP8, GPTQ, compressed, weights

from qmix.errors import ConfigError
from qmix.schemes import Awq, Fp4, PackedInts, Scaled, read_quantization
from qmix.schemes.patterns import Names


@pytest.mark.parametrize("case", CASES)
def test_every_layout_is_read(case: str) -> None:
    found = read_quantization(CASES[case][0])
    assert len(found.schemes) == 1 and found.schemes[0].title in found.title


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != key}


def without_argument(key: str | None) -> dict[str, Any]:
    """Of a group's weights, None = all: null."""
    config = compressed("pack-quantized")
    group = config["config_groups"]["group_0"]
    group["weights"] = None if key is None else without(group["weights"], key)
    return config


@pytest.mark.parametrize(("config", "words"), [
    (["fp8"], "want an object"),
    ({}, "quantized already, which qmix does not read"),
    ({"quant_method": "aqlm"}, "quantized already, as aqlm"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "as bitsandbytes"),
    ({"quant_method": 3}, "quantized already"),
    ({**FP8, "weight_block_size": [0, 128]}, "quantization_config.weight_block_size: got (0, 128)"),
    ({**FP8, "weight_block_size": [128]}, "weight_block_size"),
    ({**FP8, "weight_block_size": "128x128"}, "weight_block_size"),
    ({**FP8, "fmt": "e5m2"}, "fmt: got 'e5m2'"),
    ({**FP8, "expert_dtype": "fp4"}, "expert_dtype: got 'fp4'"),
    ({**FP8, "rotated": True}, "rotated: got True, a key that qmix does not know"),
    ({**FP8, "modules_to_not_convert": [3]}, "modules_to_not_convert: got (3,)"),
    ({**AWQ, "version": "gemv"}, "version: got 'gemv', want 'gemm'"),
    ({**AWQ, "backend": "llm-awq"}, "backend: got 'llm-awq'"),
    ({**AWQ, "bits": 3}, "bits: got 3, want 4"),
    ({**AWQ, "w_bit": 8}, "w_bit: got 8, want 4"),
    ({**AWQ, "q_group_size": 64}, "q_group_size: got 64, want the same as group_size"),
    ({**without(AWQ, "group_size"), "q_group_size": 0}, "q_group_size: got 0, want -1, or >= 1"),
    ({**AWQ, "zero_point": False}, "zero_point: got False, want true"),
    ({**AWQ, "group_size": 0}, "group_size: got 0"),
    ({**GPTQ, "group_size": 0}, "group_size: got 0, want -1, or >= 1"),
    ({**GPTQ, "bits": 5}, "bits: got 5"),
    (without(GPTQ, "bits"), "quantization_config.bits: missing"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format: got 'marlin'"),
    ({**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
    ({**GPTQ, "rotation": "hadamard"}, "rotation: got 'hadamard'"),
    ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "quant_algo: got 'W4A16_AWQ'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size: got 32"),
    (compressed("marlin-24"), "format: got 'marlin-24'"),
    (compressed("pack-quantized", strategy="tensor"), "strategy: got 'tensor'"),
    (compressed("pack-quantized", num_bits=1), "num_bits: got 1"),
    (compressed("pack-quantized", group_size=0), "group_size: got 0"),
    (compressed("pack-quantized", type="float"), "num_bits"),
    (compressed("float-quantized", num_bits=8, strategy="channel"), "type: got 'int'"),
    (compressed("float-quantized", num_bits=8, type="float", strategy="block"), "block_structure"),
    (compressed("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=32), "group_size: got 32"),
    (compressed("pack-quantized", sparse=1), "sparse: got 1, a key that qmix does not know"),
    *((without_argument(key), f"quantization_config.config_groups.group_0.weights.{key}: missing")
      for key in ("strategy", "num_bits", "type")),
    (compressed("pack-quantized", strategy=None), "strategy: got None, want 'tensor'"),
    (compressed("pack-quantized", strategy=["group"]), "strategy: got ['group'], want 'tensor'"),
    (without_argument(None), "config_groups.group_0.weights: got None, want an object"),
    ({**compressed("pack-quantized"), "transform_config": {"R1": {}}}, "transform_config"),
    ({**compressed("pack-quantized"), "sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
    ({**compressed("pack-quantized"), "config_groups": {}}, "config_groups: got [], want 1 to 64"),
    ({**compressed("pack-quantized"), "ignore": ["re:(a+)+$"]}, "ignore: got the pattern"),
    ({**compressed("pack-quantized"), "ignore": ["re:" + "a?" * 30]}, "ignore: got the pattern"),
    ({**compressed("pack-quantized"), "ignore": ["re:(?!.*experts)"]}, "ignore: got the pattern"),
    ({**compressed("pack-quantized"), "ignore": ["re:" + r"(.|\w)" * 30]}, "make 1073741824 ways, want at most 64"),
    ({**compressed("pack-quantized"), "ignore": ["re:" + "((a|a)b|c|)" * 4]}, "make 256 ways, want at most 64"),
    ({**compressed("pack-quantized"), "ignore": ["re:" + ".*" * 4 + "(a|b|c|d|e)"]}, "make 5 ways, want at most 4"),
    ({**compressed("pack-quantized"), "ignore": ["re:["]}, "ignore: got the pattern"),
    ({**compressed("pack-quantized"), "ignore": ["re:("]}, "no regular expression"),
    ({**compressed("pack-quantized"), "ignore": ["x*" * 9]}, "times *"),
])
def test_what_is_not_known_is_refused_by_name(config: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_quantization(config)
    assert words in caught.value.message and caught.value.message.startswith("quantization_config")
    assert caught.value.cure and "\n" not in caught.value.message


@pytest.mark.parametrize(("keys", "group"), [({"q_group_size": 64}, 64), ({"q_group_size": 64, "group_size": 64}, 64),
                                             ({"q_group_size": None, "group_size": 64}, 64), ({}, 128)])
def test_both_names_of_awq_s_group(keys: dict[str, Any], group: int) -> None:
    assert read_quantization({**without(AWQ, "group_size"), "w_bit": 4, **keys}).schemes == (Awq(group),)


def test_groups_of_a_mixed_checkpoint() -> None:
    config = compressed("mixed-precision")
    group = config["config_groups"]["group_0"]
    config["config_groups"] = {
        "attention": {**group, "targets": ["re:.*self_attn.*"], "format": "float-quantized",
                      "weights": weights(num_bits=8, type="float", strategy="channel", group_size=None)},
        "experts": {**group, "targets": ["re:.*experts.*"], "format": "nvfp4-pack-quantized",
                    "weights": weights(type="float", strategy="tensor_group", group_size=16)},
        "others": {**group, "targets": ["Linear"], "format": "pack-quantized"}}
    found = read_quantization(config)
    assert found.scheme_of("model.layers.0.self_attn.q_proj") == Scaled("fp8", (1, 0))
    assert found.scheme_of("model.layers.0.mlp.experts.3.down_proj") == Fp4("nvfp4")
    assert found.scheme_of("model.layers.0.mlp.down_proj") == PackedInts(4, 32, False)
    assert found.apart.which("model.layers.0.mlp.gate") == "re:.*gate$" and found.apart.which("lm_head") == "lm_head"


@pytest.mark.parametrize(("text", "module", "about"), [
    ("lm_head", "lm_head", True), ("gate", "model.layers.0.mlp.gate", True),
    ("gate", "model.layers.0.mlp.gate_proj", False),
    ("mlp.gate", "model.layers.0.mlp.gate", True), ("model.layers.1", "model.layers.1.mlp.gate", True),
    ("model.layers.1", "model.layers.11.mlp.gate", False),
    ("model.layers.*.self_attn", "model.layers.3.self_attn.q", True),
    ("model.layers.1*", "model.layers.11.mlp", True), ("re:.*self_attn.*", "model.layers.3.self_attn.q", True),
    (r"re:model\.layers\.\d+\.mlp\.gate$", "model.layers.3.mlp.gate", True),
    (r"re:model\.layers\.\d+\.mlp\.gate$", "model.layers.3.mlp.gate_proj", False),
    (r"re:.*layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj.*", "model.layers.3.mlp.experts.7.up_proj", True),
    (r"re:(lm_head|visual|.*\.(q|k|v|o)_proj|.*\.(gate|up|down|gate_up)_proj)$", "model.layers.3.mlp.gate", False),
    ("re:.*(q|k)_proj", "model.layers.3.self_attn.v_proj", False), ("", "lm_head", False)])
def test_names_of_modules(text: str, module: str, about: bool) -> None:
    assert (Names.of([text], "ignore").which(module) is not None) == about


def test_no_pattern_takes_long() -> None:
    """The worst that is taken, on the longest name; with more repeats or longer names this would not end."""
    names = Names.of(["re:" + ".*" * 4 + "x", "re:" + "a*" * 4 + "x", "re:" + ".*" * 3 + "(.|a)" * 6 + "x"], "ignore")
    assert names.which("a" * 100) is None and names.which("a" * 10**6) is None

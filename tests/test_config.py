"""read_model on the many shapes of config.json, and the checks of the other records."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from helpers import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from qmix.config import Cancel, ExpertKey, QuantConfig, SamplingParams
from qmix.errors import ConfigError
from qmix.models import read_model
from qmix.spec import Model
from qmix.spec.json import from_json, to_json

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
}


def read(**overrides: Any) -> Model:
    return read_model(tiny_config(**overrides))


def test_mixtral_8x7b() -> None:
    config = read_model(MIXTRAL_8X7B)
    assert (config.layers[0].mixer.head_dim, config.layers[0].mixer.kv_heads) == (128, 8)
    assert (config.num_experts, config.top_k) == (8, 2)
    assert (config.layers[0].mixer.rope.theta, config.final_norm.eps, config.max_positions) == (1e6, 1e-5, 32768)
    assert (config.dtype, config.layers[0].mixer.window, config.bos, config.eos) == ("bfloat16", None, 1, (2,))
    assert len(config.expert_keys) == 256
    assert config.expert_keys[8] == ExpertKey(1, 0)


@pytest.mark.parametrize(("overrides", "field", "want"), [
    ({"rope_theta": 5e4}, "rope_theta", 5e4),
    ({"rope_theta": 10000}, "rope_theta", 1e4),
    ({"rope_theta": ..., "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}, "rope_theta", 7e5),
    ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 7e5}}, "rope_theta", 7e5),
    ({"rope_theta": 5e4, "rope_scaling": None}, "rope_theta", 5e4),
    ({"rope_theta": ...}, "rope_theta", 1e6),
    ({"head_dim": None}, "head_dim", 16),
    ({"head_dim": 40}, "head_dim", 40),
    ({"head_dim": 40, "hidden_size": 63}, "head_dim", 40),  # 63 is not a multiple of 4 heads, and need not be
    ({"num_key_value_heads": None}, "num_kv_heads", 4),
    ({"num_key_value_heads": 1}, "num_kv_heads", 1),
    ({"sliding_window": 4096}, "sliding_window", 4096),
    ({"sliding_window": ...}, "sliding_window", None),
    ({"sliding_window": 0}, "sliding_window", None),
    ({"sliding_window": -1}, "sliding_window", None),
    ({"head_dim": 0}, "head_dim", 16),
    ({"hidden_act": "swish"}, "dtype", "bfloat16"),
    ({"tie_word_embeddings": True}, "tied", True),
    ({"tie_word_embeddings": ...}, "tied", False),
    ({"torch_dtype": "float16"}, "dtype", "float16"),
    ({"torch_dtype": "float16", "dtype": "float32"}, "dtype", "float32"),
    ({"eos_token_id": [2, 127]}, "eos", (2, 127)),
    ({"eos_token_id": None}, "eos", ()),
    ({"eos_token_id": -1}, "eos", ()),
    ({"eos_token_id": [2, -1]}, "eos", (2,)),
    ({"bos_token_id": None}, "bos", None),
    # absent is not null: transformers has defaults
    ({"num_key_value_heads": ..., "num_attention_heads": 8}, "num_kv_heads", 8),
    ({"num_key_value_heads": ..., "num_attention_heads": 16}, "num_kv_heads", 8),
    ({"max_position_embeddings": ...}, "max_positions", 131072),
    ({"eos_token_id": ...}, "eos", (2,)),
    ({"bos_token_id": ...}, "bos", 1),
])
def test_variants(overrides: dict[str, Any], field: str, want: Any) -> None:
    model = read(**overrides)
    attention = model.layers[0].mixer
    assert attention.rope is not None
    found = {"rope_theta": attention.rope.theta, "head_dim": attention.head_dim, "num_kv_heads": attention.kv_heads,
             "sliding_window": attention.window}
    assert (found[field] if field in found else getattr(model, field)) == want


@pytest.mark.parametrize(("key", "value"), [
    ("num_local_experts", 0), ("num_hidden_layers", -1), ("num_attention_heads", 0), ("vocab_size", 0),
    ("num_experts_per_tok", 5), ("num_experts_per_tok", 0), ("num_key_value_heads", 3), ("head_dim", 15),
    ("hidden_size", 66), ("hidden_size", "64"), ("hidden_size", True), ("hidden_size", 64.0),
    ("hidden_size", None), ("hidden_size", ...), ("rope_theta", 0), ("rope_theta", float("inf")),
    ("rope_theta", float("nan")), ("rope_theta", 10**400), ("rms_norm_eps", -1e-5), ("rms_norm_eps", "1e-5"),
    ("sliding_window", "0"), ("sliding_window", 12.5), ("tie_word_embeddings", "yes"), ("model_type", "llama"),
    ("model_type", ...), ("model_type", ["mixtral"]), ("hidden_act", "gelu"), ("dtype", "float64"),
    ("dtype", ["bfloat16"]), ("eos_token_id", "2"), ("eos_token_id", [2.0]), ("bos_token_id", [1]),
    ("rope_parameters", "default"), ("rope_parameters", {"rope_type": "linear"}),
    ("rope_scaling", {"type": "round"}), ("max_position_embeddings", 0),
    ("routed_scaling_factor", 2.0), ("attention_bias", True),  # not of this model: would be ignored
])
def test_bad_values_are_refused_by_their_key(key: str, value: Any) -> None:
    # An odd hidden_size shows in the division by the heads, a bad scaling in what replaced it.
    named = {"hidden_size": "hidden_size|num_attention_heads",
             "rope_scaling": "rope_parameters|rope_scaling", "rope_parameters": "rope_parameters"}.get(key, key)
    with pytest.raises(ConfigError, match=rf"^({named})(\.\w+)?: "):
        read(**{key: value})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "x"]), inner, max_size=2), max_leaves=4)
KEYS = [*tiny_config(), "head_dim", "rope_parameters", "rope_scaling", "dtype"]


@given(key=st.sampled_from(KEYS), value=json_values)
def test_any_json_value_is_read_or_refused(key: str, value: Any) -> None:
    try:
        config = read(**{key: value})
    except ConfigError as e:
        assert re.match(r"[a-z_.]+: ", e.message)
    else:
        assert config.layers[0].mixer.heads * config.layers[0].mixer.head_dim > 0
        hash(config)
        assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_config_survives_json() -> None:
    assert read_model(json.loads(json.dumps(MIXTRAL_8X7B))) == read_model(MIXTRAL_8X7B)


def test_quant_config_refuses_what_does_not_apply() -> None:
    with pytest.raises(ConfigError, match="group_size"):
        QuantConfig(experts="nf4", dense="bf16", method="", group_size=64, block=0)
    with pytest.raises(ConfigError, match="method"):
        QuantConfig(experts="keep", dense="int8", method="hqq", group_size=0, block=0)
    with pytest.raises(ConfigError, match="double_quant"):
        QuantConfig(double_quant=True)
    with pytest.raises(ConfigError, match="format"):
        QuantConfig(experts="int5")
    assert QuantConfig(experts="int3", dense="int4").grouped == {"int3", "int4"}


@pytest.mark.parametrize("bad", [
    {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2}, {"repeat_penalty": 0},
    {"seed": -1}, {"max_tokens": 0}, {"stop": ("",)}, {"temperature": float("nan")}, {"temperature": "0"},
    {"temperature": None}, {"top_k": 1.5}, {"top_k": True}, {"seed": "1"}, {"max_tokens": "9"}, {"stop": None},
    {"stop": 5}, {"stop": b"ab"}, {"stop": ("a", 1)}, {"stop": ""}, {"stop": {"a": 1}},
])
def test_sampling_params_name_the_field(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_cancel() -> None:
    cancel = Cancel()
    assert not cancel
    cancel.set()
    assert cancel
    cancel.clear()
    assert not cancel


def test_a_plain_string_is_one_stop_string() -> None:
    assert SamplingParams(stop="ab").stop == SamplingParams(stop=["ab"]).stop == ("ab",)  # type: ignore[arg-type]
    assert SamplingParams(stop=iter("ab")).stop == ("a", "b")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mix"):
        QuantConfig(experts="mixed", kinds=(("int4g64", "int4g64"),), mix="00")  # type: ignore[arg-type]

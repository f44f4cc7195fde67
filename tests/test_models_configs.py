"""read() against the config classes of transformers: defaults of absent keys, and no key that is ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from model_configs import ALONE, CASES, TINY, ids, with_keys
from transformers import AutoConfig

from qmix.errors import ConfigError
from qmix.models import read_model
from qmix.models.gemma4 import F, S
from qmix.models.keys import HARMLESS
from qmix.spec import Model

# What exporters always write; all other keys may be absent.
REQUIRED = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"intermediate_size": 96},
    "qwen3_moe": {"intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {"intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2},
}
SHARED = {"vocab_size": 50304, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8}


def full(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that transformers makes of that one, with every key."""
    return json.loads(AutoConfig.for_model(**raw).to_json_string(use_diff=False))


@pytest.mark.parametrize("kind", REQUIRED)
def test_absent_keys_have_the_defaults_of_transformers(kind: str) -> None:
    minimal = {"model_type": kind, **SHARED, **REQUIRED[kind]}
    assert read_model(minimal) == read_model(full(minimal))
    for key in set(minimal) - {"model_type"}:
        with pytest.raises(ConfigError, match=f"^{key}: missing$"):
            read_model({k: v for k, v in minimal.items() if k != key})


EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize("minimal", [
    {"model_type": "gemma4", "text_config": {"hidden_size_per_layer_input": 0}},
    {"model_type": "gemma4", "text_config": {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, **EXPERTS}},
    {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}, {"model_type": "qwen3_5_moe", "text_config": {}},
    {"model_type": "qwen3_5_moe"}, {"model_type": "qwen3_5_moe_text"}, {"model_type": "glm4_moe", "head_dim": 128}],
    ids=str)
def test_defaults_for_everything(minimal: dict[str, Any]) -> None:
    """transformers 4 left out what was as the class has it, sizes too."""
    assert read_model(minimal) == read_model(full(minimal))


@pytest.mark.parametrize("raw", CASES, ids=ids)
def test_the_full_config_is_the_same_model(raw: Mapping[str, Any]) -> None:
    assert read_model(raw) == read_model(full(raw))


OTHERS = {"hidden_act": ["gelu", "relu"], "rope_type": ["linear", "dynamic"], "problem_type": ["regression"]}


def other_values(key: str, value: Any) -> list[Any]:
    """Values that the key could have instead."""
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, value + 1, value + 3]
    if isinstance(value, float):
        return [value * 2 + 0.01]
    if value is None:
        return [3, 0.5]
    if isinstance(value, list):
        return [[0], [1, 2]]
    return ["other"] if isinstance(value, str) else [{"other": 1}]


def changes(raw: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, the config with another value of it), for every key, nested ones too."""
    for key, value in raw.items():
        if isinstance(value, dict) and key in ("rope_parameters", "text_config", F, S, "per_layer_config", "5"):
            yield from ((f"{key}.{inner}", {**raw, key: changed}) for inner, changed in changes(value))
        else:
            yield from ((key, {**raw, key: other}) for other in other_values(key, value))


def noticed(raw: Mapping[str, Any], model: Model) -> bool:
    """Whether that config is another model, or none."""
    try:
        return read_model(raw) != model
    except ConfigError:
        return True


# Of the towers for pictures and sound, and of the embeddings that have no size here.
ELSEWHERE = {"vision_config", "audio_config", "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_index",
             "image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id", "vision_end_token_id",
             "vocab_size_per_layer_input", "mrope_section", "mrope_interleaved"}


@pytest.mark.parametrize("kind", [*TINY, *(raw["model_type"] for raw in ALONE)])
def test_no_key_is_ignored(kind: str) -> None:
    """Of every key that transformers writes some other value is another model or refused, in some configuration (a
    window only counts where windows are on), unless the key is known to be harmless."""
    ignored: dict[str, bool] = {}
    for case in (case for case in CASES if case["model_type"] == kind):
        raw = full(case)
        model = read_model(raw)
        for key, changed in changes(raw):
            ignored[key] = ignored.get(key, True) and not noticed(changed, model)
    assert len(ignored) > 25
    silent = {key.rpartition(".")[2] for key, unnoticed in ignored.items() if unnoticed}
    assert silent <= HARMLESS | ELSEWHERE | ONLY_ELSEWHERE.get(kind, set())


# Alone there is no configuration here in which it counts: see the model that also sees.
ONLY_ELSEWHERE = {"gemma4_text": {"use_double_wide_mlp"}}


# What transformers looks up though its config class does not declare it, and features that other models have.
FOREIGN = {
    "partial_rotary_factor": 0.5, "per_layer_config": {"1": {"head_dim": 8}}, "layer_types": ["full_attention"],
    "original_max_position_embeddings": 64, "mlp_bias": True, "final_logit_softcapping": 31.0, "rope_theta": 77.0,
    "attention_bias": True, "use_sliding_window": True, "sliding_window": 13, "clip_qkv": 0.1, "head_dim": 48,
    "n_shared_experts": 1, "is_encoder_decoder": True, "routed_scaling_factor": 2.0, "text_config": {"a": 1},
}


@pytest.mark.parametrize("kind", TINY)
def test_features_of_other_models_are_not_ignored(kind: str) -> None:
    tiny = TINY[kind]
    model = read_model(tiny)
    silent = {key for key, value in FOREIGN.items() if not noticed(with_keys(tiny, {key: value}), model)}
    as_absent = {"qwen3_moe": {"sliding_window"},  # without the key that switches it on
                 "gpt_oss": {"attention_bias"},  # by default
                 "glm4_moe": {"attention_bias", "partial_rotary_factor", "n_shared_experts"}}.get(kind, set())
    assert silent <= as_absent
    if "text_config" in tiny:  # beside it, sizes and features belong to nothing
        silent = {key for key, value in FOREIGN.items() if not noticed({**tiny, key: value}, model)}
        assert not silent


def test_embeddings_that_are_tied_outside_and_not_inside_are_refused() -> None:
    for kind in ("gemma4", "qwen3_5_moe"):
        raw = with_keys(TINY[kind], {"tie_word_embeddings": not TINY[kind]["tie_word_embeddings"]})
        with pytest.raises(ConfigError, match=r"^text_config\.tie_word_embeddings: got .*, want the same as beside"):
            read_model(raw)

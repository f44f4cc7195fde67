"""Keys: typed reads of a config.json, refused by name, and the account of what nobody read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import xxhash
from helpers import UNQUANTIZED, write_tiny_stores
from hypothesis import given, settings
from hypothesis import strategies as st
from model_configs import TINY, with_keys

from qmix.errors import ConfigError
from qmix.models import read_model
from qmix.models.keys import HARMLESS, Keys
from qmix.store import Store

HOSTILE = [True, "64", 64.5, float("nan"), float("inf"), 10**400, -10**400, [64], {"x": 1}]


@pytest.mark.parametrize("value", HOSTILE)
def test_an_integer_is_nothing_else(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^n: got .*, want an integer$"):
        Keys({"n": value}).integer("n")
    with pytest.raises(ConfigError, match=r"^n: got .*, want an integer$"):
        Keys({"n": value}).count("n", 1)


@pytest.mark.parametrize("value", [v for v in HOSTILE if v != 64.5])
def test_a_number_is_finite(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^text_config.x: got .*, want a finite number$"):
        Keys({"text_config": {"x": value}}).object("text_config").number("x")


def test_the_other_kinds() -> None:
    keys = Keys({"b": 1, "t": "x", "l": [1, True], "o": [], "ids": [1.0], "n": 2**40, "m": 0, "big": 10**100})
    for read, key, wanted in (
            (keys.boolean, "b", "true or false"), (lambda k: keys.text(k, "a", "b"), "t", "'a' or 'b'"),
            (keys.integers, "l", "a list of integers"), (keys.texts, "l", "a list of strings"),
            (keys.numbers, "l", "a list of finite numbers"), (keys.numbers, "t", "a list"),
            (keys.object, "o", "an object"), (keys.token_ids, "ids", "token ids"),
            (keys.count, "n", ">= 1 and <= 2147483648"), (keys.count, "m", ">= 1"),
            (keys.count, "big", "<= 2147483648"),
            (lambda k: keys.number(k, above=0), "m", "> 0")):
        with pytest.raises(ConfigError, match=rf"^{key}: got .*, want .*{re.escape(wanted)}$") as caught:
            read(key)
        assert len(caught.value.message) < 300
    with pytest.raises(ConfigError, match=r"^absent: missing$"):
        keys.integer("absent")


def test_null_and_absent_are_two_things() -> None:
    keys = Keys({"a": None})
    assert keys.integer("a", 8, null=True) is None and keys.integer("b", 8, null=True) == 8
    assert keys.number("a", None) is None and keys.token_ids("a", (2,)) == () and keys.token_ids("b", (2,)) == (2,)
    assert keys.integers("a", ()) == () and "x" not in keys.object("a")
    for read in (lambda: keys.integer("a", 8), lambda: keys.count("a", 8), lambda: keys.number("a", 1.0),
                 lambda: keys.boolean("a", False), lambda: keys.text("a", "x", default="x"),
                 lambda: keys.integer("a")):
        with pytest.raises(ConfigError, match=r"^a: got None"):
            read()


def test_what_nobody_read_is_refused_by_name() -> None:
    keys = Keys({"hidden": 1, "use_cache": True, "switched_off": None, "rope": {"factor": 2, "beta": 3}})
    assert keys.integer("hidden") == 1 and keys.object("rope").integer("factor") == 2
    with pytest.raises(ConfigError, match=r"^rope\.beta: got 3, a key that qmix does not know and would ignore"):
        keys.finish()
    keys.object("rope").harmless("beta")
    keys.finish()
    with pytest.raises(ConfigError, match=r"^is_encoder_decoder: got True, want false$"):
        Keys({"is_encoder_decoder": True}).finish()
    Keys({"is_encoder_decoder": False}).finish()


def test_fixed_and_two_names() -> None:
    for value in (None, False):
        Keys({"bias": value}).fixed("bias", False)
    for value in (True, 0, "no"):
        with pytest.raises(ConfigError, match=r"^bias: got .*, want false$"):
            Keys({"bias": value}).fixed("bias", False)
    assert Keys({"b": 3}).one_name("a", "b") == "b" and Keys({}).one_name("a", "b") == "a"
    with pytest.raises(ConfigError, match=r"^b: got 3, want the same as a$"):
        Keys({"a": 2, "b": 3}).one_name("a", "b")


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    for kind in ("llama", None, ["mixtral"], 7):
        with pytest.raises(ConfigError, match=r"^model_type: got .*'mistral'.*'mixtral'.*'olmoe'.*'qwen3_moe'"):
            read_model({"model_type": kind})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "factor", "type", "x"]), inner, max_size=3),
    max_leaves=4)
EXTRA = ("layer_types", "per_layer_config", "full_attention_interval", "num_kv_shared_layers", "partial_rotary_factor",
         "rope_scaling", "rope_parameters", "head_dim", "attention_bias", "clip_qkv", "mlp_only_layers", "dtype",
         "decoder_sparse_step", "norm_topk_prob", "tie_word_embeddings", "eos_token_id", "text_config", "foreign")


@pytest.mark.parametrize("kind", TINY)
@settings(deadline=None)
@given(data=st.data())
def test_any_json_value_is_read_or_refused_by_a_key(kind: str, data: st.DataObject) -> None:
    tiny = TINY[kind]
    inner = tiny.get("text_config", tiny)
    key = data.draw(st.sampled_from(sorted({*tiny, *inner, *EXTRA} - {"model_type"})))
    value = data.draw(json_values)
    try:
        hash(read_model(with_keys(tiny, {key: value}) if data.draw(st.booleans()) else {**tiny, key: value}))
    except ConfigError as e:
        assert re.match(r"[a-z_.0-9]+: ", e.message) and "\n" not in e.message


def test_rope_scaling_is_read_in_both_spellings() -> None:
    tiny = dict(TINY["qwen3_moe"])
    yarn = {"factor": 4.0, "original_max_position_embeddings": 128}
    old = read_model({**tiny, "rope_theta": 5e4, "rope_scaling": {"type": "yarn", **yarn}})
    new = read_model({**tiny, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, **yarn}})
    assert old == new and old.layers[0].mixer.rope.scaling.factor == 4  # type: ignore[union-attr]
    for scaling, wanted in (({"rope_type": "dynamic", "factor": 2}, "rope_scaling.rope_type: got 'dynamic'"),
                            ({"rope_type": "linear"}, "rope_scaling.factor: missing"),
                            ({"rope_type": "yarn"}, "rope_scaling.factor: missing"),
                            ({"rope_type": "linear", "factor": 0}, "rope_scaling.factor: got 0, want > 0"),
                            ({"rope_type": "linear", "factor": 2, "beta_fast": 3},
                             "rope_scaling.beta_fast: got 3, a key"),
                            ({"rope_type": "default", "partial_rotary_factor": 0.5},
                             "rope_scaling.partial_rotary_factor: got 0.5, a key"),
                            ({"rope_type": "longrope", "short_factor": [1], "long_factor": [1]},
                             "rope_scaling.short_factor: got 1, want 16 numbers"),
                            ({"rope_type": "longrope", "short_factor": [1] * 16, "long_factor": [1] * 15 + [0]},
                             "rope_scaling.long_factor: got 0.0, want numbers > 0"),
                            ({"rope_type": "longrope", "short_factor": [1e-40] * 16, "long_factor": [1] * 16},
                             "rope_scaling.short_factor: got 1e-40, want numbers from 9.53674e-07 to 1.09951e+12")):
        with pytest.raises(ConfigError, match=f"^{re.escape(wanted)}"):
            read_model({**tiny, "rope_scaling": scaling})
    with pytest.raises(ConfigError, match=r"^rope_scaling: got .*, want the same as rope_parameters"):
        read_model({**tiny, "rope_scaling": {"rope_type": "yarn", **yarn}, "rope_parameters": {"rope_type": "default"}})


def test_harmless_keys_are_harmless_everywhere() -> None:
    for kind, tiny in TINY.items():
        odd = {key: [{"x": "y"}] for key in HARMLESS - {"model_type"}}
        assert read_model(with_keys({**tiny, **odd}, odd)) == read_model(tiny), kind


def test_a_store_may_have_keys_that_came_later(tmp_path: Path) -> None:
    """A checkpoint with a key that nobody knows is refused; a store of an older qmix, which took it in, is not."""
    raw = {**TINY["mixtral"], "a_key_of_tomorrow": 1}
    with pytest.raises(ConfigError, match="a_key_of_tomorrow: got 1"):
        read_model(raw)
    assert read_model(raw, strict=False) == read_model(TINY["mixtral"])
    folder = write_tiny_stores(tmp_path, {"one": UNQUANTIZED})["one"]
    config, manifest = folder / "config.json", folder / "qmix.json"
    config.write_bytes(json.dumps({**json.loads(config.read_bytes()), "a_key_of_tomorrow": 1}).encode())
    told = json.loads(manifest.read_text())
    entry = next(file for file in told["files"] if file["name"] == config.name)
    entry |= {"bytes": len(config.read_bytes()), "xxh3_128": xxhash.xxh3_128_hexdigest(config.read_bytes())}
    manifest.write_text(json.dumps(told))
    with Store.open(folder) as store:
        assert store.model.num_layers

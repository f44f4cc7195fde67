"""Steps of tokenizer.json that would fill the memory or take hours are refused before the library sees them."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import CHATML, byte_level_json, spelled_json, write_folder

from qmix.errors import ModelFileError
from qmix.tokenizer import load
from qmix.tokenizer.steps import check_steps


def replace(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def sequence(key: str, *steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", key: [*steps]}


def doubling(count: int) -> list[dict[str, Any]]:
    return [replace("a", "aa") for _ in range(count)]


SPLIT = {"type": "Split", "pattern": {"Regex": ".*.*X"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
TEXT, BOS = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}


def around(*single: Any, ids: int = 1) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": [*single], "pair": [TEXT],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * ids, "tokens": ["<s>"] * ids}}}


def charsmap(text: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(
        struct.pack("<I", 4) + bytes(4) + b"a\0" + text + b"\0").decode()}


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "doubled": ({"normalizer": sequence("normalizers", *doubling(40))}, "normalizer: Replace: a byte of a text could"),
    "doubled, nested": ({"normalizer": sequence("normalizers", *[sequence("normalizers", *doubling(3))] * 9)}, "256"),
    "one long": ({"normalizer": replace("a", "b" * 10**6)}, "1000000 bytes"),
    "between all": ({"normalizer": replace("x?", "b" * 999, "Regex")}, "1000 bytes"),
    "a long map": ({"normalizer": charsmap(b"x" * 999)}, "Precompiled: .* 999 bytes"),
    "shown bytes": ({"pre_tokenizer": sequence("pretokenizers", *[BYTES] * 9)}, "ByteLevel"),
    "both parts": ({"normalizer": sequence("normalizers", *doubling(6)),
                    "pre_tokenizer": sequence("pretokenizers", BYTES)}, "pre_tokenizer: ByteLevel"),
    "written back": ({"decoder": sequence("decoders", *doubling(40))}, "decoder: Replace"),
    "many steps": ({"normalizer": sequence("normalizers", *[{"type": "NFC"}] * 999)}, "more than 64 steps"),
    "no type": ({"normalizer": {"normalizers": doubling(40)}}, "without a type"),
    "hidden": ({"normalizer": {**replace("a", "b" * 999), "normalizers": []}}, "999 bytes"),
    "put before": ({"normalizer": {"type": "Prepend", "prepend": "x" * 9999}}, "Prepend writes 9999"),
    "slow": ({"pre_tokenizer": SPLIT}, "tries more than one repetition"),
    "slow in a normalizer": ({"normalizer": replace("(a+)+$", "", "Regex")}, "repetition of what"),
    "slow in a decoder": ({"decoder": sequence("decoders", replace("(a+)+$", "", "Regex"))}, "repetition of what"),
    "text twice": ({"post_processor": around(BOS, TEXT, TEXT)}, "more than once"),
    "ids around": ({"post_processor": around(*[BOS] * 33, TEXT, ids=33)}, "more than 1024 ids"),
    "ids around, twice": ({"post_processor": sequence("processors", *[around(*[BOS] * 33, TEXT, ids=16)] * 2)}, "1024"),
    "prefix": ({"model": {"continuing_subword_prefix": "x" * 999}}, "continuing_subword_prefix"),
    "suffix": ({"model": {"end_of_word_suffix": "x" * 999}}, "end_of_word_suffix"),
    "words": ({"model": {"max_input_chars_per_word": 10**400}}, "max_input_chars_per_word"),
    "long entry": ({"model": {"type": "Unigram", "vocab": [["x" * 9999, 0.0]]}}, "entry of 9999"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_by_name(name: str) -> None:
    raw, said = HOSTILE[name]
    with pytest.raises(ModelFileError, match=said):
        check_steps(Path("tokenizer.json"), raw)


@pytest.mark.parametrize("text", [byte_level_json, spelled_json])
def test_refused_at_load(text: Callable[[], str], tmp_path: Path) -> None:
    raw = json.loads(text())
    check_steps(Path("tokenizer.json"), raw)
    bad = json.dumps({**raw, "normalizer": sequence("normalizers", *doubling(40))})
    for given in (bad, bad[:-1] + ', "normalizer": ' + json.dumps(sequence("normalizers", *doubling(41))) + "}"):
        with pytest.raises(ModelFileError, match=r"tokenizer\.json: normalizer: Replace"):
            load(write_folder(tmp_path / "t", json_text=given, chat_template=CHATML))


def test_of_a_key_that_is_there_twice_the_library_sees_what_was_looked_at(tmp_path: Path) -> None:
    text = byte_level_json()
    twice = text[:-1] + ', "normalizer": null, "version": "1.0"}'
    assert load(write_folder(tmp_path / "t", json_text=twice, chat_template=CHATML)).encode("fox")


@pytest.mark.parametrize("value", [None, 3, "x", [], [[]], {"type": 3}, {"type": "Sequence"}, {"type": "Strange"}])
def test_what_is_no_step_is_left_to_the_library(value: Any) -> None:
    raw = dict.fromkeys(("normalizer", "pre_tokenizer", "decoder", "post_processor", "model"), value)
    if value == {"type": 3}:
        with pytest.raises(ModelFileError, match="without a type"):
            check_steps(Path("t"), raw)
    else:
        check_steps(Path("t"), raw)


def test_an_id_far_beyond_any_model(tmp_path: Path) -> None:
    """Whatever looks through all ids would look for hours; models' own count bounds them later."""
    raw = json.loads(byte_level_json())
    raw["model"]["vocab"]["Z"] = 10**9
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: an id of 1000000000, want less than"):
        load(write_folder(tmp_path / "t", json_text=json.dumps(raw), chat_template=CHATML))

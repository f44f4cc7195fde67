"""Tokenizers that know more tokens than the model has rows, and end ids that are none, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import byte_level_json, spm_model, write_folder

from qmix.errors import ModelFileError, UsageError
from qmix.tokenizer import Message, load

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def folder(path: Path, kind: str, text: str = "[PAD]", special: bool = True, **config: Any) -> tuple[Path, int]:
    """A tokenizer with one added token behind its vocabulary; and the id of that token."""
    path = write_folder(path, **{"model": spm_model()} if kind == "spm" else {"json_text": byte_level_json()})
    count = load(path).vocab_size
    added = {str(count): {"content": text, "special": special}}
    (path / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": added, "pad_token": text, "chat_template": TEMPLATE, **config}))
    return path, count


@pytest.mark.parametrize("kind", ["spm", "json"])
@pytest.mark.parametrize("special", [True, False])
def test_a_padding_token_beyond_the_model_is_read_and_never_given(tmp_path: Path, kind: str, special: bool) -> None:
    path, count = folder(tmp_path, kind, special=special)
    tokenizer = load(path, vocab_size=count)
    plain = load(write_folder(tmp_path / "plain", **{"model": spm_model()} if kind == "spm"
                              else {"json_text": byte_level_json()}))
    assert tokenizer.encode("the fox") == plain.encode("the fox")
    for encode in (lambda: tokenizer.encode("a [PAD] b"),
                   lambda: tokenizer.encode_chat([Message("user", "a [PAD] b")])):
        try:
            ids = encode()
        except UsageError as error:
            assert "'[PAD]'" in error.message and str(count) in error.message
        else:
            assert max(ids) < count


@pytest.mark.parametrize("config", [{"eos_token": "[PAD]"}, {"bos_token": "[PAD]"},
                                    {"chat_template": TEMPLATE + "[PAD]"}])
def test_a_token_that_prompts_need_must_have_a_row(tmp_path: Path, config: dict[str, str]) -> None:
    path, count = folder(tmp_path, "spm", **config)
    assert load(path, vocab_size=count + 1).vocab_size == count + 1
    with pytest.raises(ModelFileError, match=rf"{count + 1} ids.*vocab_size is {count}"):
        load(path, vocab_size=count)


def test_a_vocabulary_that_is_larger_in_itself_belongs_to_another_model(tmp_path: Path) -> None:
    path, count = folder(tmp_path, "spm")
    with pytest.raises(ModelFileError, match="vocab_size"):
        load(path, vocab_size=count - 1)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("value", "want"), [(-1, ()), ([5, -1], (5,)), ([], ())])
def test_a_negative_end_id_is_none(tmp_path: Path, file: str, value: Any, want: tuple[int, ...]) -> None:
    path = write_folder(tmp_path, model=spm_model())
    without = load(path).eos_ids
    (path / file).write_text(json.dumps({"eos_token_id": value}))
    assert set(load(path).eos_ids) == {*without, *want}

"""Ids held against transformers, over the kinds of tokenizer.json that causal models come with; and control tokens that
users type, over the same. test_tokenizer_oracle_templates.py has templates that look into the messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import CORPUS, FAMILIES, FLAGS, SPECIAL, folder
from tokenizer_files import CHATML, spm_model

from qmix.tokenizer import Message, Tokenizer, load

transformers = pytest.importorskip("transformers")

TEXTS = (
    *dict.fromkeys(CORPUS),
    "",
    " ",
    "  a",
    "a  ",
    "\n\nx\n",
    "\t",
    "\u00a0x\u3000",
    "caf\u00e9 cafe\u0301",
    "\u202fthree3",
    "\U0001f98a\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "three",
    "threes",
    "</think",
    "< s>",
    "|im_end|",
    "a<",
    "<|",
    "\x00\ufeff",
)
PIECES = st.sampled_from(
    [
        "the ",
        " fox",
        "three",
        "\n",
        "  ",
        "\t",
        "\u00e9",
        "\u4f60",
        "\U0001f98a",
        "12",
        "<",
        "|",
        ">",
        "<|",
        "im_end",
        "s",
        "/",
        "x.",
    ]
)
benign = (st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=12)).filter(
    lambda text: not any(token in text for token in ("<s>", "</s>", "<unk>", "<think>", "</think>", *SPECIAL))
)
hostile = st.lists(
    st.sampled_from(
        ["<s>", "</s>", "<unk>", *SPECIAL, "<|im_", "start|>", "end|>", "<", ">", "s", " ", "fox", "\n", "<|", "|>"]
    ),
    min_size=1,
    max_size=6,
).map("".join)


def pair(path: Path, **how: Any) -> tuple[Tokenizer, Any]:
    """(our tokenizer, transformers' own) of one folder."""
    made = folder(path, **how)
    # The class by its name: AutoTokenizer would look for it in the files of all models.
    return load(made), transformers.PreTrainedTokenizerFast.from_pretrained(made)


def chat_ids(theirs: Any, messages: list[Message], **how: Any) -> list[int]:
    return theirs.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **how,
    )


def talk(*texts: str) -> list[Message]:
    roles = ["user", "assistant"] * len(texts)
    return [Message(role, text) for role, text in zip(roles, texts, strict=False)]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    return pair(tmp_path_factory.mktemp("family") / "x", family=request.param)


def test_ids_of_texts(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_ids_of_chats(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    for text in TEXTS:
        for messages in (talk(text), talk("a", text, "b"), [Message("system", text or "x"), *talk(text)]):
            assert ours.encode_chat(messages) == chat_ids(theirs, messages), text


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(benign, min_size=3, max_size=3))
def test_ids_of_any_chat(both: tuple[Tokenizer, Any], texts: list[str]) -> None:
    ours, theirs = both
    assert ours.encode_chat(talk(*texts)) == chat_ids(theirs, talk(*texts))


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(hostile, min_size=3, max_size=3))
def test_no_typed_text_becomes_a_control_token(both: tuple[Tokenizer, Any], texts: list[str]) -> None:
    ours, theirs = both
    ids, harmless = ours.encode_chat(talk(*texts)), ours.encode_chat(talk("a", "b", "c"))
    control = set(theirs.all_special_ids) | {theirs.convert_tokens_to_ids(token) for token in SPECIAL}
    control.discard(theirs.unk_token_id)
    assert [i for i in ids if i in control] == [i for i in harmless if i in control]
    shown = "".join(
        theirs.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in talk(*texts)], add_generation_prompt=True, tokenize=False
        ).split()
    )
    if theirs.unk_token_id not in ids:
        shown_again = "".join(theirs.decode(ids, skip_special_tokens=False).split())
        assert shown_again == shown


@pytest.mark.parametrize("flags", [name for name in FLAGS if name != "plain"])
@pytest.mark.parametrize("family", ["qwen", "llama2", "mistral", "unigram"])
def test_flags_of_added_tokens(family: str, flags: str, tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "x", family=family, flags=flags)
    for text in TEXTS:
        assert ours.encode_chat(talk(text, text, text)) == chat_ids(theirs, talk(text, text, text)), text


@pytest.mark.parametrize("family", ["qwen", "llama2"])
@pytest.mark.parametrize(
    ("bos", "config"), [(True, {}), (False, {}), (False, {"add_bos_token": True}), (True, {"add_bos_token": False})]
)
def test_bos_comes_where_transformers_puts_it(family: str, bos: bool, config: dict[str, bool], tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "x", family=family, bos=bos, **config)
    assert ours.encode("the fox") == theirs("the fox")["input_ids"]
    written = pair(tmp_path / "y", family=family, bos=bos, template="{{ bos_token }}" + CHATML, **config)
    assert written[0].encode_chat(talk("the fox")) == chat_ids(written[1], talk("the fox"))
    assert written[0].encode_chat(talk("the fox")).count(written[0].bos_id) == 1


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_prefix_space": True}], ids=str)
@pytest.mark.parametrize(("family", "bos", "named"), [
    ("gpt2", True, "GPTNeoXTokenizer"), ("gpt2", False, "GPTNeoXTokenizerFast"), ("gpt2", True, None),
    ("qwen", True, "GPTNeoXTokenizer"), ("roberta", False, "GPTNeoXTokenizer"), ("llama3", True, "GPTNeoXTokenizer")])
def test_the_class_of_gpt_neox_takes_only_the_vocabulary_from_the_file(
        family: str, bos: bool, named: str | None, config: dict[str, bool], tmp_path: Path) -> None:
    """OLMoE names it. named None: the kind of the model decides."""
    made = folder(tmp_path / "x", family=family, bos=bos, tokenizer_class=named, template="{{ bos_token }}" + CHATML,
                  **config)
    (made / "config.json").write_text("{}" if named else '{"model_type": "olmoe"}')
    ours, theirs = load(made), transformers.AutoTokenizer.from_pretrained(made)
    assert type(theirs).__name__ == "GPTNeoXTokenizer"
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.encode_chat(talk(text, text, text)) == chat_ids(theirs, talk(text, text, text)), text


@pytest.mark.parametrize("family", ["qwen", "llama2", "mistral"])
def test_a_tokenizer_model_beside_it_changes_nothing(family: str, tmp_path: Path) -> None:
    alone = load(folder(tmp_path / "a", family=family))
    made = folder(tmp_path / "b", family=family)
    (made / "tokenizer.model").write_bytes(spm_model())
    ours = load(made)
    for text in TEXTS:
        assert ours.encode_chat(talk(text)) == alone.encode_chat(talk(text))
        assert ours.encode(text) == alone.encode(text)


# ---- special tokens that tokenizer.json and tokenizer_config.json know differently

def _only_in_vocabulary(raw: dict[str, Any], config: dict[str, Any]) -> None:
    """The end token is an entry of the vocabulary, not an added token."""
    vocab = raw["model"]["vocab"]
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<|im_end|>"]
    vocab["<|im_end|>"] = new = max(vocab.values()) + 1
    for token in raw["added_tokens"]:
        token["id"] = new = new + 1
    special = raw["post_processor"]["special_tokens"]["<s>"]
    special["ids"] = [next(token["id"] for token in raw["added_tokens"] if token["content"] == "<s>")]


def _not_special(raw: dict[str, Any], config: dict[str, Any]) -> None:
    for token in raw["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in SPECIAL


def _flags_in_config(raw: dict[str, Any], config: dict[str, Any]) -> None:
    number = next(token["id"] for token in raw["added_tokens"] if token["content"] == "<|im_end|>")
    config["added_tokens_decoder"] = {str(number): {
        "content": "<|im_end|>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False,
        "special": True}}


def _named_with_flags(raw: dict[str, Any], config: dict[str, Any]) -> None:
    config["eos_token"] = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "rstrip": True,
                           "normalized": False, "single_word": False, "special": True}


def _listed_only(raw: dict[str, Any], config: dict[str, Any]) -> None:
    config["additional_special_tokens"] = ["<|new|>", "<|call|>"]


def _named_only(raw: dict[str, Any], config: dict[str, Any]) -> None:
    config["eot_token"] = "<|new|>"


DIFFERENCES = {f.__name__[1:]: f for f in (_only_in_vocabulary, _not_special, _flags_in_config, _named_with_flags,
                                           _listed_only, _named_only)}


@pytest.mark.parametrize("flags", ["plain", "rstrip"])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_special_tokens_of_two_files(difference: str, flags: str, tmp_path: Path) -> None:
    made = folder(tmp_path / "x", family="qwen", flags=flags, template=CHATML + "<|new|> <|call|> x")
    raw, config = (json.loads((made / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    DIFFERENCES[difference](raw, config)
    (made / "tokenizer.json").write_text(json.dumps(raw))
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load(made), transformers.AutoTokenizer.from_pretrained(made)
    for text in TEXTS:
        assert ours.encode_chat(talk(text)) == chat_ids(theirs, talk(text)), text


def test_a_named_token_beyond_the_model_is_not_added(tmp_path: Path) -> None:
    made = folder(tmp_path / "x", family="qwen", pad_token="[PAD]")
    rows = load(made).vocab_size - 1
    (made / "config.json").write_text(json.dumps({"vocab_size": rows}))
    assert load(made, rows).vocab_size == rows

"""A folder with tokenizer.model alone heeds `legacy`, `add_prefix_space` and the flags of added tokens.

Its ids are those of the tokenizer.json that says the same, built here from the same pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizer_files import CHATML, spm_model, write_folder

from qmix.tokenizer import Message, load

TEXTS = [
    "the fox",
    "system x",
    "a  b\n",
    "\nx",
    "caf\u00e9 \U0001f98a",
    "x ",
    "",
    "user",
    "the owl asked where\n\n it was going",
]
CONFIGS: dict[str, dict[str, Any]] = {
    "legacy": {},
    "legacy said": {"legacy": True},
    "not legacy": {"legacy": False},
    "no prefix": {"legacy": False, "add_prefix_space": False},
    "no prefix, legacy": {"legacy": True, "add_prefix_space": False},
}
FLAGS: dict[str, dict[str, bool]] = {
    "plain": {},
    "rstrip": {"rstrip": True},
    "lstrip": {"lstrip": True},
    "both": {"lstrip": True, "rstrip": True},
}


def tokenizer_json(model: sentencepiece.SentencePieceProcessor, config: dict[str, Any], flags: dict[str, bool]) -> str:
    """The same pieces as a tokenizer.json; merges in the order of the pieces that they make."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    count = model.get_piece_size()
    vocab = {model.id_to_piece(i): i for i in range(count)}
    made = [p for p, i in vocab.items() if not (model.IsByte(i) or model.IsControl(i) or model.IsUnknown(i))]
    merges = [(p[:k], p[k:]) for p in made for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]
    found = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if config.get("add_prefix_space") is False:
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    elif config.get("legacy", True):
        found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if config.get("add_prefix_space") is False else [decoders.Strip(" ", 1, 0)]
    found.decoder = decoders.Sequence([*steps, *strip])
    found.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    found.add_special_tokens([AddedToken(t, normalized=False, **flags) for t in ("<|im_end|>", "<|im_start|>")])
    return found.to_str()


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("config", CONFIGS)
def test_tokenizer_model_alone_heeds_the_flags(config: str, flags: str, tmp_path: Path) -> None:
    proto = spm_model(control=())
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    count = model.get_piece_size()
    added = {
        str(count + k): {"content": token, "special": True, **FLAGS[flags]}
        for k, token in enumerate(("<|im_end|>", "<|im_start|>"))
    }
    said = {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "chat_template": CHATML,
        **CONFIGS[config],
    }
    ours = load(write_folder(tmp_path / "model", proto, added_tokens_decoder=added, **said))
    theirs = load(
        write_folder(tmp_path / "json", json_text=tokenizer_json(model, CONFIGS[config], FLAGS[flags]), **said)
    )
    for text in TEXTS:
        assert ours.encode(text, bos=False) == theirs.encode(text, bos=False), text
        for talk in (
            [Message("user", text)],
            [Message("user", "a"), Message("assistant", text), Message("user", f"{text}<|im_end|>")],
        ):
            assert ours.encode_chat(talk) == theirs.encode_chat(talk), text
        ids = ours.encode_chat([Message("user", text)])
        assert ours.decode(ids) == theirs.decode(ids)


def test_the_first_space_of_an_answer_stays_where_no_space_is_written(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, spm_model(), add_prefix_space=False)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"add_prefix_space": False}
    tokenizer = load(folder)
    for text in ("the fox", " the fox", "  x"):
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text

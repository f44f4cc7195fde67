"""Byte-level BPE out of a GGUF file, as a tokenizer.json.

A GGUF file has tokens and merges, but only a name for how texts are cut before they are merged (tokenizer.ggml.pre).
The expressions of the names that are known here are those of the models' own tokenizer.json; a name that is not known
is refused, since a text would get other ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qmix.errors import ConfigError
from qmix.gguf.vocabulary import CONTROL, REFETCH, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary
from qmix.models import Keys

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Cut:
    """pattern: what a text is cut into, None as GPT-2 does it; nfc: after Unicode's normalization; whole: a piece that
    is a token stays one, whatever the merges say; bos: whether a text begins with BOS where the file does not say."""

    pattern: str | None
    nfc: bool = False
    whole: bool = False
    bos: bool = False


_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
CUTS: Mapping[str, Cut] = MappingProxyType({
    "gpt-2": Cut(None), "olmo": Cut(None, nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Cut(_LLAMA3, whole=True, bos=True)),
    **dict.fromkeys(("glm4", "chatglm-bpe"), Cut(_LLAMA3)),
    "qwen2": Cut(rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}", nfc=True),
    "qwen35": Cut(rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                  r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", nfc=True),
    "gpt-4o": Cut(rf"{_CASED[0]}{_ENDINGS}?|{_CASED[1]}{_ENDINGS}?|\p{{N}}{{1,3}}|{_SLASHES}", whole=True),
    "tekken": Cut(rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHES}", whole=True, bos=True)})


def bpe_json(keys: Keys, prefix: str, vocabulary: Vocabulary, bos: int | None, add_bos: bool | None) -> bytes:
    """A tokenizer.json. bos: its id; add_bos: what the file says, None where it says nothing."""
    name = keys.get(f"{prefix}pre", None)
    cut = CUTS.get(name) if isinstance(name, str) else None
    if cut is None:
        raise ConfigError(f"{prefix}pre: got {name!r:.40}, want {' or '.join(map(repr, CUTS))}",
                          "give the model as safetensors with its own tokenizer.json" if name is not None else
                          "the file was converted before this key came: fetch a newer one")
    normalizer = {"type": "NFC"} if cut.nfc else None
    begins = cut.bos if add_bos is None else add_bos
    return _written(keys, prefix, vocabulary, bos if begins else None, {CONTROL}, {
        "normalizer": normalizer, "pre_tokenizer": _pre_tokenizer(cut), "post_processor": _byte_level(),
        "decoder": _byte_level()}, {"ignore_merges": cut.whole})


def gemma_json(keys: Keys, prefix: str, vocabulary: Vocabulary, bos: int | None, add_bos: bool | None) -> bytes:
    """The same of tokenizer.ggml.model "gemma4": BPE of characters, with bytes for those that are no token; a space is
    U+2581. Control tokens that llama.cpp shows, as those of channels and tools, are user-defined there."""
    keys.get(f"{prefix}pre", None)
    unknown = next((text for text, kind in zip(vocabulary.texts, vocabulary.kinds, strict=True) if kind == UNKNOWN),
                   "<unk>")
    space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return _written(keys, prefix, vocabulary, None if add_bos is False else bos, {CONTROL, USER_DEFINED, UNKNOWN}, {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}},
        {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True})


def _written(keys: Keys, prefix: str, vocabulary: Vocabulary, bos: int | None, special: set[int],
             parts: Mapping[str, Any], model: Mapping[str, Any]) -> bytes:
    """A tokenizer.json. bos: the id that begins a text, None where none does; special: kinds of tokens; parts, model:
    what it has beside tokens and merges."""
    texts, kinds = vocabulary.texts, vocabulary.kinds
    pairs = [_pair(merge, prefix) for merge in keys.texts(f"{prefix}merges")]
    vocab = {text: i for i, text in enumerate(texts) if kinds[i] != UNUSED}
    lost = next((pair for pair in pairs if not {*pair, "".join(pair)} <= vocab.keys()), None)
    if lost is not None:
        raise ConfigError(f"{prefix}merges: {' '.join(lost)!r:.60}: of a token that is not there", REFETCH)
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": kinds[i] in special}
             for i, text in enumerate(texts) if kinds[i] in special | {USER_DEFINED} and text]
    found = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  **model, "vocab": vocab, "merges": pairs}}
    if bos is not None:
        found["post_processor"] = _template(texts[bos], bos)
    return json.dumps(found, ensure_ascii=False).encode()


def _pair(merge: str, prefix: str) -> tuple[str, str]:
    """The two tokens of a merge, written with a space between; byte-level tokens have none."""
    first, space, second = merge.partition(" ")
    if not (first and space and second) or " " in second:
        raise ConfigError(f"{prefix}merges: got {merge!r:.60}, want two tokens", REFETCH)
    return first, second


def _byte_level(use_regex: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _pre_tokenizer(cut: Cut) -> dict[str, Any]:
    if cut.pattern is None:
        return _byte_level(use_regex=True)
    split = {"type": "Split", "pattern": {"Regex": cut.pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level()]}


def _template(begins: str, bos: int) -> dict[str, Any]:
    """BOS in front of every text."""
    special, sequence = {"SpecialToken": {"id": begins, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [special, sequence], "pair": [special, sequence, second],
            "special_tokens": {begins: {"id": begins, "ids": [bos], "tokens": [begins]}}}

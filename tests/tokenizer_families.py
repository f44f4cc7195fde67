"""Folders with a tokenizer.json of each kind that causal models come with, trained here on a generated text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizer_files import CHATML, TEXT

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|call|>")
THINK = ("<think>", "</think>")
WIDE = (
    "Les \u00e9l\u00e8ves \u2014 \u00e7a va? \u4f60\u597d\uff0c\u4e16\u754c\u3002 "
    "\u041f\u0440\u0438\u0432\u0435\u0442! "
    "\u0645\u0631\u062d\u0628\u0627 "
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "def f(x):\n\tif x  >  1:\n        return {'a': [x, 2]}  # comment\n\n\n",
    "1234567 3.14 2026-11-27   three   spaces",
)
CORPUS = (*TEXT, *WIDE) * 12
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)


def _byte_level(pre: Any, normalizer: Any = None, ignore_merges: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre, decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    return tokenizer


@cache
def pieces() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """(pieces, merges) of a sentencepiece-like BPE without its normalizer."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=450, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    merges = tuple(tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"])
    return ("<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *state["vocab"]), merges


def _spelled(normalizer: Any, pre: Any, strip: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models

    words, merges = pieces()
    tokenizer = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(words)}, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return tokenizer


def _unigram() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return tokenizer


def _families() -> dict[str, Any]:
    """{name: makes the tokenizer without its added tokens}."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    replace = normalizers.Replace(" ", "\u2581")
    legacy = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    return {
        "gpt2": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "roberta": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "qwen": lambda: _byte_level(split(QWEN), normalizers.NFC()),
        "llama3": lambda: _byte_level(split(LLAMA3), ignore_merges=True),
        "llama2": lambda: _spelled(legacy, None, True),
        "mistral": lambda: _spelled(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
        "always": lambda: _spelled(None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), True),
        "never": lambda: _spelled(None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
        "gemma": lambda: _spelled(replace, None, False),
        "unigram": _unigram,
    }


FAMILIES = ("gpt2", "roberta", "qwen", "llama3", "llama2", "mistral", "always", "never", "gemma", "unigram")
# Flags of the special tokens; those of the others are fixed.
FLAGS = {
    "plain": {},
    "rstrip": {"rstrip": True},
    "lstrip": {"lstrip": True},
    "both": {"lstrip": True, "rstrip": True},
    "normalized": {"normalized": True},
    "single word": {"single_word": True},
}


@cache
def _json(family: str, flags: str, bos: bool) -> str:
    from tokenizers import AddedToken, processors

    tokenizer = _families()[family]()
    kept = FLAGS[flags]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([AddedToken(t, **{"normalized": False, **kept}) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in THINK])
    tokenizer.add_tokens([AddedToken("three", special=False, single_word=True)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer.to_str()


def folder(
    path: Path, family: str, flags: str = "plain", bos: bool = True, template: str = CHATML, **config: Any
) -> Path:
    """A folder as save_pretrained leaves it. bos: the post-processor puts "<s>" in front of a text."""
    path.mkdir(parents=True)
    (path / "tokenizer.json").write_text(_json(family, flags, bos))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "<|im_end|>",
                "unk_token": "<unk>",
                "clean_up_tokenization_spaces": False,
                "chat_template": template,
                **config,
            }
        )
    )
    (path / "config.json").write_text("{}")
    return path

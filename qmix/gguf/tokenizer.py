"""The tokenizer and chat template of a GGUF file, as the files that a checkpoint has for them.

    tokenizer.ggml.model "llama"   tokenizer.model: pieces, scores and types are those of sentencepiece
    tokenizer.ggml.model "gpt2"    tokenizer.json: byte-level BPE; tokenizer.ggml.pre names how texts are cut (bpe.py)
    tokenizer.ggml.model "gemma4"  tokenizer.json: BPE of characters
    tokenizer.chat_template        chat_template.jinja; tokenizer.chat_template.NAME in additional_chat_templates

and tokenizer_config.json, which names the tokens with a role. Errors are ConfigError naming the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qmix.errors import ConfigError
from qmix.gguf.bpe import bpe_json, gemma_json
from qmix.gguf.sentencepiece import model_proto
from qmix.gguf.vocabulary import Vocabulary
from qmix.modelfiles import (
    SENTENCEPIECE,
    TEMPLATE_JINJA,
    TEMPLATE_NAME,
    TEMPLATES,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
)
from qmix.models import Keys

PREFIX = "tokenizer.ggml."
MODEL = f"{PREFIX}model"
TEMPLATE = "tokenizer.chat_template"
LARGEST = (2 - 2**-23) * 2.0**127  # number of fp32
# Roles of tokens in tokenizer_config.json, and in GGUF's keys.
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """{name: bytes} of the files; {} where the GGUF file has no tokenizer."""
    keys = Keys(metadata)
    kind = keys.get(MODEL, None)
    if kind in (None, "none"):
        return {}
    if kind not in ("llama", "gpt2", "gemma4"):
        raise ConfigError(f"{MODEL}: got {kind!r:.40}, want 'llama', 'gpt2' or 'gemma4'",
                          "give the model as safetensors with its own tokenizer files")
    vocabulary = Vocabulary.read(keys, PREFIX, repeats=kind == "gemma4")
    roles = _roles(keys, vocabulary)
    bos, add_bos = roles.get("bos"), _flag(keys, "add_bos_token")
    config: dict[str, Any] = {f"{role}_token": vocabulary.texts[i] for role, i in roles.items()}
    if kind == "llama":
        prefix_space = _flag(keys, "add_space_prefix") is not False
        config |= {"add_bos_token": add_bos is not False, "add_prefix_space": prefix_space}
        files = {SENTENCEPIECE: model_proto(vocabulary, _scores(keys, vocabulary), bos, roles.get("eos"), prefix_space,
                                            _flag(keys, "remove_extra_whitespaces") is True, f"{PREFIX}token_type")}
    else:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        write = gemma_json if kind == "gemma4" else bpe_json
        files = {TOKENIZER_JSON: write(keys, PREFIX, vocabulary, bos, add_bos)}
    return {**files, TOKENIZER_CONFIG: json.dumps(config, ensure_ascii=False).encode(), **_templates(keys)}


def _roles(keys: Keys, vocabulary: Vocabulary) -> dict[str, int]:
    """{"bos": its id} and so on, as far as the file has them."""
    found = {}
    for role, name in ROLES.items():
        key = f"{PREFIX}{name}_token_id"
        ids = keys.token_ids(key)
        if ids:
            keys.want(ids[0] < len(vocabulary.texts), key, ids[0], f"less than {len(vocabulary.texts)}, the tokens")
            found[role] = ids[0]
    return found


def _flag(keys: Keys, name: str) -> bool | None:
    """A bool, None where the file has none."""
    key = f"{PREFIX}{name}"
    return keys.boolean(key) if key in keys else None


def _scores(keys: Keys, vocabulary: Vocabulary) -> tuple[float, ...]:
    scores, count = keys.numbers(f"{PREFIX}scores"), len(vocabulary.texts)
    keys.want(len(scores) == count, f"{PREFIX}scores", len(scores), f"{count}, as many as tokens")
    most = max(scores, key=abs, default=0.0)
    keys.want(abs(most) <= LARGEST, f"{PREFIX}scores", most, "numbers that fp32 has")
    return scores


def _templates(keys: Keys) -> dict[str, bytes]:
    """The chat template, and those with a name, as far as a file may be called so."""
    found = {}
    for key in keys.names():
        if key != TEMPLATE and not key.startswith(f"{TEMPLATE}."):
            continue
        text = keys.get(key)
        keys.want(isinstance(text, str), key, text, "a text")
        name = TEMPLATE_JINJA if key == TEMPLATE else f"{TEMPLATES}/{key.removeprefix(f'{TEMPLATE}.')}.jinja"
        keys.want(key == TEMPLATE or TEMPLATE_NAME.fullmatch(name) is not None, key, key, "a plain name")
        found[name] = text.encode()
    return found

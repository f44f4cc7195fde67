"""What a model folder says about its tokenizer, read from all the files that may say it (modelfiles.py lists them).

    tokenizer.json            the tokenizers library; its ids are the reference if it exists
    tokenizer.model           sentencepiece; read without tokenizer.json, and for Mixtral's own chat format
    tokenizer_config.json     special tokens, added tokens, legacy, add_prefix_space, add_bos_token, chat_template
    special_tokens_map.json, added_tokens.json    the same in older exports
    additional_chat_templates/default.jinja, chat_template.jinja, chat_template.json    the template in newer exports
    config.json, generation_config.json           eos_token_id

The folder is a checkpoint or a qmix store. Errors are ModelFileError naming the file and the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qmix.bounded import MAX_TEXT, parse_json, read_file
from qmix.errors import ModelFileError
from qmix.modelfiles import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    SENTENCEPIECE,
    SPECIAL_TOKENS,
    TEMPLATE_JINJA,
    TEMPLATE_JSON,
    TEMPLATES,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
)
from qmix.textfile import decode

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NEOX = ("gpt_neox", "olmo", "olmoe")  # kinds of models whose tokenizers are of GPT-NeoX's class
TOOL_USE = "tool_use"  # the name of the template for requests with tools
MAX_JSON = 256 * 2**20
FETCH = "the file is damaged: fetch it again from where the model came from"
LFS = "run `git lfs pull` in the folder"


class Added(NamedTuple):
    """A token that tokenizer_config.json adds to, or renames in, the vocabulary."""

    id: int
    special: bool
    lstrip: bool = False  # white space on that side belongs to the token
    rstrip: bool = False
    normalized: bool = False  # looked for in the normalized text
    single_word: bool = False
    stated: bool = True  # whether the flags stand in the file


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """spm and json are the vocabulary files that exist. named: "bos_token" and the like to their text. special: every
    text declared special; extra: those of them without a name. names: what the model is called, as far as the folder
    knows. legacy: whether sentencepiece's leading space is written after every special token, and not only at the
    start of a text; prefix_space: whether it is written at all. neox: whether transformers' class of this tokenizer is
    GPTNeoXTokenizer; spaced: whether add_prefix_space is stated. rows: ids of the model, where known. tool_template:
    the template for requests with tools, where the model has one of its own for them."""

    folder: Path
    spm: Path | None
    json: Path | None
    names: tuple[str, ...]
    named: Mapping[str, str]
    special: frozenset[str]
    extra: tuple[str, ...]
    added: Mapping[str, Added]
    add_bos: bool
    legacy: bool
    prefix_space: bool
    neox: bool
    spaced: bool
    template: str | None
    template_file: Path | None
    tool_template: str | None
    tool_file: Path | None
    eos_ids: tuple[int, ...]
    rows: int | None

    @property
    def templates(self) -> str:
        """All that the model's templates say, to look for tokens in it."""
        return (self.template or "") + (self.tool_template or "")


def read_files(folder: Path) -> TokenizerFiles:
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: no such folder", "give the folder that holds the model's files")
    spm, vocab = (folder / name if (folder / name).is_file() else None
                  for name in (SENTENCEPIECE, TOKENIZER_JSON))
    if spm is None and vocab is None:
        raise ModelFileError(f"{folder}: holds neither tokenizer.model nor tokenizer.json",
                             "copy the tokenizer files of the original model into the folder")
    path = folder / TOKENIZER_CONFIG
    config = {**_json(folder / SPECIAL_TOKENS), **_json(path)}
    model = _json(folder / "config.json")
    added = _added(path, config.get("added_tokens_decoder"), _json(folder / ADDED_TOKENS))
    others = (key for key, value in config.items() if key.endswith("_token") and isinstance(value, str | dict))
    names = dict.fromkeys((*NAMED, *others))
    named = {name: text for name in names if (text := _text(path, name, config.get(name))) is not None}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = [*extra.values()] if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise ModelFileError(f"{path}: additional_special_tokens: got {extra!r:.80}, want a list", FETCH)
    texts = tuple(t for token in extra if (t := _text(path, "additional_special_tokens", token)))
    special = {*named.values(), *texts, *(t for t, token in added.items() if token.special)}
    template, template_file, tool_template, tool_file = _templates(folder, config)
    called = [folder.resolve().name, model.get("_name_or_path")]
    rows = model.get("vocab_size")
    return TokenizerFiles(
        folder, spm, vocab, tuple(name for name in called if isinstance(name, str)), named, frozenset(special), texts,
        added, config.get("add_bos_token") is not False, config.get("legacy") is not False,
        config.get("add_prefix_space") is not False, _is_neox(config, model),
        config.get("add_prefix_space") is True, template, template_file, tool_template, tool_file,
        _eos_ids(folder / "config.json", model) + _eos_ids(folder / GENERATION_CONFIG),
        rows if type(rows) is int else None)


def _is_neox(config: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """As transformers chooses the class: the one that is named, else the one of the model's kind."""
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if isinstance(named, str):
        return named.removesuffix("Fast") == "GPTNeoXTokenizer"
    return model.get("model_type") in NEOX


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file."""
    try:
        value = parse_json(read_file(path, MAX_JSON))  # of bytes: a byte order mark is skipped
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise ModelFileError(f"{path}: {e.strerror or e}", "check the path and its permissions") from None
    except (ValueError, RecursionError):  # of decoding, too
        raise ModelFileError(f"{path}: not valid JSON", FETCH) from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: got a {type(value).__name__}, want an object", FETCH)
    return value


def _text(path: Path, key: str, value: object) -> str | None:
    """The text of a token given as a string or as {"content": ...}; None or "" mean that there is none."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or (isinstance(value, str) and is_text(value)):
        return value or None
    raise ModelFileError(f"{path}: {key}: got {value!r:.80}, want a token's text", FETCH)


def is_text(text: str) -> bool:
    """Whether it is text, and not half of a character beyond U+FFFF, as JSON can spell it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _added(path: Path, table: object, old: Mapping[str, Any]) -> dict[str, Added]:
    """{text: Added} from `added_tokens_decoder` ({"32000": {"content", "special"}}) or, before it came,
    from added_tokens.json ({text: id})."""
    found: dict[str, Added] = {}
    try:
        for key, token in (table or {}).items():  # type: ignore[attr-defined]
            if token["content"]:
                flags = {name: token.get(name, False) is True for name in Added._fields[1:-1]}
                found[token["content"]] = Added(int(key), **flags)
        if not found:
            path = path.with_name(ADDED_TOKENS)
            found = {text: Added(int(number), True, stated=False) for text, number in old.items() if text}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelFileError(f"{path}: the table of added tokens is malformed", FETCH) from None
    for text, token in found.items():
        if token.id < 0 or not isinstance(text, str):
            raise ModelFileError(f"{path}: added token {text!r:.80}: got id {token.id!s:.40}, want >= 0", FETCH)
        if not is_text(text):
            raise ModelFileError(f"{path}: added token {text!r:.80}: not Unicode text", FETCH)
    return found


def _templates(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, Path | None, str | None, Path | None]:
    """The template for plain chat and the file it stands in, then the same for requests with tools, where the model has
    a template named "tool_use" for them; the order is that of transformers."""
    extra = {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    tools = extra.get(TOOL_USE)
    tool_template = None if tools is None else _read(tools)
    for path in (extra.get("default"), folder / TEMPLATE_JINJA):
        if path is not None and path.is_file():
            return _read(path), path, tool_template, tools
    path, value = folder / TOKENIZER_CONFIG, config.get("chat_template")
    if value is None:
        path = folder / TEMPLATE_JSON
        value = _json(path).get("chat_template")
    if value is None:
        path, value = folder / TEMPLATES, dict.fromkeys(extra)  # none of them is for plain chat
    choices = _choices(path, value)
    if not choices:
        return None, None, None, None
    chosen = choices.get("default") if len(choices) > 1 else next(iter(choices.values()))
    if chosen is None:
        raise ModelFileError(f"{path}: chat_template: got the names {sorted(choices)}, want 'default' "
                             "among them", "name the template for plain chat 'default'")
    if tools is None and len(choices) > 1 and choices.get(TOOL_USE) is not None:
        tool_template, tools = choices[TOOL_USE], path
    for text in (chosen, tool_template):
        if text is not None and not isinstance(text, str):
            raise ModelFileError(f"{path}: chat_template: got a {type(text).__name__}, want text", FETCH)
    return chosen, path, tool_template, tools


def _read(path: Path) -> str:
    try:
        return decode(read_file(path, MAX_TEXT), str(path), ModelFileError)
    except OSError as e:
        raise ModelFileError(f"{path}: {e.strerror or e}", "check the path and its permissions") from None


def _choices(path: Path, value: object) -> dict[str, Any]:
    """{name: template} of a chat_template: a text, a list of entries of name and template, or an object."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list):
        return {"default": value}
    try:
        return {entry["name"]: entry["template"] for entry in value}
    except (KeyError, TypeError):
        raise ModelFileError(f"{path}: chat_template: want entries of name and template", FETCH) from None


def _eos_ids(path: Path, config: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Exporters write -1 where there is none, as transformers reads it."""
    value = (_json(path) if config is None else config).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise ModelFileError(f"{path}: eos_token_id: got {value!r:.80}, want token ids", FETCH)
    return tuple(i for i in ids if i >= 0)

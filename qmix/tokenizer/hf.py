"""tokenizer.json: a vocabulary of the tokenizers library.

To decode id by id, qmix needs to know what each entry stands for, which depends on the file's decoder. It knows the
kinds that causal models use: byte level (GPT-2's visible bytes), and sentencepiece's spelling with byte fallback. It
refuses other decoders, and at load it compares the pieces with the library's own decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from qmix.bounded import parse_json, parse_unique, read_file
from qmix.errors import ModelFileError, QmixError, UsageError, one_line
from qmix.textfile import without_mark
from qmix.tokenizer.files import FETCH, LFS, MAX_JSON, TokenizerFiles
from qmix.tokenizer.message import CLOSE, OPEN
from qmix.tokenizer.spm import ANCHOR, SPACE
from qmix.tokenizer.steps import check_steps
from qmix.tokenizer.stream import SILENT, Piece, StreamDecoder
from qmix.tokenizer.vocabulary import Rendered, Vocabulary, check_text, looks_like_marker

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPELLED = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
MAX_IDS = 2**22  # real vocabularies have 262,144
PROBE = "Hello, the w\u00f6rld \u2014 \U0001F98A 12\n  end"


def _visible_bytes() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, U+0100 and up for the other 68."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (b for b in range(256) if b not in shown)
    return {**{chr(b): b for b in shown}, **{chr(0x100 + n): b for n, b in enumerate(hidden)}}


class JsonVocabulary(Vocabulary):
    def __init__(self, path: Path, files: TokenizerFiles):
        self._path = path
        with _panics_are(ModelFileError, f"{path}: the tokenizers library fails on this file", FETCH):
            self._open(path, files)

    def _open(self, path: Path, files: TokenizerFiles) -> None:
        self._tokenizer, steps = _load(path, files)
        kinds = {str(step.get("type")) for step in steps}
        _add(path, self._tokenizer, files)
        self.per_byte = "ByteLevel" not in kinds
        self._alphabet = None if self.per_byte else _visible_bytes()
        self._has_bytes = "ByteFallback" in kinds
        self._drops_space = any(map(_drops_space, steps))
        entries: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        # The tags of reasoning are always text: they tell where it ends, even where a model declares them special.
        self._silent = {i for i in special if added[i].content not in (OPEN, CLOSE)}
        markers = {token.content: i for i, token in added.items()
                   if token.special or looks_like_marker(token.content, files)}
        bos, eos = (entries.get(files.named.get(name, "")) for name in ("bos_token", "eos_token"))
        size = max(entries.values(), default=-1) + 1
        if size > MAX_IDS:
            raise ModelFileError(f"{path}: an id of {size - 1}, want less than {MAX_IDS}", FETCH)
        super().__init__(size, {text: i for text, i in markers.items() if text}, bos_id=bos, eos_id=eos,
                         unk_id=_unknown(self._tokenizer, files, entries), declared=special,
                         lstrip={i for i, token in added.items() if token.lstrip},
                         rstrip={i for i, token in added.items() if token.rstrip})
        self._anchor: list[int] = self._tokenizer.encode(ANCHOR, add_special_tokens=False).ids
        self.head = _head(self._tokenizer)
        self._check(path)

    def token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def piece(self, token_id: int) -> Piece:
        text = self._tokenizer.id_to_token(token_id)
        if text is None or token_id in self._silent:
            return SILENT
        if self._alphabet is not None:
            if all(c in self._alphabet for c in text):
                return Piece(bytes(self._alphabet[c] for c in text), whole=False)
            return Piece(text.encode(), whole=False)
        if self._has_bytes and (byte := BYTE.fullmatch(text)):
            return Piece(bytes([int(byte[1], 16)]), whole=False)
        text = text.replace(SPACE, " ")
        return Piece(text.encode(), space=self._drops_space and text.startswith(" "))

    def _encode_part(self, part: Rendered, start: bool | None) -> list[int]:
        """As transformers does it: all in one go, markers and all. Where that would read a marker out of a message, the
        texts between the template's own markers are encoded each alone."""
        check_text(part.text)
        shift = 0 if start is None else len(ANCHOR)
        encoding = self._read(self._tokenizer, ANCHOR * bool(shift) + part.text)
        ids: list[int] = encoding.ids
        skipped = len(self._anchor) if shift else 0
        if ids[:skipped] == self._anchor[:skipped] and (
                not shift or encoding.offsets[skipped - 1][1] <= shift) and all(
                self._may_be_read(i, part, begin - shift, end - shift)
                for i, (begin, end) in zip(ids[skipped:], encoding.offsets[skipped:], strict=True)
                if i in self._marker_ids or i == self._unk_id):
            return ids[skipped:]
        return super()._encode_part(part, start)

    def _may_be_read(self, token_id: int, part: Rendered, begin: int, end: int) -> bool:
        """Whether the id may come from those characters: a marker from trusted ones only, white space that it takes
        with it aside; the unknown id from whatever does not spell it."""
        text = part.text[begin:end]
        if token_id == self._unk_id and self.token(token_id) not in text:
            return True
        return self._trusted(token_id, "".join(
            c for c, t in zip(part.trust[begin:end], text, strict=True) if not t.isspace()))

    def _encode(self, text: str, start: bool) -> list[int]:
        """ids of text without its markers. What continues a text is encoded behind an anchor, which keeps the
        tokenizer from writing a leading space."""
        shift = 0 if start else len(ANCHOR)
        encoding = self._read(self._tokenizer, ANCHOR * (not start) + text)
        if self.marker_ids(encoding.ids) or self._reads_unknown(text, encoding.ids):
            encoding = self._read(self._markerless, ANCHOR * (not start) + text)
        ids: list[int] = encoding.ids
        n = len(self._anchor) if shift else 0
        if ids[:n] != self._anchor[:n]:
            return self._encode(text, True)
        # An anchor that is unknown is one with unknown characters behind it.
        fused = n > 0 and encoding.offsets[n - 1][1] > shift
        return ids[n - fused:]

    def _read(self, tokenizer: Any, text: str) -> Any:
        """The library's encoding of text. UsageError where it gives up, as on a regex of the file that tries for too
        long: other texts may do."""
        with _panics_are(UsageError, f"{self._path.name}: the tokenizers library fails on this text",
                         "write it differently, or use another tokenizer file"):
            return tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def _markerless(self) -> Any:
        """A copy of the tokenizer that reads no marker out of text; other added tokens it does read."""
        from tokenizers import Tokenizer

        raw = json.loads(self._tokenizer.to_str())
        for token in raw["added_tokens"]:
            token["special"] = token["special"] or token["id"] in self._marker_ids
        try:
            found = Tokenizer.from_str(json.dumps(raw))
        except Exception as e:  # the library raises bare Exception, here for a merge of a token that is not there
            raise ModelFileError(f"{self._path}: not a tokenizer.json ({e!s:.100})", FETCH) from None
        found.encode_special_tokens = True
        return found

    @cached_property
    def fresh_after_marker(self) -> bool:  # type: ignore[override]
        text = PROBE.split()[0]
        for marker, i in self.markers.items():
            ids = self._read(self._tokenizer, marker + text).ids
            if ids[:1] == [i]:
                return bool(ids[1:] == self._encode(text, True))
        return True

    def _check(self, path: Path) -> None:
        """Our pieces against the library on a probe text."""
        ids = self._tokenizer.encode(PROBE, add_special_tokens=False).ids
        decoder = StreamDecoder(self.piece, per_byte=self.per_byte)
        ours = "".join(map(decoder.push, ids)) + decoder.finish()
        theirs = self._tokenizer.decode(ids, skip_special_tokens=True)
        if ours != theirs:
            raise ModelFileError(
                f"{path}: decodes a probe text to {theirs!r}, qmix's reading of its decoder gives {ours!r}",
                "use the model's tokenizer.model instead, or report this tokenizer")


@contextmanager
def _panics_are(kind: type[QmixError], message: str, cure: str) -> Iterator[None]:
    """An error of that kind for a panic of the library, which is no Exception, and whose class nobody can import."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise kind(f"{message} ({one_line(str(e)):.100})", cure) from None


def _head(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the file's post-processor puts in front of a text. Those that it puts behind are left out: an end
    would end the text that is to be continued."""
    bare: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    ids: list[int] = tokenizer.encode("a", add_special_tokens=True).ids
    return tuple(ids[:next((i for i in range(len(ids)) if ids[i:i + len(bare)] == bare), 0)])


def _unknown(tokenizer: Any, files: TokenizerFiles, entries: Mapping[str, int]) -> int | None:
    """The id of characters that the vocabulary lacks: the model's, or as the config names it."""
    name = getattr(tokenizer.model, "unk_token", None) or files.named.get("unk_token", "")
    return entries.get(name)


def _drops_space(step: Mapping[str, Any]) -> bool:
    """Whether a step of the decoder drops the space in front of the first word."""
    if step.get("type") == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0


def _add(path: Path, tokenizer: Any, files: TokenizerFiles) -> None:
    """Added tokens as transformers adds them: those of tokenizer_config.json's table, whose flags win and whose ids
    must come out as it says; then special tokens that have a name or are listed, where the file has them as others."""
    from tokenizers import AddedToken

    for text, token in sorted(files.added.items(), key=lambda item: item[1].id):
        if token.stated or tokenizer.token_to_id(text) is None:
            flags = {k: v for k, v in token._asdict().items() if k not in ("id", "special", "stated")}
            add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
            add([AddedToken(text, special=token.special, **flags)])
        if (got := tokenizer.token_to_id(text)) != token.id:
            raise ModelFileError(f"{path}: {text!r}: has id {got}, tokenizer_config.json says {token.id}",
                                 "fetch the tokenizer files again, all from the same model")
    for text in dict.fromkeys((*files.named.values(), *files.extra)):
        known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}.get(text)
        fits = tokenizer.token_to_id(text) is not None or files.rows is None or _next_id(tokenizer) < files.rows
        if fits:
            tokenizer.add_special_tokens([known or AddedToken(text, normalized=False)])


def _next_id(tokenizer: Any) -> int:
    """The id that a further token gets."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _of_neox(raw: dict[str, Any], files: TokenizerFiles) -> dict[str, Any]:
    """transformers' GPTNeoXTokenizer takes vocabulary and merges from the file, and the rest from its class and
    tokenizer_config.json: no BOS is put in front, whatever the file's post-processor says."""
    step = {"type": "ByteLevel", "add_prefix_space": files.spaced, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": raw["model"]["vocab"], "merges": raw["model"]["merges"]}
    return {**raw, "model": model, "normalizer": {"type": "NFC"}, "pre_tokenizer": step, "decoder": step,
            "post_processor": None}


def _parsed(text: str) -> tuple[dict[str, Any], bool]:
    """(the object that a JSON text holds, whether no key is there twice: else the library might take the other)."""
    try:
        raw, once = parse_unique(text.encode()), True
    except json.JSONDecodeError:
        raise
    except ValueError:
        raw, once = parse_json(text.encode()), False
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    return raw, once


def _load(path: Path, files: TokenizerFiles) -> tuple[Any, list[dict[str, Any]]]:
    """The library's tokenizer, which neither cuts nor pads, and the steps of its decoder."""
    from tokenizers import Tokenizer

    try:
        text = without_mark(read_file(path, MAX_JSON).decode("utf-8"))
        if text.startswith("version https://git-lfs"):
            raise ModelFileError(f"{path}: a Git LFS pointer, not the file itself", LFS)
        raw, once = _parsed(text)
        check_steps(path, raw)
        if not once:
            text = json.dumps(raw)
        if files.neox and raw["model"].get("type") == "BPE":
            raw = _of_neox(raw, files)
            text = json.dumps(raw)
        tokenizer = Tokenizer.from_str(text)
        decoder = raw.get("decoder") or {}
    except OSError as e:
        raise ModelFileError(f"{path}: {e.strerror or e}", "check the path and its permissions") from None
    except ModelFileError:
        raise
    except Exception as e:  # the library raises bare Exception for whatever is wrong with the file
        raise ModelFileError(f"{path}: not a tokenizer.json ({e!s:.100})", FETCH) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = {str(step.get("type")) for step in steps}
    if not (kinds == {"ByteLevel"} or kinds <= SPELLED):
        raise ModelFileError(f"{path}: decoder: got {' + '.join(sorted(kinds))}, want ByteLevel, Metaspace "
                             "or Replace + ByteFallback + Fuse + Strip",
                             "use the model's tokenizer.model instead")
    return tokenizer, steps

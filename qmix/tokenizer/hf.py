"""tokenizer.json: a vocabulary of the tokenizers library.

Decoding id by id needs to know what each entry stands for, which depends on the file's decoder. The kinds
that causal models use are known: byte level (GPT-2's visible bytes), and sentencepiece's spelling with
byte fallback. Another decoder is refused, and at load the pieces are held against the library's own decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qmix.errors import ModelFileError
from qmix.textfile import without_mark
from qmix.tokenizer.files import FETCH, LFS, TokenizerFiles
from qmix.tokenizer.spm import SPACE
from qmix.tokenizer.stream import SILENT, Piece, StreamDecoder
from qmix.tokenizer.vocabulary import Segment, Splice, Vocabulary, check_text, looks_like_marker

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPELLED = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
PROBE = "Hello, the w\u00f6rld \u2014 \U0001F98A 12\n  end"


def _visible_bytes() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, U+0100 and up for the other 68."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (b for b in range(256) if b not in shown)
    return {**{chr(b): b for b in shown}, **{chr(0x100 + n): b for n, b in enumerate(hidden)}}


class JsonVocabulary(Vocabulary):
    def __init__(self, path: Path, files: TokenizerFiles):
        self._tokenizer, kinds = _load(path)
        _add(path, self._tokenizer, files)
        self.per_byte = "ByteLevel" not in kinds
        self._alphabet = None if self.per_byte else _visible_bytes()
        self._has_bytes = "ByteFallback" in kinds
        self._drops_space = bool(kinds & {"Strip", "Metaspace"})
        entries: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self._silent = {i for i, token in added.items() if token.special}
        markers = {token.content: i for i, token in added.items()
                   if token.special or looks_like_marker(token.content, files)}
        bos, eos = (entries.get(files.named.get(name, "")) for name in ("bos_token", "eos_token"))
        size = max(entries.values(), default=-1) + 1
        super().__init__(size, {text: i for text, i in markers.items() if text}, bos_id=bos, eos_id=eos,
                         unk_id=entries.get(files.named.get("unk_token", "")))
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

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        """As transformers does it: the text between two splices is encoded in one go, markers and all.
        Where that would read a marker out of a message, each segment is encoded alone."""
        ids: list[int] = []
        run: list[int | str] = []
        for segment in [*segments, Splice(())]:
            if not isinstance(segment, Splice):
                run.append(segment)
                continue
            if run:
                ids += self._encode_run(run)
            ids += segment.ids
            run = []
        return ids

    def _encode_run(self, run: list[int | str]) -> list[int]:
        texts, markers = [s for s in run if isinstance(s, str)], [s for s in run if isinstance(s, int)]
        for text in texts:
            check_text(text)
        whole = self._encode("".join(s if isinstance(s, str) else self.token(s) for s in run), True)
        if self.marker_ids(whole) == self.marker_ids(markers) and not any(
                self._reads_unknown(text, whole) for text in texts):
            return whole
        return super().encode_segments(run)

    def _encode(self, text: str, start: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _check(self, path: Path) -> None:
        """Our pieces against the library on a probe text."""
        ids = self._encode(PROBE, True)
        decoder = StreamDecoder(self.piece, per_byte=self.per_byte)
        ours = "".join(map(decoder.push, ids)) + decoder.finish()
        theirs = self._tokenizer.decode(ids, skip_special_tokens=True)
        if ours != theirs:
            raise ModelFileError(
                f"{path}: decodes a probe text to {theirs!r}, qmix's reading of its decoder gives {ours!r}",
                "use the model's tokenizer.model instead, or report this tokenizer")


def _add(path: Path, tokenizer: Any, files: TokenizerFiles) -> None:
    """Added tokens that only tokenizer_config.json knows; their ids must come out as it says."""
    from tokenizers import AddedToken

    for text, token in sorted(files.added.items(), key=lambda item: item[1].id):
        if tokenizer.token_to_id(text) is None:
            add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
            add([AddedToken(text, special=token.special, normalized=False)])
        if (got := tokenizer.token_to_id(text)) != token.id:
            raise ModelFileError(f"{path}: {text!r}: has id {got}, tokenizer_config.json says {token.id}",
                                 "fetch the tokenizer files again, all from the same model")


def _load(path: Path) -> tuple[Any, set[str]]:
    """The library's tokenizer, which neither cuts nor pads, and the kinds of its decoder."""
    from tokenizers import Tokenizer

    try:
        text = without_mark(path.read_bytes().decode("utf-8"))
        if text.startswith("version https://git-lfs"):
            raise ModelFileError(f"{path}: a Git LFS pointer, not the file itself", LFS)
        tokenizer = Tokenizer.from_str(text)
        decoder = json.loads(text).get("decoder") or {}
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
    return tokenizer, kinds

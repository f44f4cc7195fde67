"""tokenizer.model: a vocabulary of the sentencepiece library, plus the tokens that the config adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qmix.bounded import read_file
from qmix.errors import ModelFileError
from qmix.tokenizer.files import FETCH, LFS, MAX_JSON, TokenizerFiles
from qmix.tokenizer.stream import SILENT, Piece
from qmix.tokenizer.vocabulary import Vocabulary, looks_like_marker, with_added

SPACE = "\u2581"  # sentencepiece's visible space
# A character that no vocabulary holds and so never merges with its neighbours (private use, plane 16).
ANCHOR = "\U0010FFFB"


class SentencePieceVocabulary(Vocabulary):
    def __init__(self, path: Path, files: TokenizerFiles):
        self._model = model = _load(path)
        try:
            self._pieces: list[str] = model.id_to_piece(list(range(model.get_piece_size())))
        except UnicodeDecodeError as e:
            raise ModelFileError(f"{path}: a piece is not UTF-8 ({e.reason})", FETCH) from None
        silent = {i for i in range(len(self._pieces)) if model.IsControl(i)}
        markers = {self._pieces[i]: i for i in silent}
        for i, text in enumerate(self._pieces):
            if looks_like_marker(text, files) and not model.IsByte(i):
                markers.setdefault(text, i)
        size, markers = with_added(len(self._pieces), markers, files)
        self._added = {token.id: text for text, token in files.added.items()}
        self._silent = silent | {token.id for token in files.added.values() if token.special}
        unknown = model.unk_id()
        self._silent.discard(unknown)  # shown as the library shows it
        markers[self._pieces[unknown]] = unknown
        bos, eos = (markers.get(files.named.get(name, ""), default if default >= 0 else None)
                    for name, default in (("bos_token", model.bos_id()), ("eos_token", model.eos_id())))
        self.head = (bos,) if files.add_bos and bos is not None else ()
        added = files.added.values()
        super().__init__(size, markers, bos_id=bos, eos_id=eos, unk_id=unknown,
                         declared=self._silent | {i for text, i in markers.items() if text in files.special},
                         lstrip={token.id for token in added if token.lstrip},
                         rstrip={token.id for token in added if token.rstrip})
        self.fresh_at_start, self.fresh_after_marker = files.prefix_space, files.prefix_space and files.legacy
        self._drops_space, self.drop_all = self._leading_space() if files.prefix_space else (False, False)
        self._anchor: list[int] = model.encode(ANCHOR)

    def token(self, token_id: int) -> str:
        return self._added.get(token_id) or self._pieces[token_id]

    def piece(self, token_id: int) -> Piece:
        if token_id in self._silent:
            return SILENT
        added = self._added.get(token_id)
        if added is not None and (token_id >= len(self._pieces) or added != self._pieces[token_id]):
            return Piece(added.encode())
        text = self._pieces[token_id]
        if self._model.IsByte(token_id):
            return Piece(bytes([int(text[1:-1], 16)]), whole=False)
        if self._model.IsUnknown(token_id):
            return Piece(self._model.decode([token_id]).encode())
        return Piece(text.replace(SPACE, " ").encode(), space=self._drops_space and text.startswith(SPACE))

    def _encode(self, text: str, start: bool) -> list[int]:
        if start:
            return self._model.encode(text)
        n = len(self._anchor)
        ids: list[int] = self._model.encode(ANCHOR + text)
        if ids[:n] != self._anchor:
            return self._encode(text, True)
        # An anchor that is unknown is one with unknown characters behind it.
        shown = self._model.encode(ANCHOR + text, out_type=str) if ids[n - 1] == self._unk_id else []
        fused = bool(shown) and not shown[n - 1].endswith(ANCHOR)
        return ids[n - fused:]

    def _leading_space(self) -> tuple[bool, bool]:
        """Whether decoding drops the first piece's space, and every piece's until there is text
        (normalizer_spec's add_dummy_prefix and remove_extra_whitespaces, which the library does not tell)."""
        model = self._model
        word = next((i for i, text in enumerate(self._pieces)
                     if text.startswith(SPACE) and text.strip(SPACE) and not model.IsControl(i)), None)
        if word is None:
            return False, False
        drops = not model.decode([word]).startswith(" ")
        space = model.piece_to_id(SPACE)
        both = model.decode([space, word])
        return drops, drops and not model.IsUnknown(space) and not both.startswith(" ")


def _load(path: Path) -> Any:
    import sentencepiece

    try:
        data = read_file(path, MAX_JSON)
    except OSError as e:
        raise ModelFileError(f"{path}: {e.strerror or e}", "check the path and its permissions") from None
    if data.startswith(b"version https://git-lfs"):
        raise ModelFileError(f"{path}: a Git LFS pointer, not the file itself", LFS)
    model = sentencepiece.SentencePieceProcessor()
    try:
        if not data:
            raise RuntimeError("empty file")
        model.LoadFromSerializedProto(data)
    except (RuntimeError, OSError, UnicodeDecodeError) as e:  # the last for a quoted piece that is no text
        reason = str(e).splitlines()[0]
        raise ModelFileError(f"{path}: not a sentencepiece model ({reason:.100})", FETCH) from None
    return model

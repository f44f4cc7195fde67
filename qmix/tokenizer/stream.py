"""Ids to text, one id at a time, never half a character.

A piece is the text that one id adds. Some pieces are whole characters; others (byte-fallback pieces, every piece of a
byte-level vocabulary) are bytes that may stop inside a character. Bytes are held back until they complete a character,
and replaced by U+FFFD as soon as they no longer can.

The rules are sentencepiece's own, so that all pushes and finish() together give the text that decoding all ids at once
gives: the space in front of the first word belongs to the encoding, not to the text; control pieces add no text, and
separate bytes before them from bytes after them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

REPLACEMENT = "\ufffd"


class Piece(NamedTuple):
    """What one id adds to the text.

    data: its bytes in UTF-8. whole: they start and end at character borders.
    space: the first byte is a space that is dropped at the very start of a text.
    """

    data: bytes
    whole: bool = True
    space: bool = False


SILENT = Piece(b"")


class StreamDecoder:
    """push() each id in turn, then finish(); what they return, joined, is the text.

    lookup: the piece of an id. per_byte: U+FFFD for each bad byte (sentencepiece) instead of each
    maximal bad sequence (byte-level vocabularies). drop_all: drop the leading space of every piece
    until there is text (sentencepiece's remove_extra_whitespaces), not only of the first.
    continuing: the text continues a prompt, so its leading space is kept.
    """

    __slots__ = ("_drop_all", "_fresh", "_lookup", "_pending", "_per_byte")

    def __init__(self, lookup: Callable[[int], Piece], *, per_byte: bool = True, drop_all: bool = False,
                 continuing: bool = False):
        self._lookup = lookup
        self._per_byte = per_byte
        self._drop_all = drop_all
        self._fresh = not continuing
        self._pending = b""

    def push(self, token_id: int) -> str:
        """The text that became certain with this id, often "" for a part of a character."""
        piece = self._lookup(token_id)
        if not piece.whole:
            self._pending += piece.data
            return self._seen(self._drain(final=False))
        flushed = self._seen(self._drain(final=True))
        text = piece.data.decode("utf-8", "surrogatepass")  # a MARK of parts.py, which no id's own bytes can be
        if self._fresh and piece.space:
            text = text[1:]
            self._fresh = self._drop_all
        return flushed + self._seen(text)

    def finish(self) -> str:
        """What was held back: U+FFFD for bytes that never became a character."""
        return self._seen(self._drain(final=True))

    def _seen(self, text: str) -> str:
        if text:
            self._fresh = False
        return text

    def _drain(self, final: bool) -> str:
        """Take the characters that are complete out of the pending bytes."""
        out = []
        while self._pending:
            try:
                out.append(self._pending.decode("utf-8"))
                self._pending = b""
            except UnicodeDecodeError as e:
                out.append(self._pending[:e.start].decode("utf-8"))
                self._pending = self._pending[e.start:]
                if e.reason == "unexpected end of data" and not final:
                    break
                bad = e.end - e.start
                out.append(REPLACEMENT * (bad if self._per_byte else 1))
                self._pending = self._pending[bad:]
        return "".join(out)

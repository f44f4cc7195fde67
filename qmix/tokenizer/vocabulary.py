"""Text to ids and back, whatever file the vocabulary comes from; and which tokens are markers.

A marker is a special token that structures a conversation: a control piece, a token declared special,
or one that a chat template writes out. A marker's id comes from the template or from the code that
builds a prompt, never from the text of a message: text that spells a marker is encoded as the characters
it is made of.

A prompt is a list of segments: an id, a text (encoded without markers), or a splice of ids that an
earlier answer generated.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qmix.errors import ModelFileError, UsageError
from qmix.tokenizer.files import TokenizerFiles
from qmix.tokenizer.stream import Piece


@dataclass(frozen=True, slots=True)
class Splice:
    """ids that stand in a prompt as they are."""

    ids: Sequence[int]


Segment = int | str | Splice

# Tokens of this shape structure a conversation although nothing declares them special.
TAG = re.compile(r"<\|[^|<>\s]+\|>")
BRACKETED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


def looks_like_marker(text: str, files: TokenizerFiles) -> bool:
    """Whether a token that is not a control piece is a marker all the same (see the module's prose)."""
    if text in files.special or TAG.fullmatch(text):
        return True
    return bool(BRACKETED.fullmatch(text)) and text in (files.template or "")


def check_text(text: str) -> None:
    """UsageError for lone surrogates, which stand for bytes that were no UTF-8 in the first place."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        code = ord(text[e.start])
        raw = f" (the byte 0x{code - 0xDC00:02x})" if 0xDC80 <= code <= 0xDCFF else ""
        raise UsageError(f"the text is not valid Unicode: character {e.start + 1} is U+{code:04X}{raw}",
                         "give it as UTF-8") from None


class Vocabulary(ABC):
    """size counts ids 0..size-1. markers maps a marker's text to its id."""

    # How a decoder for this vocabulary behaves; see StreamDecoder.
    per_byte = True
    drop_all = False

    def __init__(self, size: int, markers: Mapping[str, int], *, bos_id: int | None, eos_id: int | None,
                 unk_id: int | None = None):
        self.size = size
        self.markers = dict(markers)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._unk_id = unk_id
        self._marker_ids = frozenset(markers.values()) - {unk_id}  # which stands for unknown characters too
        longest_first = sorted(markers, key=len, reverse=True)
        # "(?!)" matches nothing.
        self.marker_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @abstractmethod
    def token(self, token_id: int) -> str:
        """The entry of the vocabulary, as the file spells it; 0 <= token_id < size."""

    @abstractmethod
    def piece(self, token_id: int) -> Piece:
        """What the id adds to a text; 0 <= token_id < size."""

    @abstractmethod
    def _encode(self, text: str, start: bool) -> list[int]:
        """ids of valid Unicode text, which may come out as markers. start: whether the text begins a
        segment of its own, which sentencepiece shows by a space in front of the first word."""

    def encode_text(self, text: str, start: bool = True) -> list[int]:
        """ids of text, no marker's among them; [] for "". UsageError where the text is no Unicode."""
        check_text(text)
        ids: list[int] = []
        while text:
            found = self._encode(text, start)
            if not self.marker_ids(found) and not self._reads_unknown(text, found):
                return ids + found
            # Cut the spelled-out marker behind its first character: neither half is the marker.
            match = self.marker_pattern.search(text)
            if match is None or len(match[0]) == 1:
                marker = self.token(next(i for i in found if i in self.markers.values()))
                raise UsageError(f"the text holds {marker!r}, which is a control token of this model",
                                 "write it differently")
            ids += self._encode(text[:match.start() + 1], start)
            text, start = text[match.start() + 1:], False
        return ids

    def encode_segments(self, segments: Sequence[Segment]) -> list[int]:
        """ids of a prompt. A text begins afresh at the start and after a marker; after spliced ids it
        continues the answer."""
        ids: list[int] = []
        start = True
        for segment in segments:
            if isinstance(segment, Splice):
                ids += segment.ids
                start = False
            elif isinstance(segment, str):
                ids += self.encode_text(segment, start)
            else:
                ids.append(segment)
                start = True
        return ids

    def marker_ids(self, ids: Iterable[int]) -> list[int]:
        """The markers among ids, in order; the unknown id is none, for characters can be unknown."""
        return [i for i in ids if i in self._marker_ids]

    def _reads_unknown(self, text: str, found: Sequence[int]) -> bool:
        """Whether the unknown token among the ids of text may come from text that spells it."""
        return self._unk_id in found and self.token(self._unk_id) in text  # type: ignore[arg-type]


def with_added(size: int, markers: Mapping[str, int], files: TokenizerFiles) -> tuple[int, dict[str, int]]:
    """The size and the markers of a vocabulary after tokenizer_config.json's added tokens, which must
    extend it without a hole."""
    merged = {**markers, **{text: token.id for text, token in files.added.items()}}
    beyond = sorted({token.id for token in files.added.values() if token.id >= size})
    for expected, token_id in enumerate(beyond, size):
        if token_id != expected:
            raise ModelFileError(f"{files.folder}: added tokens: got id {token_id} after {expected - 1}, "
                                 f"want {expected}", "fetch all tokenizer files again, from the same model")
    return size + len(beyond), merged

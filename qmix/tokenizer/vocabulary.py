"""Text to ids and back, for every kind of vocabulary file; and which tokens are markers.

A marker is a special token that structures a conversation: a control piece, a token declared special, or one that a
chat template writes out. A marker's id comes from the template or from the code that builds a prompt, never from the
text of a message: text that spells a marker is encoded as the characters it consists of.

A prompt is a list of segments: an id, a text (encoded without markers), or the ids that an earlier answer generated,
inserted as they are (a splice). The text of a rendered chat template says for each character who wrote it: the
template, whose markers count, an answer, or a message that somebody typed.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qmix.errors import ModelFileError, PromptTooLong, UsageError
from qmix.tokenizer.files import TokenizerFiles
from qmix.tokenizer.stream import Piece


@dataclass(frozen=True, slots=True)
class Splice:
    """ids that stand in a prompt as they are."""

    ids: Sequence[int]


Segment = int | str | Splice

# Who is behind a character. In an answer, tokens that are not declared special count ("<think>"), markers do not.
OWN, ANSWER, TYPED = "t", "a", "u"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text of which `trust` has OWN, ANSWER or TYPED for each character."""

    text: str
    trust: str

# Tokens of this shape structure a conversation although nothing declares them special.
TAG = re.compile(r"<\|[^|<>\s]+\|>")
UNPRINTED = re.compile(r"[^!-~]+")  # all but printable ASCII
BRACKETED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


def looks_like_marker(text: str, files: TokenizerFiles) -> bool:
    """Whether a token that is not a control piece is a marker all the same (see the module's prose)."""
    if text in files.special or TAG.fullmatch(text):
        return True
    return bool(BRACKETED.fullmatch(text)) and text in files.templates


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
    """size counts ids 0..size-1. markers maps a marker's text to its id; of these `declared` are declared special, the
    others are markers by their look. lstrip and rstrip: markers that take the white space on that side with them."""

    # How a decoder for this vocabulary behaves; see StreamDecoder.
    per_byte = True
    drop_all = False
    # Whether a text begins afresh (with sentencepiece's leading space) at the start of a prompt, and after a marker.
    fresh_at_start = True
    fresh_after_marker = True
    # What the model's own tokenizer puts in front of a text: the start id, or nothing.
    head: tuple[int, ...] = ()

    def __init__(self, size: int, markers: Mapping[str, int], *, bos_id: int | None, eos_id: int | None,
                 unk_id: int | None = None, declared: Collection[int] | None = None,
                 lstrip: Collection[int] = (), rstrip: Collection[int] = ()):
        self.size = size
        self.markers = dict(markers)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.declared = frozenset(markers.values() if declared is None else declared)
        self._lstrip, self._rstrip = frozenset(lstrip), frozenset(rstrip)
        self._unk_id = unk_id
        self._marker_ids = frozenset(markers.values()) - {unk_id}  # which stands for unknown characters too
        self.marker_pattern = _any_of(markers)

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

    def check_length(self, parts: Iterable[str], limit: int | None) -> None:
        """UsageError, before anything is encoded, where a prompt of these texts surely has more than `limit` ids. No id
        stands for more characters than the longest entry has; only printable ASCII is counted, which no
        normalization drops, and nothing where a vocabulary has unknown characters."""
        parts = list(parts)
        if limit is None or sum(map(len, parts)) <= limit or not self._longest:
            return
        least = -(-sum(len(UNPRINTED.sub("", text)) for text in parts) // self._longest)
        if least > limit:
            raise PromptTooLong(f"the prompt has at least {least} tokens, the context holds {limit}",
                                "shorten it, or start with a larger --ctx-size")

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest entry; 0 where an ASCII character may be unknown, and many of them one id."""
        if self._unk_id is not None and any(self._unk_id in self._encode(chr(c), False) for c in range(0x21, 0x7F)):
            return 0
        return max(len(self.token(i)) for i in range(self.size))

    def encode_text(self, text: str, start: bool = True) -> list[int]:
        """ids of text, no marker's among them; [] for "". UsageError where the text is no Unicode.

        Takes time in proportion to the text, whatever it spells."""
        check_text(text)
        found = self._encode(text, start) if text else []
        if not self.marker_ids(found) and not self._reads_unknown(text, found):
            return found
        return self._cut_apart(text, start, (self._readable, self.marker_pattern))

    def _cut_apart(self, text: str, start: bool, patterns: Sequence[re.Pattern[str]]) -> list[int]:
        """ids of a text whose markers are each cut behind the first character: neither half is the marker. The
        first pattern is tried on the whole text, the next ones where markers are left."""
        ids: list[int] = []
        begin = 0
        for end in [*_cuts(text, patterns[0]), len(text)]:
            part = text[begin:end]
            found = self._encode(part, start and begin == 0) if part else []
            if self.marker_ids(found) or self._reads_unknown(part, found):
                if len(patterns) == 1:
                    marker = self.token(next(i for i in found if i in self.markers.values()))
                    raise UsageError(f"the text holds {marker!r}, which is a control token of this model",
                                     "write it differently")
                found = self._cut_apart(part, start and begin == 0, patterns[1:])
            ids += found
            begin = end
        return ids

    @cached_property
    def _readable(self) -> re.Pattern[str]:
        """The markers that the library reads out of text."""
        return _any_of(text for text, i in self.markers.items() if i in self._encode(text, False))

    def encode_segments(self, segments: Sequence[Segment], start: bool | None = None) -> list[int]:
        """ids of a prompt. A text begins afresh at the start and after a marker, as far as the model does so; after
        spliced ids it continues the answer. start: whether the first text begins afresh."""
        ids: list[int] = []
        start = self.fresh_at_start if start is None else start
        for segment in segments:
            if isinstance(segment, Splice):
                ids += segment.ids
                start = False
            elif isinstance(segment, str):
                ids += self.encode_text(segment, start)
                start = start and not segment
            else:
                ids.append(segment)
                start = self.fresh_after_marker
        return ids

    def encode_rendered(self, parts: Sequence[Rendered | Splice]) -> list[int]:
        """ids of what a template rendered, with spliced answers in it; no character but the template's own is read as
        part of a marker."""
        ids: list[int] = []
        start: bool | None = None
        for part in parts:
            if isinstance(part, Splice):
                ids += part.ids
                start = False
            elif part.text:
                ids += self._encode_part(part, start)
                start = False
        return ids

    def _encode_part(self, part: Rendered, start: bool | None) -> list[int]:
        return self.encode_segments(self.split(part), start)

    def split(self, part: Rendered) -> list[int | str]:
        """The markers that are the template's, and the texts between them: "<s>hi <s>" with only the first "<s>" its
        own -> [1, "hi <s>"]."""
        found: list[int | str] = []
        begin, at, text, strip = 0, 0, part.text, False
        while (match := self.marker_pattern.search(text, at)) is not None:
            marker = self.markers[match[0]]
            if not self._trusted(marker, part.trust[match.start():match.end()]):
                at = match.start() + 1
                continue
            before = text[begin:match.start()]
            before = before.lstrip() if strip else before
            before = before.rstrip() if marker in self._lstrip else before
            found += [before, marker] if before else [marker]
            begin = at = match.end()
            strip = marker in self._rstrip
        rest = text[begin:].lstrip() if strip else text[begin:]
        return [*found, rest] if rest else found

    def _trusted(self, marker: int, trust: str) -> bool:
        """Whether a marker spelled by such characters counts."""
        return set(trust) <= ({OWN} if marker in self.declared else {OWN, ANSWER})

    def marker_ids(self, ids: Iterable[int]) -> list[int]:
        """The markers among ids, in order; the unknown id is none, for characters can be unknown."""
        return [i for i in ids if i in self._marker_ids]

    def _reads_unknown(self, text: str, found: Sequence[int]) -> bool:
        """Whether the unknown token among the ids of text may come from text that spells it."""
        return self._unk_id in found and self.token(self._unk_id) in text  # type: ignore[arg-type]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the texts that stands at a place; "(?!)" matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _cuts(text: str, pattern: re.Pattern[str]) -> Iterator[int]:
    """Places between the characters of text such that no match stays whole, overlapping ones included."""
    match = pattern.search(text)
    while match is not None:
        if len(match[0]) > 1:
            yield match.start() + 1
        match = pattern.search(text, match.start() + 1)


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

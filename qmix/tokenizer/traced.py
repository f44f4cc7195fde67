"""Text that remembers where each of its characters came from.

A chat template gets the messages unchanged, as Traced strings, and may do to them what a template can do to text:
search, cut, strip, split, replace, change case, join. The characters of the result still say which message they came
from, so that "</s>" typed by a user differs from the "</s>" that the template itself writes.

    Traced("ab </s>", source(0) * 7).strip()[:2] + "</s>"    sources: message 0 twice, then four times the template

A source is one character: TEMPLATE, UNKNOWN, or source(k) for message k. The sources of a text are a string as long as
the text, so both are cut and joined in the same way. A plain str inside a template is the template's own. An operation
that cannot be followed gives UNKNOWN, never TEMPLATE: what is not known to be the template's counts as typed text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

from qmix.errors import PromptTooLong

TEMPLATE, UNKNOWN = "\0", "\1"
FIRST = 2  # the source of message 0
PROBE = 0xF0000  # private use, plane 15: stands for a character of a source while an operation is probed
PROBES = range(PROBE, PROBE + 0xFFFE)


def source(message: int) -> str:
    """The source that stands for message number `message`; PromptTooLong where there are more than sources."""
    if message > sys.maxunicode - FIRST:
        raise PromptTooLong(f"a conversation of more than {message} messages", "leave the oldest ones out")
    return chr(FIRST + message)


class Traced(str):
    """sources: one for each character; UNKNOWN for all of them where not given."""

    __slots__ = ("_sources",)
    _sources: str

    def __new__(cls, text: object = "", sources: str | None = None) -> Traced:
        self = super().__new__(cls, str.__str__(text) if isinstance(text, str) else text)
        self._sources = UNKNOWN * len(self) if sources is None else sources
        assert len(self._sources) == len(self)
        return self

    def __str__(self) -> str:
        return self  # str(x) in a template keeps the sources

    def __add__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(self, other), self._sources + sources_of(other))

    def __radd__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(other, self), sources_of(other) + self._sources)

    def __mul__(self, times: SupportsIndex) -> Traced:
        return Traced(str.__mul__(self, times), self._sources * times)

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> Traced:
        return Traced(str.__getitem__(self, key), self._sources[key])

    def __iter__(self) -> Iterator[Traced]:
        return map(Traced, str.__iter__(self), self._sources)

    # ---- cutting

    def lstrip(self, chars: str | None = None, /) -> Traced:
        return self[len(self) - len(str.lstrip(self, chars)):]

    def rstrip(self, chars: str | None = None, /) -> Traced:
        return self[:len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None, /) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> Traced:
        return self[len(self) - len(str.removeprefix(self, prefix)):]

    def removesuffix(self, suffix: str, /) -> Traced:
        return self[:len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Traced]:  # type: ignore[override]
        return self._pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Traced]:  # type: ignore[override]
        return self._pieces(str.rsplit(self, sep, maxsplit), sep)

    def _pieces(self, pieces: list[str], sep: str | None) -> list[Traced]:
        """The pieces of a split, found again one behind the other."""
        found, at = [], 0
        for piece in pieces:
            if sep is None:  # white space of any length stands between two pieces
                at = self.find(piece, at)
            found.append(self[at:at + len(piece)])
            at += len(piece) + len(sep or "")
        return found

    def splitlines(self, keepends: bool = False) -> list[Traced]:  # type: ignore[override]
        found, at = [], 0
        for line, whole in zip(str.splitlines(self, keepends), str.splitlines(self, True), strict=True):
            found.append(self[at:at + len(line)])
            at += len(whole)
        return found

    def partition(self, sep: str, /) -> tuple[Traced, Traced, Traced]:
        head, middle, _ = str.partition(self, sep)
        end = len(head) + len(middle)
        return self[:len(head)], self[len(head):end], self[end:]

    def rpartition(self, sep: str, /) -> tuple[Traced, Traced, Traced]:
        head, middle, _ = str.rpartition(self, sep)
        end = len(head) + len(middle)
        return self[:len(head)], self[len(head):end], self[end:]

    # ---- changing

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Traced:
        if not old:  # between all characters: nobody's template does that
            return self._rewritten(str.replace(self, old, new, count))
        return interleave(new, self.split(old, count))

    def join(self, items: Iterable[str], /) -> Traced:
        return interleave(self, list(items))

    def _recased(self, text: str) -> Traced:
        """A change of case as a rule keeps the length."""
        return Traced(text, self._sources) if len(text) == len(self) else self._rewritten(text)

    def _rewritten(self, text: str) -> Traced:
        """A text made of this one in a way that is not followed: of its source, where there is only one."""
        only = self._sources[:1] if self._sources == self._sources[:1] * len(self) else ""
        return Traced(text, (only or UNKNOWN) * len(text))

    def lower(self) -> Traced:
        return self._recased(str.lower(self))

    def upper(self) -> Traced:
        return self._recased(str.upper(self))

    def casefold(self) -> Traced:
        return self._recased(str.casefold(self))

    def title(self) -> Traced:
        return self._recased(str.title(self))

    def capitalize(self) -> Traced:
        return self._recased(str.capitalize(self))

    def swapcase(self) -> Traced:
        return self._recased(str.swapcase(self))

    def center(self, *args: Any) -> Traced:
        return self._rewritten(str.center(self, *args))

    def ljust(self, *args: Any) -> Traced:
        return self._rewritten(str.ljust(self, *args))

    def rjust(self, *args: Any) -> Traced:
        return self._rewritten(str.rjust(self, *args))

    def zfill(self, width: SupportsIndex, /) -> Traced:
        return self._rewritten(str.zfill(self, width))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> Traced:
        return self._rewritten(str.expandtabs(self, tabsize))

    def translate(self, table: Any, /) -> Traced:
        return self._rewritten(str.translate(self, table))

    def encode(self, *args: Any, **kwargs: Any) -> bytes:
        raise TypeError("a message cannot be converted to bytes")  # which would lose the sources


def sources_of(text: str) -> str:
    """One source for each character; a plain str is the template's."""
    return text._sources if isinstance(text, Traced) else TEMPLATE * len(text)


def plain(text: str) -> str:
    """The text alone."""
    return str.__str__(text)


def concat(parts: Iterable[str]) -> str:
    """The parts one behind the other; a plain str where all of them are the template's."""
    parts = list(parts)
    text = "".join(parts)
    return Traced(text, "".join(map(sources_of, parts))) if any(isinstance(p, Traced) for p in parts) else text


def interleave(between: str, items: Sequence[str]) -> Traced:
    """between.join(items), traced."""
    between.join(()) if not items else plain(between).join(items)  # TypeError where an item is no text
    parts = [part for item in items for part in (between, item)][1:]
    return Traced("".join(parts), "".join(map(sources_of, parts)))


def holds_traced(value: Any, depth: int = 20) -> bool:
    """Whether a Traced is among the values of a nested list, tuple, set or dict; assumed where it is nested deeply."""
    if isinstance(value, Traced) or depth == 0:
        return True
    if isinstance(value, Mapping):
        return any(holds_traced(v, depth - 1) for pair in value.items() for v in pair)
    return isinstance(value, list | tuple | set | frozenset) and any(holds_traced(v, depth - 1) for v in value)


def as_text(value: Any) -> str:
    """str(value) as a template writes it. A list or object written out is not followed inside."""
    if isinstance(value, str):
        return value
    text = str(value)
    if isinstance(value, list | tuple | dict | set | frozenset):
        return Traced(text) if holds_traced(value) else text
    simple = value is None or isinstance(value, int | float) or not text  # undefined values are written as ""
    return text if simple else Traced(text)


def followed(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *,
             exact: bool = False) -> Any:
    """function(*args, **kwargs); a text that it makes out of traced ones is traced. exact: a Traced that it returns can
    be relied on, since it uses methods of Traced alone: a join of str, say, would lose the sources of a part.

    The function is run again with each character of a source replaced by one that stands for the source. Where both
    results are alike but for those, they say where each character came from; else the source is UNKNOWN.
    """
    real = function(*args, **kwargs)
    if not isinstance(real, str) or (exact and isinstance(real, Traced)) or not (
            holds_traced(tuple(args)) or holds_traced(dict(kwargs))):
        return real
    text = str.__str__(real)
    try:
        probe = function(*map(_stand_in, args), **{name: _stand_in(value) for name, value in kwargs.items()})
    except Exception:  # the stand-ins are no numbers, keys or whatever it wants
        return Traced(text)
    if not isinstance(probe, str) or len(probe) != len(text):
        return Traced(text)
    sources = []
    for shown, stood in zip(text, str.__str__(probe), strict=True):
        if ord(stood) in PROBES:
            sources.append(chr(ord(stood) - PROBE))
        elif stood == shown:
            sources.append(TEMPLATE)
        else:
            return Traced(text)
    return Traced(text, "".join(sources))


def _stand_in(value: Any) -> Any:
    """value with stand-ins in place of all traced characters but white space, which the operation may look at."""
    if isinstance(value, Traced):
        return "".join(c if c.isspace() else chr(min(PROBE + ord(s), PROBES[-1]))
                       for c, s in zip(plain(value), value._sources, strict=True))
    if isinstance(value, Mapping):
        return {_stand_in(k): _stand_in(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_stand_in, value)) if type(value) in (list, tuple) else value
    return value

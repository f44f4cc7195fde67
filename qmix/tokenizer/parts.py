"""The parts of an answer: what the model thinks, what it answers, which tools it calls.

    <think>hm</think>So.            reasoning "hm", answer "So."
    to=functions.weather {"x": 1}   call Call("weather", '{"x": 1}')

A format of answers is one file with one parser (AnswerParser): reasoning.py for tags of reasoning, calls.py for those
and tags of calls, harmony.py for channels, gemma.py for a channel and calls. A parser gets the text of an answer in
pieces, in whatever way it is cut, and gives Parts that are certain.

Where a format has control tokens inside an answer, the parser must not take text that spells one for the token itself.
A marked text has MARK in front of each control token. MARK is a lone surrogate, which no UTF-8 decodes to, so no text
of a model holds one but where the decoder put it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from qmix.tokenizer.message import Prompt

if TYPE_CHECKING:
    from qmix.tokenizer import Tokenizer

MARK = "\ud800"
CALL = "tool call: "  # what the text of a call begins with

Kind = Literal["reasoning", "answer", "call"]
Span = tuple[int, int | None]  # characters of the marked text from, to; None: to its end


class Part(NamedTuple):
    """A piece of an answer, without tags. A call is shown as "tool call: NAME ARGUMENTS"."""

    text: str
    kind: Kind


class Call(NamedTuple):
    """A function that an answer calls. arguments: as the model wrote them, which may be no JSON."""

    name: str
    arguments: str


class AnswerParser(Protocol):
    """push() the pieces of an answer in turn, then finish()."""

    @property
    def found(self) -> bool:
        """Whether there is reasoning."""

    @property
    def answering(self) -> bool:
        """Whether the text that comes next is the answer's, if it begins nothing else."""

    @property
    def calls(self) -> Sequence[Call]:
        """Calls that are complete."""

    @property
    def thinking(self) -> Sequence[Span]:
        """Where the reasoning stands in the marked text, its tags included."""

    @property
    def answers(self) -> Sequence[Span]:
        """Where the answer stands. No span or several: no run of the text is the answer alone."""

    def push(self, text: str) -> list[Part]:
        """What is certain with this piece."""

    def finish(self) -> list[Part]:
        """What was held back."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """marks: the ids that are marked in an answer, with their text; content: those of them that text follows, behind
    the others stand headers. parser: of an answer to a prompt, where `opening`
    is the marked text from the prompt's last token in `begins` on, "" without one. verbatim: whether the model's own
    text is fit to be read, tags and all. call_grammar: of what an answer consists of that calls one of these tools, or
    several where the flag says so, in llguidance's dialect of Lark; None where this format has none."""

    parser: Callable[[Prompt, str], AnswerParser]
    marks: Mapping[int, str] = field(default_factory=dict)
    begins: int | None = None
    content: Collection[int] = ()
    verbatim: bool = True
    call_grammar: Callable[[Sequence[Mapping[str, Any]], bool], str] | None = None


class Divided(NamedTuple):
    """An answer in its parts, without the line breaks around them. reasoning: None where there is none. ids: the
    answer's own, None where no run of them says the answer alone, as where a token holds the end of the reasoning and
    the begin of the answer. thinking_tokens: the ids of the reasoning, those of its tags included."""

    reasoning: str | None
    answer: str
    ids: tuple[int, ...] | None
    thinking_tokens: int
    calls: tuple[Call, ...] = ()


def divide(text: str, ids: Sequence[int] | None, tokenizer: Tokenizer, prompt: Prompt) -> Divided:
    """The parts of a whole answer to `prompt`. text: marked; ids: those that say it, where they are known. An answer
    without reasoning comes back as it is."""
    parser = tokenizer.answer_parser(prompt)
    parts = parser.push(text) + parser.finish()
    reasoning, said = ("".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "answer"))
    answer = said.lstrip("\n") if parser.found else said
    thought, calls = reasoning.strip("\n") if parser.found else None, tuple(parser.calls)
    if ids is None:
        return Divided(thought, answer, None, 0, calls)
    ends = _ends(ids, tokenizer)
    thinking = sum(_count(ends, span) for span in parser.thinking)
    return Divided(thought, answer, _own(ids, ends, parser.answers, len(said) - len(answer), answer), thinking, calls)


def _ends(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """How many characters of the marked text are said up to and with each id."""
    decoder = tokenizer.decoder(marked=True)
    ends = list(accumulate(len(decoder.push(token)) for token in ids))
    if ends:
        ends[-1] += len(decoder.finish())
    return ends


def _count(ends: Sequence[int], span: Span) -> int:
    """How many ids say the characters of `span`."""
    begin, end = span
    last = len(ends) if end is None else min(bisect_left(ends, end) + 1, len(ends))
    return max(0, last - (bisect_right(ends, begin) if begin else 0))


def _own(ids: Sequence[int], ends: Sequence[int], spans: Sequence[Span], blank: int,
         answer: str) -> tuple[int, ...] | None:
    """The ids of an answer that stands in one span, less `blank` characters at its begin."""
    if not answer:
        return ()
    if len(spans) != 1:
        return None
    begin, end = spans[0]
    begin += blank
    first = bisect_left(ends, begin) + 1 if begin else 0
    if first and ends[first - 1:first] != [begin]:
        return None
    return tuple(ids[first:len(ids) if end is None else bisect_right(ends, end)])

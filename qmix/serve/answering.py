"""One answer: tokens out of the generator become Events, with the reasoning, the answer and the calls apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from qmix.config import Cancel, SamplingParams
from qmix.generate import Token, generate
from qmix.serve.events import Began, Called, Ended, Event, Piece, TokenLog
from qmix.serve.grammar import GrammarConstraint
from qmix.serve.token_logs import TokenLogs
from qmix.tokenizer import AnswerParser, Part, Prompt, Tokenizer, divide
from qmix.tokenizer.message import without_end
from qmix.tokenizer.parts import Span

if TYPE_CHECKING:
    from qmix.engine import Session
    from qmix.speculation import Pace


Kind = Literal["reasoning", "answer"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One answer to compute. raw: the prompt is continued as it is. one_call: the answer ends behind its first call."""

    choice: int
    prompt: Prompt
    params: SamplingParams
    raw: bool = False
    top_logprobs: int | None = None
    one_call: bool = False
    constraint: GrammarConstraint | None = None


@dataclass(slots=True)
class Trimmer:
    """Parts of an answer without the line breaks around its reasoning and in front of what it says behind that, as
    tokenizer.divide gives them."""

    _held: str = ""  # line breaks at the end of the reasoning so far
    _reasoned: bool = False
    _said: bool = False

    def push(self, part: Part, reasoned: bool) -> str:
        """What of the part is text. reasoned: whether the answer has reasoning."""
        if part.kind == "reasoning":
            text = self._held + part.text
            text = text if self._reasoned else text.lstrip("\n")
            kept = text.rstrip("\n")
            self._held = text[len(kept):]
            self._reasoned = self._reasoned or bool(kept)
            return kept
        text = part.text if self._said or not reasoned else part.text.lstrip("\n")
        self._said = self._said or bool(text)
        return text


class _Broken(Cancel):
    """Set, or its parent is."""

    __slots__ = ("_parent",)

    def __init__(self, parent: Cancel) -> None:
        super().__init__()
        self._parent = parent

    def __bool__(self) -> bool:
        return super().__bool__() or bool(self._parent)


@dataclass(slots=True)
class Answering:
    """answer() gives the events; afterwards `remembered` has the text and the ids of the answer, where some run of its
    ids says just that text."""

    tokenizer: Tokenizer
    asked: Asked
    remembered: tuple[str, tuple[int, ...]] | None = None
    _trimmer: Trimmer = field(default_factory=Trimmer)
    _logs: TokenLogs | None = None  # where log probabilities are asked for
    _said: int = 0  # characters of the marked text so far
    _blank: int = 0  # of them, line breaks in front of the answer
    _calls: int = 0

    def answer(self, session: Session, cancel: Cancel, pace: Pace | None,
               clock: Callable[[], float]) -> Iterator[Event]:
        """session: holds a prefix of the prompt. QmixError in the middle of an answer ends it."""
        asked, tokenizer = self.asked, self.tokenizer
        parser = None if asked.raw else tokenizer.answer_parser(asked.prompt)
        broken = _Broken(cancel)
        if asked.constraint is not None and (parser is None or parser.answering):
            asked.constraint.begin()
        if asked.top_logprobs is not None:
            self._logs = TokenLogs(tokenizer, tokenizer.decoder(asked.raw, not asked.raw))
        if session.length >= len(asked.prompt.ids):
            session.trim(len(asked.prompt.ids) - 1)  # as generate does; a recurrent model may go back further
        cached = session.length
        texts: list[str] = []
        last: Token | None = None
        for last in generate(session, asked.prompt.ids, asked.params, tokenizer, broken,
                             stops=() if asked.raw else tokenizer.turn_stops, continuing=asked.raw,
                             marked=not asked.raw, logprobs=asked.top_logprobs is not None,
                             top_logprobs=asked.top_logprobs or 0, pace=pace, constraint=asked.constraint,
                             clock=clock):
            if not texts:
                yield Began(asked.choice, len(asked.prompt.ids), cached)
            texts.append(last.text)
            self._said += len(last.text)
            if self._logs is not None:
                self._logs.push(last)
            yield from self._told(last.text, parser)
            if asked.one_call and self._calls:
                broken.set()  # the next record is the last, and costs no pass
        assert last is not None and last.summary is not None and last.finish_reason is not None
        summary = last.summary
        timings = summary.timings
        if parser is not None:
            yield from self._parts(parser.finish(), parser)
            text = "".join(texts)
            parts = divide(text, without_end(summary.ids, tokenizer.eos_ids), tokenizer, asked.prompt)
            timings = replace(timings, thinking_tokens=parts.thinking_tokens)
            if summary.stop is not None:  # the ids of the stop string are not the answer's
                said = summary.answer_ids
                parts = divide(text, None if said is None else without_end(said, tokenizer.eos_ids), tokenizer,
                               asked.prompt)
            if parts.ids and not parts.calls:
                self.remembered = (parts.answer, parts.ids)
        called = self._calls and last.finish_reason != "length" and not cancel
        yield Ended(asked.choice, "calls" if called else last.finish_reason, timings, summary.seed, summary.stop)

    def _told(self, text: str, parser: AnswerParser | None) -> Iterator[Event]:
        if parser is not None:
            yield from self._parts(parser.push(text), parser)
            if self.asked.constraint is not None and parser.answering:
                self.asked.constraint.begin()
            return
        piece = self._piece("answer", text, [(0, None)])
        if text or piece.logs:
            yield piece

    def _parts(self, parts: list[Part], parser: AnswerParser) -> Iterator[Event]:
        for part in parts:
            if part.kind == "call":
                continue
            text = self._trimmer.push(part, parser.found)
            if part.kind == "answer":
                self._blank += len(part.text) - len(text)
            if text:
                yield self._piece(part.kind, text, [] if part.kind == "reasoning" else parser.answers)
        calls = parser.calls[:1] if self.asked.one_call else parser.calls
        for call in calls[self._calls:]:
            if self._logs is not None:
                self._logs.clear()
            yield Called(self.asked.choice, self._calls, call)
            self._calls += 1

    def _piece(self, kind: Kind, text: str, spans: Sequence[Span]) -> Piece:
        """With the logs of the tokens since the last one that say something of the answer, which stands in `spans`; the
        reasoning has none."""
        logs: tuple[TokenLog, ...] = ()
        if self._logs is not None and kind == "answer":
            first = [(begin + self._blank, end) for begin, end in spans[:1]]
            logs = self._logs.take([*first, *spans[1:]], self._said)
        return Piece(self.asked.choice, kind, text, logs)

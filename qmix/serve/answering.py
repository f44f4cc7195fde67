"""One answer: tokens out of the generator become Events, with the reasoning, the answer and the calls apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from qmix.config import Cancel, SamplingParams
from qmix.generate import Token, generate
from qmix.serve.events import Began, Called, Ended, Event, Piece, TokenLog
from qmix.serve.grammar import GrammarConstraint
from qmix.tokenizer import AnswerParser, Part, Prompt, Tokenizer, divide
from qmix.tokenizer.message import without_end

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
    _logs: list[TokenLog] = field(default_factory=list)  # of tokens whose text is not certain yet
    _calls: int = 0

    def answer(self, session: Session, cancel: Cancel, pace: Pace | None,
               clock: Callable[[], float]) -> Iterator[Event]:
        """session: holds a prefix of the prompt. QmixError in the middle of an answer ends it."""
        asked, tokenizer = self.asked, self.tokenizer
        parser = None if asked.raw else tokenizer.answer_parser(asked.prompt)
        broken = _Broken(cancel)
        if asked.constraint is not None and (parser is None or parser.answering):
            asked.constraint.begin()
        cached = min(session.length, len(asked.prompt.ids) - 1)
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
            self._log(last)
            yield from self._said(last.text, parser)
            if asked.one_call and self._calls:
                broken.set()  # the next record is the last, and costs no pass
        assert last is not None and last.summary is not None and last.finish_reason is not None
        summary = last.summary
        timings = summary.timings
        if parser is not None:
            yield from self._parts(parser.finish(), parser)
            parts = divide("".join(texts), without_end(summary.ids, tokenizer.eos_ids), tokenizer, asked.prompt)
            timings = replace(timings, thinking_tokens=parts.thinking_tokens)
            if parts.ids and not parts.calls:
                self.remembered = (parts.answer, parts.ids)
        called = self._calls and last.finish_reason != "length" and not cancel
        yield Ended(asked.choice, "calls" if called else last.finish_reason, timings, summary.seed, summary.stop)

    def _log(self, token: Token) -> None:
        if token.logprob is None or token.id is None or token.id in self.tokenizer.eos_ids:
            return
        self._logs.append(TokenLog(self.tokenizer.piece(token.id).data, token.logprob, tuple(
            (self.tokenizer.piece(token_id).data, value) for token_id, value in token.likeliest)))

    def _said(self, text: str, parser: AnswerParser | None) -> Iterator[Event]:
        if parser is not None:
            yield from self._parts(parser.push(text), parser)
            if self.asked.constraint is not None and parser.answering:
                self.asked.constraint.begin()
        elif text or self._logs:
            yield self._piece("answer", text)

    def _parts(self, parts: list[Part], parser: AnswerParser) -> Iterator[Event]:
        for part in parts:
            if part.kind != "call" and (text := self._trimmer.push(part, parser.found)):
                yield self._piece(part.kind, text)
        for call in parser.calls[self._calls:]:
            self._logs.clear()
            yield Called(self.asked.choice, self._calls, call)
            self._calls += 1

    def _piece(self, kind: Kind, text: str) -> Piece:
        """With the logs of the tokens since the last one; the reasoning has none."""
        logs, self._logs = tuple(self._logs), []
        return Piece(self.asked.choice, kind, text, logs if kind == "answer" else ())

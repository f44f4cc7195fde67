"""One answer, token by token.

    for token in generate(session, prompt_ids, params, tokenizer, cancel):
        print(token.text, end="")
    token.summary       # on the last record: why it ended, ids for the next turn, timings

The `text` of all records joined is the answer. A token whose text is not certain yet (half a character, or what may be
the start of a stop string) has the text "", and a later record has it. Exactly one record, the last, has a
finish_reason: "stop" (an end id or a stop string), "length" (max_tokens, or the context is full, which
summary.context_full says), "cancelled".

Between records and after the end, however that comes, the session's KV cache holds prompt_ids and then every generated
id except the last. A pass that is cancelled or fails is trimmed away, and a generator that is closed early stops
between two records. Only while drafts are right the cache is ahead of the records, until the generator continues or is
closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qmix.config import Cancel, SamplingParams, strings
from qmix.errors import Interrupted, PromptTooLong, UsageError
from qmix.sampling import Constraint, Sampler, check_logits, likeliest, logprob
from qmix.speculation import Pace, Passes, Session
from qmix.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Timings:
    """prompt_tokens were given, cached_tokens of them were in the KV cache already; generated_tokens
    were sampled, the first out of the prefill, the others out of decode_passes. Seconds of `clock`;
    first_token_seconds is since the start. Of `drafted` ids that passes tried, `accepted` came true. Of the
    generated_tokens, thinking_tokens are the model's reasoning; generate leaves that to who knows the chat format."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    first_token_seconds: float | None
    decode_passes: int = 0
    drafted: int = 0
    accepted: int = 0
    thinking_tokens: int = 0

    @property
    def counted(self) -> str:
        """312 tok, or 104 tok + 208 thinking."""
        thinking = f" + {self.thinking_tokens} thinking" if self.thinking_tokens else ""
        return f"{self.generated_tokens - self.thinking_tokens} tok{thinking}"

    @property
    def passes_saved(self) -> int:
        """Tokens that took no pass of their own because their draft was right."""
        return max(0, self.generated_tokens - 1 - self.decode_passes)

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted ids that came true."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def prefill_rate(self) -> float | None:
        """Tokens per second, None where there is nothing to measure."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prefill_seconds)

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second of those that decoding brought: the first came with the prefill."""
        return _rate(self.generated_tokens - 1, self.decode_seconds)


@dataclass(frozen=True, slots=True)
class Summary:
    """What the last record knows.

    ids: every sampled id, the end id included where there was one. ended: whether it was.
    answer_ids: ids for Message.ids of the next turn, or None where a stop string cut a token in two and
    the answer must be encoded again. stop: the stop string that was found. seed: gives the same answer again.
    """

    ids: tuple[int, ...]
    answer_ids: tuple[int, ...] | None
    ended: bool
    stop: str | None
    context_full: bool
    seed: int
    timings: Timings


@dataclass(frozen=True, slots=True)
class Token:
    """One step. id is None in a "cancelled" record, which samples nothing. logprob: see sampling.logprob; likeliest:
    see sampling.likeliest; where asked for."""

    id: int | None
    text: str
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    summary: Summary | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class StopFinder:
    """Finds stop strings in a text that comes in pieces, wherever the borders fall: of several, the one
    that is complete first, and of those the longest."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain to be part of the answer, the stop string found or None)."""
        held = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            self._held = ""
            return held[:at], stop
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        certain, self._held = held[:len(held) - keep], held[len(held) - keep:]
        return certain, None

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


@dataclass(slots=True)
class _Answer:
    """The text side of one answer: decoding, stop strings, and which ids the emitted text covers. headers: see
    Tokenizer; in_header: whether the text is no part of the answer, so that no stop string is looked for. None of them
    reaches across a control token."""

    decoder: StreamDecoder
    stops: StopFinder
    headers: Mapping[int, bool]
    in_header: bool
    ids: list[int] = field(default_factory=list)
    stop: str | None = None
    _emitted: int = 0
    _produced: list[int] = field(default_factory=list)  # characters decoded up to and including each id

    def push(self, token_id: int) -> str:
        """The certain text after this id; sets `stop` when a stop string is complete."""
        self.ids.append(token_id)
        decoded = self.decoder.push(token_id)
        if token_id not in self.headers:
            return self._take(decoded)
        before = self.stops.finish()
        self._emitted += len(before)
        self.in_header = True
        text = before + self._take(decoded)
        self.in_header = not self.headers[token_id]
        return text

    def finish(self) -> str:
        """The rest of the text, at the end of the answer."""
        if self.stop is not None:
            return ""
        text = self._take(self.decoder.finish())
        if self.stop is None:
            rest = self.stops.finish()
            self._emitted += len(rest)
            text += rest
        return text

    def _take(self, decoded: str) -> str:
        done = self._produced[-1] if self._produced else 0
        self._produced += [done] * (len(self.ids) - len(self._produced))
        if self._produced:
            self._produced[-1] += len(decoded)
        text, self.stop = (decoded, None) if self.in_header else self.stops.push(decoded)
        self._emitted += len(text)
        return text

    def answer_ids(self) -> tuple[int, ...] | None:
        """The ids whose text was emitted; None where a stop string begins inside one."""
        if self.stop is None:
            return tuple(self.ids)
        if self._emitted == 0:
            return ()
        if self._emitted not in self._produced:
            return None
        return tuple(self.ids[:self._produced.index(self._emitted) + 1])


def generate(session: Session, prompt_ids: Sequence[int], params: SamplingParams, tokenizer: Tokenizer,
             cancel: Cancel | None = None, *, stops: Sequence[str] = (), continuing: bool = False,
             marked: bool = False, logprobs: bool = False, top_logprobs: int = 0, pace: Pace | None = None,
             constraint: Constraint | None = None, clock: Callable[[], float] = time.perf_counter) -> Iterator[Token]:
    """Yield the Token records of one answer (see the module's prose).

    prompt_ids: the whole prompt, of which the first session.length ids are in the KV cache already (trim
    the session to the common prefix first; at least the last id is always run). stops: stop strings
    besides params.stop, such as tokenizer.turn_stops. continuing: the answer goes on from the prompt's text,
    so its leading space is kept. marked: the texts are for tokenizer.answer_parser, not to be read. top_logprobs: how
    many of the likeliest ids each record has. pace: allows drafts, and keeps what is learnt of them from answer to
    answer; the records are the same but for their times. constraint: which ids the answer may consist of; its end is
    the answer's. clock: seconds, monotonic.

    UsageError, at the first record, for an empty prompt and one that the context cannot hold.
    """
    cancel = Cancel() if cancel is None else cancel
    _check_prompt(session, prompt_ids)
    sampler = Sampler(params, prompt_ids, constraint)
    headers = tokenizer.headers if marked else {}
    in_header = not next((headers[i] for i in reversed(prompt_ids) if i in headers), True) if headers else False
    answer = _Answer(tokenizer.decoder(continuing, marked), StopFinder((*params.stop, *strings("stops", stops))),
                     headers, in_header)
    started, first = clock(), None
    if session.length >= len(prompt_ids):
        session.trim(len(prompt_ids) - 1)
    cached = session.length
    passes = Passes(session, prompt_ids, pace, tokenizer.eos_ids, clock)

    def last(token_id: int | None, text: str, reason: FinishReason, value: float | None = None,
             best: tuple[tuple[int, float], ...] = ()) -> Token:
        passes.discard_drafts()
        ids = tuple(answer.ids)
        ended = bool(ids) and ids[-1] in tokenizer.eos_ids
        timings = Timings(len(prompt_ids), cached, len(ids), passes.prefill_seconds, passes.decode_seconds, first,
                          passes.decode_passes, passes.drafted, passes.accepted)
        full = reason == "length" and session.length >= session.context
        return Token(token_id, text, reason, value, Summary(
            ids, answer.answer_ids(), ended, answer.stop, full, sampler.seed, timings), best)

    try:
        while True:
            try:
                if cancel:
                    raise Interrupted("cancelled")
                logits = (passes.after(answer.ids[-1], params.max_tokens - len(answer.ids) - 1, cancel)
                          if answer.ids else passes.prefill(prompt_ids[cached:], cancel))
            except Interrupted:
                if not cancel:
                    raise
                yield last(None, answer.finish(), "cancelled")
                return
            token_id = sampler.choose(logits)
            first = clock() - started if first is None else first
            value = logprob(check_logits(logits), token_id) if logprobs else None
            best = likeliest(check_logits(logits), top_logprobs) if top_logprobs else ()
            text = answer.push(token_id)
            reason = _finish_reason(answer, token_id, len(prompt_ids), session, params, tokenizer)
            if reason is None and constraint is not None and constraint.done:
                reason = "stop"
            if reason is not None:
                yield last(token_id, text + answer.finish(), reason, value, best)
                return
            yield Token(token_id, text, logprob=value, likeliest=best)
    finally:
        passes.discard_drafts()


def _check_prompt(session: Session, prompt_ids: Sequence[int]) -> None:
    if not prompt_ids:
        raise UsageError("the prompt is empty", "give at least one token of text")
    if len(prompt_ids) > session.context:
        raise PromptTooLong(
            f"the prompt has {len(prompt_ids)} tokens, the context holds {session.context}",
            f"shorten the prompt, or start with --ctx-size {len(prompt_ids) + 1} or more")


def _finish_reason(answer: _Answer, token_id: int, prompt: int, session: Session, params: SamplingParams,
                   tokenizer: Tokenizer) -> FinishReason | None:
    if token_id in tokenizer.eos_ids or answer.stop is not None:
        return "stop"
    if len(answer.ids) == params.max_tokens or prompt + len(answer.ids) > session.context:
        return "length"
    return None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two sequences share: [1, 2, 3] and [1, 2, 4] -> 2."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of text that begin stop: "ab\\nUs" and "\\nUser:" -> 3."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None

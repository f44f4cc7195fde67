"""One turn: the conversation's ids go through the session and the generator, and text comes out piece by piece.

Only the ids after the common prefix with the KV cache are computed. The prefix is what the session holds, not what the
chat remembers. So the next turn is right whatever happened before: an undo, a cancelled turn, a changed system prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qmix.chat.conversation import spoken_ids
from qmix.config import Cancel, SamplingParams
from qmix.errors import QmixError
from qmix.generate import Timings, common_prefix, generate
from qmix.speculation import Pace
from qmix.tokenizer import Call, Part, Prompt, Tokenizer, divide

if TYPE_CHECKING:
    from qmix.engine import Session


@dataclass(frozen=True, slots=True)
class Answer:
    """text: all of it but the reasoning and tool calls, raw; ids: its own ids, None where the text must be encoded
    again; reasoning: None where there is none; calls: tools that the model calls; finish: "stop" | "length" |
    "cancelled" | "error"; error: what stopped it; context_full: why it is "length"."""

    text: str
    ids: tuple[int, ...] | None
    finish: str
    timings: Timings
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()
    context_full: bool = False
    error: QmixError | None = None


def respond(session: Session, tokenizer: Tokenizer, prompt: Prompt, params: SamplingParams,
            cancel: Cancel, show: Callable[[Part], None], clock: Callable[[], float],
            pace: Pace | None = None, fresh: bool = False) -> Answer:
    """Generate one answer to `prompt`, giving its parts to `show` piece by piece. An error in the middle ends the
    answer and is part of it; what was said until then stays. pace: see generate; fresh: read the whole prompt anew,
    since what a KV cache has of it has not the same last bits."""
    session.trim(0 if fresh else common_prefix(prompt.ids, session.ids))
    cached = session.length
    pieces: list[str] = []
    ids: list[int] = []
    parser = tokenizer.answer_parser(prompt)
    started = first = clock()
    try:
        for token in generate(session, prompt.ids, params, tokenizer, cancel,
                              stops=tokenizer.turn_stops, marked=True, pace=pace, clock=clock):
            if token.id is not None:
                first = first if ids else clock()
                ids.append(token.id)
            pieces.append(token.text)
            for part in parser.push(token.text):
                show(part)
            summary, finish = token.summary, token.finish_reason
    except QmixError as e:
        timings = Timings(len(prompt.ids), cached, len(ids), first - started, clock() - first,
                          first - started if ids else None)
        ended = Answer("", None, "error", timings, error=e)
    else:
        assert summary is not None and finish is not None  # generate's promise for its last record
        ended = Answer("", None, finish, summary.timings, context_full=summary.context_full)
    for part in parser.finish():
        show(part)
    return _complete(ended, "".join(pieces), ids, tokenizer, prompt)


def _complete(answer: Answer, text: str, ids: Sequence[int], tokenizer: Tokenizer, prompt: Prompt) -> Answer:
    """The answer with its text, its ids, the reasoning before it and the tools it calls."""
    parts = divide(text, spoken_ids(ids, text, tokenizer), tokenizer, prompt)
    return replace(answer, text=parts.answer, ids=parts.ids, reasoning=parts.reasoning, calls=parts.calls,
                   timings=replace(answer.timings, thinking_tokens=parts.thinking_tokens))

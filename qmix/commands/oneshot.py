"""One prompt, one answer: what `qmix generate` and `qmix demo -p` do with a loaded engine.

The answer streams to stdout token by token, or is one JSON document at the end. Everything else goes to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TextIO

from qmix.commands.interrupt import cancel_on_interrupt
from qmix.config import SamplingParams
from qmix.errors import UsageError
from qmix.generate import Summary, generate
from qmix.render import DIM, PLAIN, clean, dim, json_text, say, wants_color
from qmix.tokenizer import Call, Divided, Message, Part, Prompt, Request, Tokenizer, divide
from qmix.tokenizer.message import CLOSE, OPEN, without_end
from qmix.tokenizer.parts import Kind

if TYPE_CHECKING:
    from qmix.engine import Engine


def run(engine: Engine, prompt: str, params: SamplingParams, *, system: str | None = None, raw: bool = False,
        as_json: bool = False, draft: int = 0, thinking: bool | None = None,
        effort: str | None = None, stdout: TextIO | None = None) -> int:
    """Answer `prompt`; the exit code: 0, or 130 where Ctrl-C stopped it (what was said is kept).

    raw: continue the text instead of answering in the chat format, which is also what a model without
    one does. thinking: whether the model is to think before it answers, effort: how much, None for what it does by
    itself. UsageError where the prompt does not fit the context, or the model has no place for what was asked.
    """
    out = stdout or sys.stdout
    tokenizer = engine.tokenizer
    if not raw and not tokenizer.has_template:
        if system is not None:
            raise UsageError("--system: this model has no chat template, so no place for a system prompt",
                             "put it into the prompt's own text")
        say("the model has no chat template: continuing the text as it is (--raw says the same)")
        raw = True
    if raw and system is not None:
        raise UsageError("--system with --raw: raw text has no system prompt", "drop one of the two")
    if raw and (thinking, effort) != (None, None):
        flag = "--reasoning" if thinking is None else "--think, --no-think"
        raise UsageError(f"{flag}: text that is continued as it is has no chat template to switch", "drop the flag")
    session = engine.session()
    if raw:
        asked = Prompt(tokenizer.encode(prompt, bos=True, limit=session.context))
    else:
        dim(f"chat format: {tokenizer.template_name}")
        messages = [Message("system", system)] if system else []
        asked = tokenizer.prompt([*messages, Message("user", prompt)], session.context,
                                 Request(thinking=thinking, effort=effort))
    pace = engine.pace(draft, say)
    pieces: list[str] = []
    summary, reason = None, None
    writer = None if as_json else _Writer(out, None if raw else tokenizer, asked)
    with cancel_on_interrupt() as cancel:
        for token in generate(session, asked.ids, params, tokenizer, cancel, continuing=raw, marked=not raw, pace=pace):
            pieces.append(token.text)
            if writer is not None:
                writer.write(token.text)
            summary, reason = token.summary, token.finish_reason
    assert summary is not None  # the last record carries it
    text = "".join(pieces)
    parts = Divided(None, text, None, 0) if raw else divide(
        text, without_end(summary.ids, tokenizer.eos_ids), tokenizer, asked)
    summary = replace(summary, timings=replace(summary.timings, thinking_tokens=parts.thinking_tokens))
    if writer is not None:
        writer.end()
    else:
        print(json_text(_document(parts, reason, summary, engine.stats())), file=out)
    if pace is not None:
        pace.report()
    _report(summary, reason, params, engine.stats()["experts"], parts.calls)
    return 130 if reason == "cancelled" else 0


class _Writer:
    """An answer as it comes. On a terminal the reasoning is dim. In a pipe it stands between its tags; where the model
    itself writes these tags, its text is left as it is, and an opening tag that the prompt wrote is written first, so
    that the tags are a pair. tokenizer: None for text that is continued as it is."""

    def __init__(self, out: TextIO, tokenizer: Tokenizer | None, prompt: Prompt):
        self._out = out
        self._dims = wants_color(out, os.environ)
        parsed = tokenizer is not None and (self._dims or not tokenizer.verbatim)
        self._parser = tokenizer.answer_parser(prompt) if tokenizer is not None and parsed else None
        self._kind: Kind | None = None  # of the last part shown
        self._last = ""  # the last character written
        if prompt.in_reasoning and self._parser is None:
            self._put(f"{OPEN}\n")

    def write(self, text: str) -> None:
        if self._parser is None:
            self._put(text)
            return
        for part in self._parser.push(text):
            self._show(part)

    def _show(self, part: Part) -> None:
        begins = part.kind != self._kind
        first = self._kind is None and part.kind == "answer"  # which is shown as it is
        text = part.text.lstrip("\n") if begins and not first else part.text
        if not text:
            return
        if begins:
            if self._kind is not None:
                self._end_part()
                self._put("\n")
            self._kind = part.kind
            if part.kind == "reasoning" and not self._dims:
                self._put(f"{OPEN}\n")
        self._put(text, dim=self._dims and part.kind == "reasoning")

    def _end_part(self) -> None:
        """Each kind of part ends with a line break of its own."""
        if self._last != "\n":
            self._put("\n")
        if self._kind == "reasoning" and not self._dims:
            self._put(f"{CLOSE}\n")

    def end(self) -> None:
        for part in self._parser.finish() if self._parser is not None else ():
            self._show(part)
        self._end_part()

    def _put(self, text: str, dim: bool = False) -> None:
        shown = clean(text) if self._out.isatty() else text
        self._last = shown[-1:] or self._last
        self._out.write(f"{DIM}{shown}{PLAIN}" if dim and shown else shown)
        self._out.flush()


def _document(parts: Divided, reason: str | None, summary: Summary, stats: dict[str, Any]) -> dict[str, object]:
    timings = summary.timings
    return {"text": parts.answer, "thinking": parts.reasoning, "tool_calls": [call._asdict() for call in parts.calls],
            "token_ids": list(summary.ids), "finish_reason": reason, "seed": summary.seed,
            "timings": asdict(timings) | {"prefill_rate": timings.prefill_rate, "decode_rate": timings.decode_rate,
                                            "passes_saved": timings.passes_saved, "acceptance": timings.acceptance},
            "tiers": stats["experts"], "memory": stats["memory"], "offload": stats["offload"]}


def _report(summary: Summary, reason: str | None, params: SamplingParams, tiers: dict[str, float],
            calls: Sequence[Call]) -> None:
    """The dim line, and why the answer ended where it did not end by itself."""
    timings = summary.timings
    parts = [timings.counted]
    parts += [f"{timings.decode_rate:.1f} tok/s"] if timings.decode_rate else []
    parts += [f"prefill {timings.prefill_rate:.0f} tok/s"] if timings.prefill_rate else []
    parts.append("experts " + " ".join(f"{tier} {share:.0f} %" for tier, share in tiers.items()))
    if params.temperature > 0:
        parts.append(f"seed {summary.seed}")
    parts += [f"calls the tool {call.name}" for call in calls]
    if reason == "length":
        parts.append("context full" if summary.context_full else f"stopped at {params.max_tokens} tokens")
    if reason == "cancelled":
        parts.append("interrupted")
    dim(" · ".join(parts))

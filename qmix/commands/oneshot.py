"""One prompt, one answer: what `qmix generate` and `qmix demo -p` do with a loaded engine.

The answer streams to stdout token by token, or is one JSON document at the end. Everything else goes to stderr.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from qmix.commands.interrupt import cancel_on_interrupt
from qmix.config import SamplingParams
from qmix.errors import UsageError
from qmix.generate import Summary, generate
from qmix.render import clean, dim, json_text, say
from qmix.tokenizer import Message

if TYPE_CHECKING:
    from qmix.engine import Engine


def run(engine: Engine, prompt: str, params: SamplingParams, *, system: str | None = None, raw: bool = False,
        as_json: bool = False, draft: int = 0, stdout: TextIO | None = None) -> int:
    """Answer `prompt`; the exit code: 0, or 130 where Ctrl-C stopped it (what was said is kept).

    raw: continue the text instead of answering in the chat format, which is also what a model without
    one does. UsageError where the prompt does not fit the context.
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
    session = engine.session()
    if raw:
        ids = tokenizer.encode(prompt, bos=True, limit=session.context)
    else:
        dim(f"chat format: {tokenizer.template_name}")
        messages = [Message("system", system)] if system else []
        ids = tokenizer.encode_chat([*messages, Message("user", prompt)], limit=session.context)
    pace = engine.pace(draft, say)
    text: list[str] = []
    summary, reason = None, None
    with cancel_on_interrupt() as cancel:
        for token in generate(session, ids, params, tokenizer, cancel, continuing=raw, pace=pace):
            text.append(token.text)
            if not as_json:
                out.write(clean(token.text) if out.isatty() else token.text)
                out.flush()
            summary, reason = token.summary, token.finish_reason
    assert summary is not None  # the last record carries it
    if as_json:
        print(json_text(_document("".join(text), reason, summary, engine.stats())), file=out)
    elif not "".join(text).endswith("\n"):
        print(file=out)
    _report(summary, reason, params, engine.stats()["experts"])
    return 130 if reason == "cancelled" else 0


def _document(text: str, reason: str | None, summary: Summary, stats: dict[str, Any]) -> dict[str, object]:
    timings = summary.timings
    return {"text": text, "token_ids": list(summary.ids), "finish_reason": reason, "seed": summary.seed,
            "timings": asdict(timings) | {"prefill_rate": timings.prefill_rate, "decode_rate": timings.decode_rate,
                                            "passes_saved": timings.passes_saved, "acceptance": timings.acceptance},
            "tiers": stats["experts"], "memory": stats["memory"], "offload": stats["offload"]}


def _report(summary: Summary, reason: str | None, params: SamplingParams, tiers: dict[str, float]) -> None:
    """The dim line, and why the answer ended where it did not end by itself."""
    timings = summary.timings
    parts = [f"{timings.generated_tokens} tok"]
    parts += [f"{timings.decode_rate:.1f} tok/s"] if timings.decode_rate else []
    parts += [f"prefill {timings.prefill_rate:.0f} tok/s"] if timings.prefill_rate else []
    parts.append("experts " + " ".join(f"{tier} {share:.0f} %" for tier, share in tiers.items()))
    if params.temperature > 0:
        parts.append(f"seed {summary.seed}")
    if reason == "length":
        parts.append("context full" if summary.context_full else f"stopped at {params.max_tokens} tokens")
    if reason == "cancelled":
        parts.append("interrupted")
    dim(" · ".join(parts))

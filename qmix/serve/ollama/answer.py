"""The record's events as ollama's documents: one for each piece of text, and a last one with figures; or that one
alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from qmix.serve.arguments import arguments_object
from qmix.serve.events import Called, Ended, Event, Piece
from qmix.tokenizer import Call

NANO = 1_000_000_000


@dataclass(slots=True)
class OllamaAnswer:
    """model: the name under which it was asked for. chat: of /api/chat, else of /api/generate."""

    model: str
    chat: bool

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        texts: dict[str, list[str]] = {"reasoning": [], "answer": []}
        calls: list[Call] = []
        last: dict[str, Any] = {}
        async for event in events:
            if isinstance(event, Piece):
                texts[event.kind].append(event.text)
            elif isinstance(event, Called):
                calls.append(event.call)
            elif isinstance(event, Ended):
                last = _figures(event)
        return {**self._said("".join(texts["answer"]), "".join(texts["reasoning"]), calls), **last}

    async def stream(self, events: AsyncIterator[Event]) -> AsyncIterator[dict[str, Any]]:
        async for event in events:
            if isinstance(event, Piece) and event.text:
                answer = event.kind == "answer"
                yield {**self._said(event.text if answer else "", "" if answer else event.text), "done": False}
            elif isinstance(event, Called):
                yield {**self._said("", "", [event.call]), "done": False}
            elif isinstance(event, Ended):
                yield {**self._said(""), **_figures(event)}

    def _said(self, text: str, thinking: str = "", calls: list[Call] | None = None) -> dict[str, Any]:
        head = {"model": self.model, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}
        thought = {"thinking": thinking} if thinking else {}
        if not self.chat:
            return {**head, "response": text, **thought}
        called = {"tool_calls": [{"function": {"name": call.name, "arguments": arguments_object(call.arguments)}}
                                 for call in calls]} if calls else {}
        return {**head, "message": {"role": "assistant", "content": text, **thought, **called}}


def _figures(ended: Ended) -> dict[str, Any]:
    timings = ended.timings
    prompt, answer = (round(NANO * seconds) for seconds in (timings.prefill_seconds, timings.decode_seconds))
    return {"done": True, "done_reason": "length" if ended.reason == "length" else "stop",
            "total_duration": prompt + answer, "load_duration": 0,
            "prompt_eval_count": timings.prompt_tokens, "prompt_eval_duration": prompt,
            "eval_count": timings.generated_tokens, "eval_duration": answer}

"""/v1/chat/completions: the record's events as a chat completion, whole or in chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from qmix.serve.events import Began, Called, Ended, Event, Piece, TokenLog
from qmix.serve.openai.chunks import REASONS, Envelope, chat_logprobs, tool_call, usage


@dataclass(slots=True)
class Choice:
    """What came of one choice. calls: as the answer has them."""

    texts: dict[str, list[str]] = field(default_factory=lambda: {"reasoning": [], "answer": []})
    calls: list[dict[str, Any]] = field(default_factory=list)
    logs: list[TokenLog] = field(default_factory=list)
    ended: Ended | None = None


@dataclass(slots=True)
class ChatAnswer(Envelope):
    """Messages."""

    PREFIX = "chatcmpl-"

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        found: defaultdict[int, Choice] = defaultdict(Choice)
        async for event in events:
            if isinstance(event, Piece):
                found[event.choice].texts[event.kind].append(event.text)
                found[event.choice].logs += event.logs
            elif isinstance(event, Called):
                found[event.choice].calls.append(tool_call(event.call))
            elif isinstance(event, Ended):
                found[event.choice].ended = event
        ended = [one.ended for one in found.values() if one.ended is not None]
        return {**self.head("chat.completion"), "choices": [self._choice(n, one) for n, one in sorted(found.items())],
                "usage": usage(ended, self.generation.choices)}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        assert choice.ended is not None  # events end with an error, or with each choice's end
        text, reasoning = ("".join(choice.texts[kind]) for kind in ("answer", "reasoning"))
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not choice.calls else None,
                                   "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if choice.calls:
            message["tool_calls"] = choice.calls
        logs = None if self.generation.top_logprobs is None else chat_logprobs(choice.logs)
        return {"index": index, "message": message, "logprobs": logs, "finish_reason": REASONS[choice.ended.reason]}

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[dict[str, Any]]:
        ended: list[Ended] = []
        async for event in events:
            if isinstance(event, Began):
                yield self._chunk(event.choice, {"role": "assistant", "content": ""})
            elif isinstance(event, Piece):
                key = "reasoning_content" if event.kind == "reasoning" else "content"
                yield self._chunk(event.choice, {key: event.text}, logs=event.logs)
            elif isinstance(event, Called):
                call = tool_call(event.call)
                arguments = call["function"]["arguments"]
                call["function"] = {**call["function"], "arguments": ""}
                yield self._chunk(event.choice, {"tool_calls": [{"index": event.index, **call}]})
                yield self._chunk(event.choice, {"tool_calls": [{"index": event.index,
                                                                 "function": {"arguments": arguments}}]})
            elif isinstance(event, Ended):
                ended.append(event)
                yield self._chunk(event.choice, {}, REASONS[event.reason])
        if self.with_usage:
            yield self.last("chat.completion.chunk", ended)

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None,
               logs: tuple[TokenLog, ...] = ()) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": chat_logprobs(logs) if logs else None,
                  "finish_reason": reason}
        return self.chunk("chat.completion.chunk", choice)

"""The record's events as a message of Anthropic's, whole or streamed:

    message_start, for each block (content_block_start, content_block_delta ..., content_block_stop), message_delta,
    message_stop; ping and error at any moment

Each run of reasoning, text, or call is a block of its own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from qmix.serve.arguments import arguments_object
from qmix.serve.events import Began, Called, Ended, Event, Piece
from qmix.serve.openai.chunks import new_id

REASONS = {"length": "max_tokens", "calls": "tool_use"}
BLOCKS: dict[str, dict[str, Any]] = {"answer": {"type": "text", "text": ""},
                                     "reasoning": {"type": "thinking", "thinking": "", "signature": ""}}
DELTAS = {"answer": ("text_delta", "text"), "reasoning": ("thinking_delta", "thinking")}
# A client sends a block of thinking back with its signature, which would say who wrote it. Nothing is signed here.
SIGNATURE = "qmix"


@dataclass(slots=True)
class MessageAnswer:
    """model: the name under which it was asked for. stops: the stop strings of the request."""

    model: str
    stops: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: new_id("msg_"))

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = []
        found: dict[str, Any] = {}
        async for name, event in self.stream(events):
            if name == "message_start":
                found = event["message"]
            elif name == "content_block_start":
                blocks.append(dict(event["content_block"]))
            elif name == "content_block_delta":
                delta = event["delta"]
                if delta["type"] == "input_json_delta":
                    blocks[-1]["input"] = json.loads(delta["partial_json"])
                else:
                    key = delta["type"].removesuffix("_delta")
                    blocks[-1][key] += delta[key]
            elif name == "message_delta":
                found |= {"content": blocks, **event["delta"], "usage": {**found["usage"], **event["usage"]}}
        return found

    async def stream(self, events: AsyncIterator[Event]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(name, data) of each event."""
        kind: str | None = None  # of the block that is open
        index = -1
        async for event in events:
            if isinstance(event, Began):
                yield "message_start", {"type": "message_start", "message": {
                    "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": [],
                    "stop_reason": None, "stop_sequence": None,
                    "usage": self._usage(event.prompt_tokens, event.cached_tokens, 1)}}
            elif isinstance(event, Piece) and event.text:
                if event.kind != kind:
                    for one in self._close(kind, index):
                        yield one
                    kind, index = event.kind, index + 1
                    yield self._open(index, BLOCKS[kind])
                name, key = DELTAS[event.kind]
                yield self._delta(index, {"type": name, key: event.text})
            elif isinstance(event, Called):
                for one in self._close(kind, index):
                    yield one
                kind, index = None, index + 1
                yield self._open(index, {"type": "tool_use", "id": new_id("toolu_"), "name": event.call.name,
                                         "input": {}})
                yield self._delta(index, {"type": "input_json_delta", "partial_json": json.dumps(
                    arguments_object(event.call.arguments), ensure_ascii=False)})
                yield self._stop(index)
            elif isinstance(event, Ended):
                for one in self._close(kind, index):
                    yield one
                timings = event.timings
                stop = event.stop if event.stop in self.stops and event.reason not in REASONS else None
                reason = REASONS.get(event.reason, "end_turn" if stop is None else "stop_sequence")
                yield "message_delta", {
                    "type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": stop},
                    "usage": self._usage(timings.prompt_tokens, timings.cached_tokens, timings.generated_tokens)}
                yield "message_stop", {"type": "message_stop"}

    @staticmethod
    def _usage(prompt: int, cached: int, generated: int) -> dict[str, int]:
        """input_tokens are those that were read; what a KV cache had is counted apart."""
        return {"input_tokens": prompt - cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
                "output_tokens": generated}

    @staticmethod
    def _open(index: int, block: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "content_block_start", {"type": "content_block_start", "index": index, "content_block": block}

    @staticmethod
    def _delta(index: int, delta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta}

    @staticmethod
    def _stop(index: int) -> tuple[str, dict[str, Any]]:
        return "content_block_stop", {"type": "content_block_stop", "index": index}

    def _close(self, kind: str | None, index: int) -> list[tuple[str, dict[str, Any]]]:
        """The end of the block that is open, if one is."""
        if kind is None:
            return []
        if kind == "answer":
            return [self._stop(index)]
        return [self._delta(index, {"type": "signature_delta", "signature": SIGNATURE}), self._stop(index)]

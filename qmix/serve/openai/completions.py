"""/v1/completions: the record's events as text completions, whole or in chunks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from qmix.serve.events import Ended, Event, Piece
from qmix.serve.openai.chunks import REASONS, completion_logprobs, new_id, usage
from qmix.serve.request import Generation


@dataclass(slots=True)
class CompletionAnswer:
    """model: the name under which it was asked for."""

    model: str
    generation: Generation
    with_usage: bool = False
    id: str = field(default_factory=lambda: new_id("cmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        pieces: defaultdict[int, list[Piece]] = defaultdict(list)
        ended: list[Ended] = []
        async for event in events:
            if isinstance(event, Piece):
                pieces[event.choice].append(event)
            elif isinstance(event, Ended):
                ended.append(event)
        return {**self._head(), "choices": [
            self._choice(one.choice, "".join(piece.text for piece in pieces[one.choice]), pieces[one.choice], one)
            for one in ended], "usage": usage(ended, self.generation.choices)}

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[dict[str, Any]]:
        ended: list[Ended] = []
        async for event in events:
            if isinstance(event, Piece):
                yield self._chunk(self._choice(event.choice, event.text, [event], None))
            elif isinstance(event, Ended):
                ended.append(event)
                yield self._chunk(self._choice(event.choice, "", [], event))
        if self.with_usage:
            yield {**self._head(), "choices": [], "usage": usage(ended, self.generation.choices)}

    def _choice(self, index: int, text: str, pieces: list[Piece], ended: Ended | None) -> dict[str, Any]:
        logs = None if self.generation.top_logprobs is None else completion_logprobs(pieces)
        return {"index": index, "text": text, "logprobs": logs,
                "finish_reason": None if ended is None else REASONS[ended.reason]}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
                "system_fingerprint": "qmix"}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(), "choices": [choice], **({"usage": None} if self.with_usage else {})}

"""/v1/completions: the record's events as text completions, whole or in chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from qmix.serve.events import Ended, Event, Piece
from qmix.serve.openai.chunks import REASONS, Envelope, completion_logprobs, usage


@dataclass(slots=True)
class CompletionAnswer(Envelope):
    """Texts."""

    PREFIX = "cmpl-"

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        pieces: defaultdict[int, list[Piece]] = defaultdict(list)
        ended: list[Ended] = []
        async for event in events:
            if isinstance(event, Piece):
                pieces[event.choice].append(event)
            elif isinstance(event, Ended):
                ended.append(event)
        return {**self.head("text_completion"), "choices": [
            self._choice(one.choice, "".join(piece.text for piece in pieces[one.choice]), pieces[one.choice], one)
            for one in ended], "usage": usage(ended, self.generation.choices)}

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[dict[str, Any]]:
        ended: list[Ended] = []
        async for event in events:
            if isinstance(event, Piece):
                yield self.chunk("text_completion", self._choice(event.choice, event.text, [event], None))
            elif isinstance(event, Ended):
                ended.append(event)
                yield self.chunk("text_completion", self._choice(event.choice, "", [], event))
        if self.with_usage:
            yield self.last("text_completion", ended)

    def _choice(self, index: int, text: str, pieces: list[Piece], ended: Ended | None) -> dict[str, Any]:
        logs = None if self.generation.top_logprobs is None else completion_logprobs(pieces)
        return {"index": index, "text": text, "logprobs": logs,
                "finish_reason": None if ended is None else REASONS[ended.reason]}

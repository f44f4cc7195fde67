"""The pieces that OpenAI's answers consist of: what stands around choices, usage, log probabilities, why one ended."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qmix.serve.events import Ended, Piece, TokenLog
from qmix.serve.request import Generation
from qmix.tokenizer import Call

REASONS = {"stop": "stop", "length": "length", "calls": "tool_calls", "cancelled": "stop"}


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def usage(ended: Sequence[Ended], choices: int = 1) -> dict[str, Any]:
    """Of all choices together. A prompt with several choices counts once."""
    prompt = sum(one.timings.prompt_tokens for one in ended if one.choice % choices == 0)
    cached = sum(one.timings.cached_tokens for one in ended if one.choice % choices == 0)
    generated = sum(one.timings.generated_tokens for one in ended)
    thinking = sum(one.timings.thinking_tokens for one in ended)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thinking}}


def tool_call(call: Call) -> dict[str, Any]:
    """A call as an answer has it."""
    return {"id": new_id("call_"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_logprobs(logs: Iterable[TokenLog]) -> dict[str, Any]:
    return {"content": [{**_token(log.data, log.logprob),
                         "top_logprobs": [_token(data, value) for data, value in log.likeliest]} for log in logs],
            "refusal": None}


def _token(data: bytes, value: float) -> dict[str, Any]:
    return {"token": data.decode("utf-8", "replace"), "logprob": value, "bytes": list(data)}


def completion_logprobs(pieces: Sequence[Piece]) -> dict[str, Any]:
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for log in (log for piece in pieces for log in piece.logs):
        found["tokens"].append(log.data.decode("utf-8", "replace"))
        found["token_logprobs"].append(log.logprob)
        found["top_logprobs"].append({data.decode("utf-8", "replace"): value for data, value in log.likeliest})
        found["text_offset"].append(log.at)
    return found


@dataclass(slots=True)
class Envelope:
    """What stands around the choices of an answer. model: the name under which it was asked for."""

    PREFIX: ClassVar[str]  # of its id

    model: str
    generation: Generation
    with_usage: bool = False
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = new_id(self.PREFIX)

    def head(self, kind: str) -> dict[str, Any]:
        """kind: "chat.completion" and the like."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": "qmix"}

    def chunk(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        """A piece of a stream."""
        return {**self.head(kind), "choices": [choice], **({"usage": None} if self.with_usage else {})}

    def last(self, kind: str, ended: Sequence[Ended]) -> dict[str, Any]:
        """The last piece, where the usage was asked for."""
        return {**self.head(kind), "choices": [], "usage": usage(ended, self.generation.choices)}

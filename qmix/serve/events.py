"""What the engine thread tells of a request, in this order:

    for each choice: Began, then Piece and Called, then Ended
    Failed at any moment, or Finished

Failed or Finished is the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qmix.errors import QmixError
from qmix.generate import Timings
from qmix.tokenizer import Call

Reason = Literal["stop", "length", "calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLog:
    """A sampled token: its text's bytes, its natural log probability, and the likeliest ones in its place. at: where it
    begins in the answer's text, characters, its marks included."""

    data: bytes
    logprob: float
    likeliest: tuple[tuple[bytes, float], ...] = ()
    at: int = 0


@dataclass(frozen=True, slots=True)
class Began:
    """The first token of an answer is there."""

    choice: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of an answer, "" where its tokens are not certain yet. logs: of the tokens that say it, where asked for."""

    choice: int
    kind: Literal["reasoning", "answer"]
    text: str
    logs: tuple[TokenLog, ...] = ()


@dataclass(frozen=True, slots=True)
class Called:
    """The answer calls a tool, the first one with index 0."""

    choice: int
    index: int
    call: Call


@dataclass(frozen=True, slots=True)
class Ended:
    """stop: the stop string that ended the answer, if one did."""

    choice: int
    reason: Reason
    timings: Timings
    seed: int
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    error: QmixError


@dataclass(frozen=True, slots=True)
class Finished:
    pass


Event = Began | Piece | Called | Ended | Failed | Finished

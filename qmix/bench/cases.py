"""The timed cases, named as llama-bench names them: `pp512`, `tg128`, `tg128 @ d2048`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qmix.errors import UsageError

MOST = 10**6  # tokens or positions in a flag; more is a slip of the finger


@dataclass(frozen=True, slots=True)
class Case:
    """`pp`: one prefill of `tokens`; `tg`: as many decode steps. Either comes after `depth` positions that are
    prefilled before the clock starts."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def positions(self) -> int:
        return self.depth + self.tokens


def numbers(flag: str, text: str) -> list[int]:
    """"0,2048" -> [0, 2048]; UsageError naming the flag for anything else than such a list."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [-1]
    if any(not 0 <= value <= MOST for value in values):
        raise UsageError(f"{flag} {text}: want whole numbers, as 512 or 128,512")
    return values


def make_cases(prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """At each depth every prompt, then every generation, each once; 0 tokens stand for none. UsageError where
    nothing is left."""
    found: dict[Case, None] = {}
    for depth in depths:
        found |= dict.fromkeys(Case("pp", tokens, depth) for tokens in prompts if tokens)
        found |= dict.fromkeys(Case("tg", tokens, depth) for tokens in generated if tokens)
    if not found:
        raise UsageError("-p 0 -n 0: nothing is left to measure", "name a number of tokens for one of the two")
    return list(found)


def context_of(cases: Sequence[Case], max_positions: int) -> int:
    """Positions that the longest case needs; UsageError where the model has fewer."""
    longest = max(cases, key=lambda case: case.positions)
    if longest.positions > max_positions:
        raise UsageError(f"{longest.name}: {longest.positions} positions, the model was trained for {max_positions}",
                         "choose fewer with -p, -n or -d")
    return longest.positions

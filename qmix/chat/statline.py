"""The figures after an answer: one dim line, or with --stats a block.

    312 tok · 7.4 tok/s · prefill 96 tok/s · experts ram 100 %
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figures:
    """What one answer took. tokens: generated; read: prefilled, reused: found in the KV cache; used and
    context: positions; times in seconds; ending: why the answer is not complete, "" where it is."""

    tokens: int
    read: int
    reused: int
    prefill_s: float
    decode_s: float
    used: int
    context: int
    seed: int
    ending: str = ""

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second; the first token belongs to prefill, so one alone has no rate."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else None

    @property
    def prefill_rate(self) -> float | None:
        return self.read / self.prefill_s if self.prefill_s > 0 else None


def line(figures: Figures, tiers: Mapping[str, float]) -> str:
    """tiers: share of expert reads per tier in percent, only tiers that exist."""
    parts = [figures.ending, f"{figures.tokens} tok", rate(figures.decode_rate),
             f"prefill {rate(figures.prefill_rate)}" if figures.prefill_rate else "", _experts(tiers)]
    return " · ".join(part for part in parts if part)


def block(figures: Figures, tiers: Mapping[str, float]) -> str:
    """The longer form, a line per figure."""
    used = f"{figures.used} of {figures.context} tokens ({100 * figures.used / figures.context:.0f} %)"
    rows = {
        "answer": f"{figures.tokens} tokens in {figures.prefill_s + figures.decode_s:.2f} s",
        "decode": f"{figures.decode_s:.2f} s, {rate(figures.decode_rate) or 'no rate: one token'}",
        "prefill": f"{figures.read} tokens in {figures.prefill_s:.2f} s, {rate(figures.prefill_rate) or 'no rate'}, "
                   f"{figures.reused} more were in the KV cache",
        "context": used,
        "experts": _experts(tiers).removeprefix("experts "),
        "seed": str(figures.seed),
    }
    if figures.ending:
        rows["ended by"] = figures.ending
    return "\n".join(f"  {name:<9} {text}" for name, text in rows.items() if text)


def rate(value: float | None) -> str:
    """7.4 tok/s, 96 tok/s; "" for None."""
    if value is None:
        return ""
    return f"{value:.1f} tok/s" if value < 20 else f"{value:.0f} tok/s"


def _experts(tiers: Mapping[str, float]) -> str:
    return "experts " + " ".join(f"{name} {share:.0f} %" for name, share in tiers.items()) if tiers else ""

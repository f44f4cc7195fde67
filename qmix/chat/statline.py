"""The figures after an answer: one dim line, or with --stats a block.

    312 tok · 7.4 tok/s · prefill 96 tok/s · experts ram 100 %
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qmix.generate import Timings


@dataclass(frozen=True, slots=True)
class Figures:
    """What one answer took. used and context: positions; ending: why it is not complete, "" where it is."""

    timings: Timings
    used: int
    context: int
    seed: int
    ending: str = ""


def line(figures: Figures, tiers: Mapping[str, float]) -> str:
    """tiers: share of expert reads per tier in percent, only tiers that exist."""
    timings = figures.timings
    prefill = rate(timings.prefill_rate)
    parts = [figures.ending, timings.counted, rate(timings.decode_rate),
             f"prefill {prefill}" if prefill else "", f"experts {_shares(tiers)}" if tiers else ""]
    return " · ".join(part for part in parts if part)


def block(figures: Figures, tiers: Mapping[str, float], paging: Mapping[str, str] = MappingProxyType({})) -> str:
    """The longer form, a line per figure. paging: what figures.sentences says of the answer."""
    t = figures.timings
    first = "none" if t.first_token_seconds is None else f"{t.first_token_seconds:.2f} s"
    rows = {
        "answer": f"{t.generated_tokens} tokens in {t.prefill_seconds + t.decode_seconds:.2f} s, "
                  f"first after {first}",
        "thinking": f"{t.thinking_tokens} of these tokens" if t.thinking_tokens else "",
        "prefill": f"{t.prompt_tokens - t.cached_tokens} tokens in {t.prefill_seconds:.2f} s"
                   f"{_also(rate(t.prefill_rate))}; {t.cached_tokens} more were in the KV cache",
        "decode": f"{t.decode_seconds:.2f} s{_also(rate(t.decode_rate))}",
        "drafts": drafts(t),
        "context": f"{figures.used} of {figures.context} tokens "
                   f"({100 * figures.used / figures.context:.0f} %)",
        "experts": _shares(tiers), **paging,
        "seed": str(figures.seed),
        "ended by": figures.ending,
    }
    return "\n".join(f"  {name:<9} {text}" for name, text in rows.items() if text)


def drafts(timings: Timings) -> str:
    """80 drafted, 62 accepted (78 %), 60 of 200 passes saved; "" where none was tried."""
    if timings.acceptance is None:
        return ""
    return (f"{timings.drafted} drafted, {timings.accepted} accepted ({100 * timings.acceptance:.0f} %), "
            f"{timings.passes_saved} of {timings.passes_saved + timings.decode_passes} passes saved")


def rate(value: float | None) -> str:
    """7.4 tok/s, 96 tok/s; "" for None."""
    if value is None:
        return ""
    return f"{value:.1f} tok/s" if value < 20 else f"{value:.0f} tok/s"


def _also(text: str) -> str:
    return f", {text}" if text else ""


def _shares(tiers: Mapping[str, float]) -> str:
    return " ".join(f"{name} {share:.0f} %" for name, share in tiers.items())

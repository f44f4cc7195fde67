"""Rows out of repetitions: plain data for csv, jsonl and json, and cells that people read.

A case gives two rows, "cold" (the first repetition after a load) and "warm" (the others). Rates are the median over
the repetitions of a row. Bytes, hits and shares of time are of all repetitions together. GB/s are bytes a token times
the median rate, so the columns of a row agree with one another.

Rows of a device have fields and columns that rows of the CPU do not have. One run of `qmix bench` has rows of one kind
only, so its csv has one header.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qmix.bench.cases import Case
from qmix.bench.device import Moved
from qmix.bench.measure import Repetition
from qmix.bench.roofline import Judgement, Peaks, Work, judge


def figures(case: Case, state: str, repetitions: Sequence[Repetition], peaks: Peaks) -> dict[str, Any]:
    """One row, flat; None where there is nothing to tell. Bytes and GB/s; shares of 1, not percent."""
    rates = [one.rate for one in repetitions]
    median = statistics.median(rates)
    tokens, chosen = _sum(repetitions, "tokens"), _sum(repetitions, "chosen")
    seconds = tokens / median  # what all of them take at the median rate
    ram, disk = _sum(repetitions, "ram_bytes"), _sum(repetitions, "disk_bytes") + _sum(repetitions, "warmed_bytes")
    stalled = _sum(repetitions, "stalled") / _sum(repetitions, "seconds")
    moved = [one.moved for one in repetitions if one.moved is not None]
    work = Work(ram, disk, _sum(repetitions, "operations"), seconds, stalled * seconds)
    if moved:
        slower = _sum(moved, "bus_seconds") > _sum(moved, "disk_seconds")
        work = replace(work, vram_bytes=_sum(moved, "vram_bytes"), bus_bytes=_sum(moved, "bus_bytes"),
                       awaited="bus" if slower else "disk")
    found = judge(work, peaks)
    recalls = [one.recall for one in repetitions if one.recall is not None]
    return {
        "test": case.name, "state": state, "kind": case.kind, "tokens": case.tokens, "depth": case.depth,
        "repetitions": len(repetitions), "tokens_per_second": _digits(median), "slowest": _digits(min(rates)),
        "fastest": _digits(max(rates)),
        "ram_bytes_per_token": round(ram / tokens), "ram_gbps": _digits(ram / seconds / 1e9),
        "disk_bytes_per_token": round(disk / tokens), "disk_gbps": _digits(disk / seconds / 1e9),
        "gflops": _digits(_sum(repetitions, "operations") / seconds / 1e9),
        "hit_rate": _digits(_sum(repetitions, "hits") / chosen),
        "prefetch_recall": _digits(statistics.mean(recalls)) if recalls else None,
        "prefetch_wasted_bytes_per_token": round(_sum(repetitions, "wasted_bytes") / tokens),
        "stalled_share": _digits(stalled), "roofline_share": _digits(found.share), "limited_by": found.limit,
        "memory_share": _digits(found.bounds["memory"] / seconds),
        "compute_share": _digits(found.bounds["compute"] / seconds),
        "disk_share": _digits(found.bounds["disk"] / seconds),
        **(_of_device(case, moved, chosen, work, found) if moved else {}),
    }


def _of_device(case: Case, moved: Sequence[Moved], chosen: int, work: Work, found: Judgement) -> dict[str, Any]:
    """What a row of a device tells besides. Launches and waits are counted while decoding only."""
    tokens, seconds, counted = case.tokens * len(moved), work.seconds, case.kind == "tg"
    return {
        "vram_bytes_per_token": round(work.vram_bytes / tokens), "vram_gbps": _digits(work.vram_bytes / seconds / 1e9),
        "bus_bytes_per_token": round(work.bus_bytes / tokens), "bus_gbps": _digits(work.bus_bytes / seconds / 1e9),
        "ram_hit_rate": _digits(_sum(moved, "below") / chosen),
        "computed_per_token": _digits(_sum(moved, "computed") / tokens),
        "launches_per_token": _digits(_sum(moved, "launches") / tokens) if counted else None,
        "waits_per_token": _digits(_sum(moved, "waits") / tokens) if counted else None,
        "gpu_memory_share": _digits(found.bounds["gpu memory"] / seconds),
        "bus_share": _digits(found.bounds["bus"] / seconds),
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of `figures` for a table that people read."""
    recall, fast, found, after = row["prefetch_recall"], {}, {}, {}
    if "vram_gbps" in row:
        fast = {"VRAM a token": _decimal(row["vram_bytes_per_token"]), "VRAM GB/s": short(row["vram_gbps"]),
                "bus a token": _decimal(row["bus_bytes_per_token"]), "bus GB/s": short(row["bus_gbps"])}
        found = {"in RAM": _percent(row["ram_hit_rate"]), "by CPU a token": short(row["computed_per_token"])}
        after = {f"{name} a token": "-" if row[f"{name}_per_token"] is None else short(row[f"{name}_per_token"])
                 for name in ("launches", "waits")}
    return {
        "test": row["test"], "state": row["state"], "tok/s": short(row["tokens_per_second"]),
        "min to max": f"{short(row['slowest'])} to {short(row['fastest'])}" if row["repetitions"] > 1 else "-", **fast,
        "RAM a token": _decimal(row["ram_bytes_per_token"]), "RAM GB/s": short(row["ram_gbps"]),
        "disk a token": _decimal(row["disk_bytes_per_token"]), "disk GB/s": short(row["disk_gbps"]),
        "hits": _percent(row["hit_rate"]), **found, "recall": "-" if recall is None else _percent(recall),
        "wasted a token": _decimal(row["prefetch_wasted_bytes_per_token"]), "stalled": _percent(row["stalled_share"]),
        **after, "roofline": _percent(row["roofline_share"]), "limited by": row["limited_by"],
    }


def _sum(parts: Sequence[Repetition] | Sequence[Moved], name: str) -> Any:
    return sum(getattr(one, name) for one in parts)


def _digits(value: float) -> float:
    """Four digits: a fifth would be noise."""
    return float(f"{value:.4g}")


def short(value: float) -> str:
    """Three digits, never in powers of ten: 0.0123, 1.23, 45.6, 1234."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}" if value >= 1e-4 else "0"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _decimal(nbytes: int) -> str:
    """Bytes that are moved, in decimal units as the GB/s beside them: 1536 -> "1.54 kB"."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"

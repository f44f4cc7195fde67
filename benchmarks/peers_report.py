"""What peers.py makes of its runs: figures of one run, medians over rounds, ratios, Markdown tables.

A run is a dict: side, round, nbytes (the model's), token_bytes (weights that a token reads), disk_bandwidth and
bandwidth {name of a stretch of decoding: GB/s}, and what peers_side.py printed; or side, round and error.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]
GB, GIB = 1e9, 2**30
# Of these, less is better.
SECONDS = ("load, s", "first token after load, ms", "command to first token, s", "peak VmHWM, GiB")


def figures(run: Run) -> dict[str, float]:
    """{name with unit: value}, in the order of the table; {} of a run that failed."""
    if "error" in run:
        return {}
    rate = run["nbytes"] / run["load_seconds"]
    found = {"load, s": run["load_seconds"], "load, GB/s": rate / GB, "load, % of disk": 100 * rate
             / run["disk_bandwidth"], "first token after load, ms": 1000 * run["first_token_seconds"],
             "command to first token, s": run["command_seconds"]}
    for count, part in run["prefill"].items():
        found[f"prefill {count}, tok/s"] = part["tokens"] / part["seconds"]
    for depth, part in run["decode"].items():
        rate = part["tokens"] / part["seconds"]
        found[f"decode at {depth}, tok/s"] = rate
        found[f"decode at {depth}, GB/s of weights"] = rate * run["token_bytes"] / GB
        found[f"decode at {depth}, RAM read GB/s"] = run["bandwidth"][depth]
        found[f"decode at {depth}, % of RAM read"] = 100 * rate * run["token_bytes"] / GB / run["bandwidth"][depth]
    return found | {"peak VmHWM, GiB": run["hwm_bytes"] / GIB}


def cell(values: Sequence[float]) -> str:
    """"12.3 (11.9 to 12.8)", of one value "12.3"."""
    if not values:
        return "–"
    digits = 0 if min(values) >= 100 else 1 if min(values) >= 10 else 2
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(mine: Sequence[Run], other: Sequence[Run]) -> dict[str, list[float]]:
    """Of each round, how many times better `mine` is; only of what both have, and of tok/s and SECONDS."""
    found: dict[str, list[float]] = {}
    for a, b in zip(mine, other, strict=False):
        left, right = figures(a), figures(b)
        for name in left.keys() & right.keys():
            if name in SECONDS:
                found.setdefault(name, []).append(right[name] / left[name])
            elif name.endswith("tok/s"):
                found.setdefault(name, []).append(left[name] / right[name])
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def figures_table(runs: dict[str, list[Run]]) -> str:
    """A row a figure, a column a side; a side that failed in every round shows why."""
    found = {side: [figures(run) for run in each] for side, each in runs.items()}
    names = list(dict.fromkeys(name for each in found.values() for one in each for name in one))
    rows = [[name, *(cell([one[name] for one in each if name in one]) for each in found.values())] for name in names]
    failures = [next((run["error"] for run in each if "error" in run), "") for each in runs.values()]
    if any(failures):
        rows.append(["failed", *(text.replace("|", "/") or "–" for text in failures)])
    return table(["figure", *runs], rows)


def ratio_table(runs: dict[str, list[Run]], mine: Sequence[str], others: Sequence[str]) -> str:
    """Medians of the rounds' ratios; more than 1: qmix is better."""
    pairs = {f"{a} ÷ {b}": ratios(runs[a], runs[b]) for a in mine for b in others}
    order = [name for each in runs.values() for run in each for name in figures(run)]
    names = [name for name in dict.fromkeys(order) if any(name in found for found in pairs.values())]
    rows = [[name.rpartition(",")[0], *(cell(found.get(name, [])) for found in pairs.values())] for name in names]
    return table(["figure", *pairs], rows)

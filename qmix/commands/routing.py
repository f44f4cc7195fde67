"""The routers' choices in earlier runs, for people: the logic of `qmix stats` without a text, and of `qmix replay`. The
results are plain data for render.document. No torch.

L layers, E experts, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2
from pathlib import Path
from typing import Any

from qmix.config import strings
from qmix.errors import UsageError
from qmix.offload import replay
from qmix.offload.router_stats import PHASES, Counts, RouterStats
from qmix.offload.trace import TraceHeader, read_trace

WIDE = 16  # experts above which a table of people's size leaves the counts out
TOP = 12  # transitions shown of a phase
SELDOM = 20  # tokens that chose the first expert, below which a transition is an accident
SHOWN_POLICIES = ("lru", "lfu", "static")
SHOWN_SHARES = (0.25, 0.375, 0.5, 0.75)  # of all records, as slot counts


def describe(stats: RouterStats, full: bool = False, numbers: Sequence[int] = ()) -> dict[str, Any]:
    """By phase: tokens, a row for each layer, and the transitions that stand out most from chance.

    Rows: the most used expert, its share of the tokens (an even router gives each K / E), the entropy of the choices in
    bits of log2(E), and, up to WIDE experts or with `full`, how many tokens chose each expert. full: all transitions,
    [L - 1][E][E], in place of the top ones. numbers: the model's of the layers, where some have no experts and are not
    counted; () for 0, 1, 2...
    """
    found: dict[str, Any] = {"layers": stats.layers, "experts": stats.experts}
    numbers = numbers or range(stats.layers)
    for phase in PHASES:
        counts = stats.total(phase)
        found[phase] = {"tokens": counts.tokens}
        if counts.tokens:
            per_token = sum(counts.counts[0]) / counts.tokens
            found[phase] |= {"even share %": 100 * per_token / stats.experts,
                             "entropy of an even router": log2(stats.experts),
                             "by layer": [{"layer": number, **_layer_row(counts, at, full)}
                                          for at, number in enumerate(numbers)],
                             "transitions" if full else "top transitions":
                             counts.transitions if full else _top_transitions(counts, numbers)}
    return found


def _layer_row(counts: Counts, layer: int, full: bool) -> dict[str, Any]:
    used = counts.counts[layer]
    top = max(range(len(used)), key=used.__getitem__)
    whole = sum(used)
    row: dict[str, Any] = {"top": top, "share %": 100 * used[top] / counts.tokens,
                           "entropy": -sum(n / whole * log2(n / whole) for n in used if n)}
    return row | ({"counts": used} if full or len(used) <= WIDE else {})


def _top_transitions(counts: Counts, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Where an expert makes one of the next layer likelier than it is at large, by the difference."""
    rows = []
    for layer, table in enumerate(counts.transitions):
        for a, row in enumerate(table):
            if (users := counts.counts[layer][a]) >= SELDOM:
                for b, both in enumerate(row):
                    at_large = counts.counts[layer + 1][b] / counts.tokens
                    rows.append({"layer": numbers[layer], "expert": a, "then": b, "share %": 100 * both / users,
                                 "at large %": 100 * at_large})
    return sorted(rows, key=lambda row: row["at large %"] - row["share %"])[:TOP]


def replay_report(tests: Sequence[Path], trains: Sequence[Path], say: Callable[[str], None], *,
                  slots: Sequence[int] = (), policies: Sequence[str] = (), quotas: bool = False, record: int = 0,
                  store: str = "", guesses: int = 0) -> dict[str, Any]:
    """What caches of `slots` slots (default: SHOWN_SHARES of the records) would have done on recorded traces, and how
    well the next layer's choices are foretold. Each test starts warm by the training traces.

    policies: default SHOWN_POLICIES; quotas: also with quotas; record: bytes of a record, 0 = leave the bytes out;
    store: the fingerprint that the traces must have, "" = any; guesses: per layer, 0 = as many as a token chooses.
    UsageError as read_trace and replay.rows raise it.
    """
    played, learnt = ([read_trace(path, say) for path in paths] for paths in (tests, trains))
    header = replay.check_alike([*played, *learnt])
    if store and header.store != store:
        raise UsageError(f"{tests[0]}: recorded with another store, {header.source}", "name that one as --model")
    decoded = sum(one.tokens for trace in played for one in trace.passes if one.phase == "decode")
    if decoded == 0:
        raise UsageError(f"{tests[0]}: no token was decoded in it", "record an answer, not only a prompt")
    if not trains:
        say("no --train trace: the caches start without statistics, so static keeps what it has")
    rows = replay.rows(played, learnt, slots or default_slots(header),
                       strings("policies", policies) or SHOWN_POLICIES,
                       (False, True) if quotas else (False,), record)
    return {"source": header.source, "layers": header.layers, "experts": header.experts, "decoded tokens": decoded,
            "policies": rows, "predictions": replay.prediction_rows(played, learnt, guesses)}


def default_slots(header: TraceHeader) -> list[int]:
    """SHOWN_SHARES of all records, but no fewer than a token uses in a layer."""
    records = header.layers * header.experts
    return sorted({max(header.top_k, round(share * records)) for share in SHOWN_SHARES})

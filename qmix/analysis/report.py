"""The figures of all texts as one document: full for programs, in tables for people, in tidy rows for spreadsheets.

Fractions throughout; only the tables for people are in percent.

E experts, K chosen per token, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log2
from statistics import fmean
from typing import Any

from qmix.analysis import chance
from qmix.analysis.measures import SOURCES
from qmix.analysis.recorder import LayerFigures, TextFigures

FORMAT, VERSION = "qmix_routing", 1
COLUMNS = ("text", "layer", "metric", "key", "value")
SINGLE = ("imbalance", "variation", "entropy", "repeat_first", "repeat_any", "pairing", "reuse_mean")
LISTS = ("share", "first_share", "reuse_distance", "reuse_distance_in_turn")
BY_SLOTS = ("lru_hit", "lru_hit_in_turn")
TOP = 8  # pairs shown of a text
SELDOM = 20  # tokens below which a pair is an accident

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """What was looked at. layers: how many have experts; window: tokens after which the context starts empty again;
    record: bytes of an expert, the mean where they differ; numbers: the model's of these layers, () for 0, 1, 2..."""

    model: str
    layers: int
    experts: int
    chosen: int
    window: int
    record: int
    numbers: tuple[int, ...] = ()


def document(subject: Subject, texts: Sequence[tuple[str, TextFigures]]) -> Document:
    """Everything, with counts. "chance" has what a router gives that chooses at random."""
    experts, chosen = subject.experts, subject.chosen
    level = {"share": 1 / experts, "first_share": 1 / experts, "imbalance": 1.0, "variation": 0.0,
             "entropy": log2(experts), "repeat_first": 1 / experts, "repeat_any": chance.repeat_any(experts, chosen),
             "pairing": 0.0, "recall": chosen / experts, "lru_hit": chance.hits(experts, chosen, in_turn=False),
             "lru_hit_in_turn": chance.hits(experts, chosen, in_turn=True)}
    return {FORMAT: VERSION, "model": subject.model, "layers": subject.layers, "experts": experts, "chosen": chosen,
            "window": subject.window, "record_bytes": subject.record, "chance": level,
            "texts": [{"text": name, "tokens": figures.tokens,
                       "by_layer": [_layer(number, one, chosen) for number, one in zip(
                           subject.numbers or range(subject.layers), figures.layers, strict=True)]}
                      for name, figures in texts]}


def _layer(number: int, figures: LayerFigures, chosen: int) -> Document:
    load, repeats, reuse = figures.load, figures.repeats, figures.reuse
    expected = figures.together.expected(load, chosen)
    pairs = combinations(range(len(load.chosen)), 2)
    return {"layer": number, "chosen": load.chosen, "chosen_first": load.first, "share": load.shares(),
            "first_share": load.first_shares(), "imbalance": load.imbalance(), "variation": load.variation(),
            "entropy": load.entropy(), "pairs": repeats.pairs,
            "repeat_first": repeats.first / repeats.pairs if repeats.pairs else None,
            "repeat_any": repeats.any / repeats.pairs if repeats.pairs else None,
            "recall": {source: figures.foretold.recall(source) for source in SOURCES},
            "pairing": figures.together.pairing(expected),
            "together": [{"a": a, "b": b, "tokens": figures.together.both[a][b], "expected": expected[a][b]}
                         for a, b in pairs] if chosen > 1 else [],
            "reuse_mean": reuse.mean(), "reuse_distance": reuse.at_once, "reuse_distance_in_turn": reuse.in_turn,
            "lru_hit": reuse.hits(chosen), "lru_hit_in_turn": reuse.hits_in_turn()}


def tidy(report: Document) -> Iterator[Document]:
    """A row for each number: text, layer, metric, key, value. key: an expert, a pair as 3+5, a distance, a number of
    slots or a source of guesses, "" where there is one number a layer. The text "chance" is a random router, its layer
    ""; numbers that do not exist have no row."""
    level = {**report["chance"], "recall": dict.fromkeys(SOURCES, report["chance"]["recall"])}
    level |= {name: [level[name]] * report["experts"] for name in ("share", "first_share")}
    for metric, key, value in _numbers(level):
        yield dict(zip(COLUMNS, ("chance", "", metric, key, value), strict=True))
    for text in report["texts"]:
        for row in text["by_layer"]:
            for metric, key, value in _numbers(row):
                yield dict(zip(COLUMNS, (text["text"], row["layer"], metric, key, value), strict=True))


def _numbers(row: Document) -> Iterator[tuple[str, str, float]]:
    """(metric, key, value) of a layer."""
    found: list[tuple[str, str, float | None]] = [(name, "", row[name]) for name in SINGLE if name in row]
    found += [(name, str(key), value) for name in LISTS if name in row for key, value in enumerate(row[name])]
    found += [(name, str(slots), value) for name in BY_SLOTS for slots, value in enumerate(row[name], 1)]
    found += [("recall", source, value) for source, value in row["recall"].items()]
    for pair in row.get("together", ()):
        key = f"{pair['a']}+{pair['b']}"
        found += [("together", key, pair["tokens"]), ("together_expected", key, pair["expected"])]
    return ((metric, key, value) for metric, key, value in found if value is not None)


def people(report: Document) -> Document:
    """For render.document: for each text a table by layer, what caches would do, and the pairs that stand out."""
    level, chosen = report["chance"], report["chosen"]
    found: Document = {
        "model": report["model"], "experts": f"{report['experts']} a layer, {chosen} chosen per token",
        "window": f"{report['window']} tokens, each from an empty context",
        "a router that chooses at random": " · ".join((
            f"share {100 * level['share']:.1f} %", f"entropy {level['entropy']:.3g} bits",
            f"first repeats {100 * level['repeat_first']:.1f} %", f"any repeats {100 * level['repeat_any']:.1f} %",
            f"recall {100 * level['recall']:.1f} %"))}
    for text in report["texts"]:
        found[text["text"]] = {"tokens": text["tokens"], "by layer": [_shown(row) for row in text["by_layer"]],
                               "an LRU cache in each layer": slot_rows(report, [text])}
        if pairs := _pairs(text, chosen):
            found[text["text"]]["chosen together more or less often than their popularity explains"] = pairs
    return found


def _shown(row: Document) -> Document:
    top = max(range(len(row["share"])), key=row["share"].__getitem__)
    return {"layer": row["layer"], "top": top, "share %": 100 * row["share"][top], "max/mean": row["imbalance"],
            "cv": row["variation"], "entropy": row["entropy"], "first repeats %": percent(row["repeat_first"]),
            "any repeats %": percent(row["repeat_any"]), "ahead %": percent(row["recall"]["ahead"]),
            "transitions %": percent(row["recall"]["transitions"]), "popular %": percent(row["recall"]["popular"]),
            "pairing %": percent(row["pairing"]), "reuse": "-" if row["reuse_mean"] is None else row["reuse_mean"]}


def slot_rows(report: Document, texts: Sequence[Document]) -> list[Document]:
    """By slots per layer, from the K that a token needs: hits of all layers and of the worst and best one, what
    misses cost, and the memory; the mean over `texts`."""
    chosen, layers = report["chosen"], report["layers"]
    rows = []
    for slots in range(chosen, report["experts"] + 1):
        by_layer = [fmean(text["by_layer"][layer]["lru_hit"][slots - 1] for text in texts) for layer in range(layers)]
        misses = (1 - fmean(by_layer)) * chosen * layers
        rows.append({"slots": slots, "chance %": 100 * slots / report["experts"], "hit %": 100 * fmean(by_layer),
                     "worst layer %": 100 * min(by_layer), "best layer %": 100 * max(by_layer),
                     "misses/token": misses, "MB/token": misses * report["record_bytes"] / 1e6,
                     "MB of slots": slots * layers * report["record_bytes"] / 1e6})
    return rows


def _pairs(text: Document, chosen: int) -> list[Document]:
    """Those farthest from chance, in standard deviations of a Poisson count."""
    rows = []
    for row in text["by_layer"] if chosen > 1 else ():
        for pair in row["together"]:
            if pair["expected"] >= SELDOM:
                rows.append({"layer": row["layer"], "experts": f"{pair['a']}+{pair['b']}", "tokens": pair["tokens"],
                             "expected": pair["expected"], "ratio": pair["tokens"] / pair["expected"]})
    return sorted(rows, key=lambda row: -abs(row["tokens"] - row["expected"]) / row["expected"]**0.5)[:TOP]


def percent(share: float | None) -> float | str:
    return "-" if share is None else 100 * share

"""Runs a model over texts while the collector watches: in windows of the context, each from an empty one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qmix.analysis.recorder import SHOWN, Collector, TextFigures
from qmix.analysis.report import Subject
from qmix.analysis.view import View
from qmix.render import Progress, clean

if TYPE_CHECKING:
    from qmix.engine import Engine


def names(files: Sequence[Path]) -> list[str]:
    """What to call the texts: as the files, without folder and ending as far as that tells them apart."""
    for name in (lambda path: path.stem, lambda path: path.name, str):
        found = [_printable(name(path)) for path in files]
        if len(set(found)) == len(found) and "chance" not in found:
            return found
    return [f"{number} {_printable(str(path))}" for number, path in enumerate(files, 1)]


def _printable(name: str) -> str:
    """A file's name may have control characters, and bytes that are no text."""
    return clean(name.encode("utf-8", "replace").decode()).replace("\n", " ").replace("\t", " ")


def subject(engine: Engine, window: int) -> Subject:
    config, records = engine.model, engine.store.layout.records.values()
    return Subject(engine.store.path.resolve().name, len(config.record_layers), config.num_experts, config.top_k,
                   window, sum(record.nbytes for record in records) // len(records), config.record_layers)


def run(engine: Engine, collector: Collector, texts: Sequence[tuple[str, str]], limit: int, progress: Progress,
        say: Callable[[str], None]) -> tuple[Subject, list[tuple[str, TextFigures]], list[View]]:
    """(what was looked at, each text's figures, its coloured view). texts: (name, text) pairs; limit: tokens of each,
    0 = all. collector: what the engine was loaded with as its `trace`. Progress counts characters."""
    config, session = engine.model, engine.session()
    whole, before = sum(len(text) for _, text in texts), 0
    found, views = [], []
    for name, text in texts:
        ids = engine.tokenizer.encode(text)
        if limit and len(ids) > limit:
            say(f"{name}: the first {limit:,} of {len(ids):,} tokens")
            del ids[limit:]
        figures = collector.text = TextFigures(len(config.record_layers), config.num_experts, config.top_k)
        for start in range(0, len(ids), session.context):
            session.trim(0)
            figures.begin_window()
            session.prefill(ids[start:start + session.context])
            progress(before + len(text) * min(len(ids), start + session.context) // len(ids), whole, name)
        before += len(text)
        found.append((name, figures))
        views.append(View(name, pieces(engine, ids[:SHOWN], len(ids) > SHOWN), figures.firsts, len(ids)))
    collector.text = None
    return subject(engine, session.context), found, views


def pieces(engine: Engine, ids: Sequence[int], cut: bool) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with its last one. cut: more follow, and
    half a character at the end is dropped."""
    decoder = engine.tokenizer.decoder()
    found = [decoder.push(token) for token in ids]
    if not cut:
        found[-1] += decoder.finish()
    return found

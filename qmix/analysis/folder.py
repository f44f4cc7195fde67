"""The folder of `qmix stats --plot`: stats.json, routing.csv, text.html and the plots, each replaced whole.

A folder is ours if its stats.json says so. In any other folder, files with one of our names are left alone: the command
refuses before it computes anything.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from qmix import render
from qmix.analysis import plots
from qmix.analysis.report import FORMAT, Document, tidy
from qmix.analysis.view import View, page
from qmix.errors import QmixError, UsageError

STATS, TABLE, TEXT = "stats.json", "routing.csv", "text.html"
PLOTS = ("shares.svg", "repeats.svg", "hits.svg", "lookahead.svg", "together.svg")


def prepare(out: Path) -> None:
    """Make the folder. UsageError where it is a file, cannot be made, or has files that are not of an earlier run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not _ours(out / STATS):
            taken = [name for name in (STATS, TABLE, TEXT, *PLOTS) if os.path.lexists(out / name)]
            if taken:
                raise UsageError(f"--plot {out}: its {taken[0]} was not written by qmix stats and would be lost",
                                 "name another folder, or move that file away")
        with tempfile.TemporaryFile(dir=out):
            pass  # better to know now than after an hour
    except (OSError, ValueError) as e:  # ValueError: a name with a NUL byte
        raise UsageError(f"--plot {out}: {getattr(e, 'strerror', None) or e}",
                         "name a folder that is there or can be made") from None


def _ours(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and FORMAT in found


def contents(report: Document, views: Sequence[View]) -> dict[str, str]:
    """{name: text} of all files."""
    numbers = [row["layer"] for row in report["texts"][0]["by_layer"]]
    return {STATS: render.document(report, as_json=True) + "\n", TABLE: render.table(list(tidy(report)), "csv") + "\n",
            TEXT: page(report["model"], report["experts"], views, numbers), **plots.draw(report)}


def write(out: Path, files: Mapping[str, str]) -> None:
    """{name: text} into the folder; stats.json first, so that a run that ends early leaves a folder that is ours."""
    for name in sorted(files, key=lambda name: name != STATS):
        temporary = out / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(files[name], encoding="utf-8", newline="\n")
            temporary.replace(out / name)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise QmixError(f"{out / name}: cannot be written: {e.strerror or e}") from None

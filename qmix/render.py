"""Everything the user sees apart from the answer: lines, tables and progress bars on stderr, data on stdout.

stdout carries an answer or one document; everything else goes to stderr, so that pipes stay clean. rich draws bars and
tables; it is imported when the first one is drawn.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol, TextIO

from qmix import streams
from qmix.errors import QmixError
from qmix.sizes import format_bytes

QUIET_SECONDS = 2.0
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Progress(Protocol):
    """Called with absolute byte counts as work goes on."""

    def __call__(self, done: int, total: int, label: str) -> None: ...


def say(line: str) -> None:
    """One line on stderr. A stderr that cannot be written (closed, a full disk, a reader that left) loses the line and
    never the answer."""
    if sys.stderr is None:  # print would take stdout instead
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        streams.abandon(sys.stderr)


def dim(line: str) -> None:
    """One dim line on stderr, for figures beside an answer; plain where that is no terminal."""
    say(f"{DIM}{line}{PLAIN}" if sys.stderr is not None and wants_color(sys.stderr, os.environ) else line)


def wants_color(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Escape sequences only to a capable terminal, and not with NO_COLOR (no-color.org) or TERM=dumb."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"


def _pictures() -> dict[int, str]:
    c0 = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
    # C1 controls hold the one-byte forms of escape sequences (0x9b is CSI); they have no pictures.
    return c0 | {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


PICTURES = MappingProxyType(_pictures())


def clean(text: str) -> str:
    """`text` with every control character except newline and tab made visible and harmless: an escape
    sequence in an answer could move the cursor, set the title or fake a prompt.

    "\\x1b[2J" -> "\\u241b[2J"
    """
    return text.translate(PICTURES)


def fail(error: QmixError) -> None:
    """`error: what was wrong`, then the cure, indented."""
    say(clean(f"error: {error}"))


@contextmanager
def byte_bar(title: str) -> Iterator[Progress]:
    """A bar with bytes, rate and time left; on a stderr that is no terminal, a line now and then."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _plain_progress(title)
        return
    bars: list[tuple[Any, Any]] = []

    def update(done: int, total: int, label: str) -> None:
        if not bars:  # drawn when there is something to show: lines said before it are not in its way
            bars.append(_draw_bar(title))
        bar, task = bars[0]
        bar.update(task, completed=done, total=total, description=f"{title} {label}".strip())

    try:
        yield update
    finally:
        for bar, _ in bars:
            bar.stop()


def _draw_bar(title: str) -> tuple[Any, Any]:
    """(a started rich progress display, its one task)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
                   TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bar.start()
    return bar, bar.add_task(title, total=None)


def _plain_progress(title: str) -> Progress:
    """A line every ten percent, but none in the first seconds and none sooner than that after another:
    what is quick needs no progress."""
    shown, last = 0, time.monotonic()

    def update(done: int, total: int, label: str) -> None:
        nonlocal shown, last
        tenth, now = 10 * done // total if total else 10, time.monotonic()
        if tenth > shown and now - last >= QUIET_SECONDS:
            shown, last = tenth, now
            say(f"{title}: {format_bytes(done)} of {format_bytes(total)} ({100 * done // max(1, total)} %)")

    return update


def json_text(data: Any, indent: int | None = None) -> str:
    """`data` as JSON that stdout can hold: with escapes (\\u2013) where its encoding lacks a character."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(data, indent=indent)
    return text


def document(data: dict[str, Any], as_json: bool) -> str:
    """Nested data as one JSON document, or as indented `key: value` lines with tables for lists of rows."""
    if as_json:
        return json_text(data, indent=2)
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{key}:", *("  " + line for line in table(value).splitlines())]
        elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            lines += [f"{key}:", *("  " + item for item in value)]
        elif isinstance(value, dict):
            lines += [f"{key}:", *("  " + line for line in document(value, False).splitlines())]
        else:
            lines.append(f"{key}: {_cell(value)}")
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]], style: str = "table") -> str:
    """Rows of equal keys as "table" (aligned text) | "json" | "jsonl" | "csv" | "md"."""
    if style == "json":
        return json_text(list(rows), indent=2)
    if style == "jsonl":
        return "\n".join(json_text(row) for row in rows)
    if not rows:
        return ""
    head = list(rows[0])
    if style == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, head, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().rstrip("\n")
    cells = [head, *([_cell(row[key]) for key in head] for row in rows)]
    if style == "md":
        cells.insert(1, ["---"] * len(head))
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    numeric = [all(isinstance(row[key], int | float) for row in rows) for key in head]
    return "\n".join("  ".join(cell.rjust(w) if right else cell.ljust(w)
                               for cell, w, right in zip(row, widths, numeric, strict=True)).rstrip()
                     for row in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

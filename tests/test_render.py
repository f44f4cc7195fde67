"""Lines, tables and bars: what goes where, and nothing for what is quick."""

from __future__ import annotations

import csv
import io
import json

import pytest

from qmix import render

ROWS = [{"name": "a", "bytes": 5, "error": 0.12345678}, {"name": "b,c", "bytes": 12345, "error": None}]


def test_table_styles_hold_the_same_rows() -> None:
    assert json.loads(render.table(ROWS, "json")) == ROWS
    assert [json.loads(line) for line in render.table(ROWS, "jsonl").splitlines()] == ROWS
    assert [row["bytes"] for row in csv.DictReader(io.StringIO(render.table(ROWS, "csv")))] == ["5", "12345"]
    assert render.table(ROWS, "md").splitlines()[:2] == ["| name | bytes | error |", "| --- | --- | --- |"]
    text = render.table(ROWS).splitlines()
    assert text[1].split() == ["a", "5", "0.1235"]
    assert text[1].index("5") + 1 == text[2].index("12345") + 5, "numbers are aligned at their ends"


def test_document_is_json_or_lines() -> None:
    data = {"name": "x", "classes": ROWS, "inner": {"key": 1}}
    assert json.loads(render.document(data, as_json=True)) == data
    lines = render.document(data, as_json=False).splitlines()
    assert lines[0] == "name: x" and lines[-1] == "  key: 1"


def test_quick_work_draws_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with render.byte_bar("load") as progress:
        for done in range(0, 101, 10):
            progress(done, 100, "")
    assert capsys.readouterr() == ("", "")


def test_slow_work_tells_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with render.byte_bar("load") as progress:
        for done in range(0, 1001, 50):
            progress(done << 20, 1000 << 20, "")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and 3 <= len(lines) <= 10
    assert lines[0].startswith("load: ") and "of 1000 MiB" in lines[0]


def test_color_only_where_it_is_wanted() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert render.wants_color(Terminal(), {"TERM": "xterm"})
    for stream, environ in ((io.StringIO(), {"TERM": "xterm"}), (Terminal(), {"TERM": "dumb"}),
                            (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}), (Terminal(), {})):
        assert not render.wants_color(stream, environ)

"""Small files of measurements; test_bandwidth.py has what may lie in the place of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmix import json_cache
from qmix.errors import ConfigError, QmixError


def test_what_was_saved_comes_back_under_its_format_and_version_only(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "new folder" / "file.json"

    def load(format: str, version: int) -> dict[str, Any] | None:
        return json_cache.load(path, format, version, dict, "qmix measure", said.append)

    assert load("ours", 1) is None and not said
    json_cache.save(path, "ours", 1, {"a": [1, 2.5], "b": None})
    assert load("ours", 1) == {"a": [1, 2.5], "b": None} and list(path.parent.iterdir()) == [path]
    assert not said
    assert load("ours", 2) is None and load("theirs", 1) is None
    assert said == [f"{path}: ignored (not a file of {name}, version {version}); `qmix measure` writes a new one"
                    for name, version in (("ours", 2), ("theirs", 1))]


@pytest.mark.parametrize("error", [ConfigError("a: got 1", "a cure"), ValueError("a: got 1\nmore")])
def test_what_its_record_refuses_is_one_line(error: Exception, tmp_path: Path) -> None:
    said: list[str] = []
    json_cache.save(tmp_path / "f", "ours", 1, {})

    def make(values: dict[str, Any]) -> None:
        raise error

    assert json_cache.load(tmp_path / "f", "ours", 1, make, "qmix measure", said.append) is None
    assert said == [f"{tmp_path / 'f'}: ignored (a: got 1); `qmix measure` writes a new one"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QmixError, match="cannot be written"):
        json_cache.save(tmp_path / "file" / "below", "ours", 1, {})


def test_dates() -> None:
    assert json_cache.is_date("2028-02-29")
    assert not any(map(json_cache.is_date, ("2026-02-29", "20260101", "", None, 20260101)))

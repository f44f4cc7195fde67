"""The file of measured configurations: it comes back on the card it is for, and is one line anywhere else."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qmix.errors import ConfigError
from qmix.kernels.configs import Configs, Gemv
from qmix.kernels.tuned import Card, Tuned, load, save

CARD = Card("NVIDIA GeForce RTX 4090", "8.9", "torch 2.9.0, triton 3.5.0")
GOOD = Tuned(CARD, "Mixtral 8x7B", "2026-01-31", Configs(gemv=Gemv(64, 8)))


def test_it_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    assert load(tmp_path / "kernels.json", CARD, said.append) is None
    save(GOOD, tmp_path / "kernels.json")
    assert load(tmp_path / "kernels.json", CARD, said.append) == GOOD and not said


@pytest.mark.parametrize("other", [{"name": "NVIDIA GeForce RTX 3060"}, {"capability": "8.6"},
                                   {"libraries": "torch 2.9.0, triton 3.6.0"}])
def test_another_card_or_version_is_refused_in_one_line(other: dict[str, str], tmp_path: Path) -> None:
    said: list[str] = []
    save(GOOD, tmp_path / "f")
    assert load(tmp_path / "f", replace(CARD, **other), said.append) is None
    (line,) = said
    (key, here), = other.items()
    assert f"measured with {getattr(CARD, key)}, this machine has {here}); " in line
    assert "`qmix doctor --tune` writes a new one" in line


@pytest.mark.parametrize("damage", [
    {"measured": "yesterday"}, {"model": 5}, {"model": "\x1b[2J"}, {"card": None}, {"card": {"name": "x"}}, {"more": 1},
    {"configs": {}}, {"configs": asdict(GOOD.configs) | {"gemv": {"threads": 10**9, "unroll": 4}}},
    {"card": asdict(CARD) | {"name": "a\nb"}}, {"card": asdict(CARD) | {"name": ["x" * 500]}}])
def test_a_damaged_file_is_refused_in_one_line(damage: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "f").write_text(json.dumps({"qmix_kernels": 1, **asdict(GOOD), **damage}))
    assert load(tmp_path / "f", CARD, said.append) is None
    assert len(said) == 1 and said[0].isprintable() and len(said[0]) < 500 and "ignored (" in said[0]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 60000, b" " * 70000, b'{"qmix_kernels": 2}'])
def test_a_foreign_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "f").write_bytes(content)
    assert load(tmp_path / "f", CARD, said.append) is None and len(said) == 1


def test_the_card_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.kernels.tuned.version", lambda name: "9.9")
    assert Card.of("a CPU", torch.device("cpu")) == Card("a CPU", "none", f"torch {torch.__version__}, triton 9.9")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    assert Card.of("a GPU", torch.device("cuda", 0)).capability == "8.9"
    with pytest.raises(ConfigError, match="name: got"):
        Card.of("", torch.device("cpu"))

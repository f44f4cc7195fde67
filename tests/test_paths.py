"""A model's name becomes a local folder, and a local one never asks the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmix import paths
from qmix.errors import CheckpointError, UsageError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple]:
    """Stands in for the hub's client: records what is asked for, gives a folder."""
    asked: list[tuple] = []

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("qmix.hub.repository.check_small_files", lambda *args: None)
    return asked


def test_folder_then_alias_then_hub(hub: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert paths.resolve(str(tmp_path), said.append) == tmp_path
    store = paths.models_folder() / "mine"
    store.mkdir(parents=True)
    (store / "qmix.json").write_text("{}")
    assert paths.resolve("mine", said.append) == store
    assert paths.local_stores() == [store]
    assert not hub and not said
    assert paths.resolve("org/name@v1", said.append) == tmp_path / "snapshot"
    assert hub[0][:2] == ("org/name", "v1")
    assert not any(".bin" in pattern or ".pt" in pattern for asked in hub for pattern in asked[2]), "no pickles"
    assert "hub" in said[0]


@pytest.mark.parametrize("name", ["nothing", "org/missing.gguf", "/no/such/folder", "./x/y/z", "a b/c"])
def test_what_is_nowhere_is_a_usage_error(name: str, hub: list[tuple]) -> None:
    with pytest.raises(UsageError) as error:
        paths.resolve(name, lambda line: None)
    assert name in error.value.message
    assert not hub
    if name.endswith(".gguf"):
        assert error.value.message == f"{name}: no such file"


def test_hub_failure_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr("qmix.hub.repository.check_small_files", lambda *args: None)
    with pytest.raises(CheckpointError) as error:
        paths.resolve("org/name", lambda line: None)
    assert error.value.message == "org/name: the hub did not deliver it: no route to host"


def test_a_folder_and_an_alias_of_one_name(hub: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that holds a model comes first, any other does not hide the alias; either is said."""
    monkeypatch.chdir(tmp_path)
    alias = paths.models_folder() / "both"
    alias.mkdir(parents=True)
    here = tmp_path / "both"
    here.mkdir()
    said: list[str] = []
    assert paths.resolve("both", said.append) == alias
    assert "the alias" in said[-1] and str(alias) in said[-1] and str(here) in said[-1]
    for name in ("params.json", "consolidated.00.safetensors"):
        (here / name).touch()
    assert paths.resolve("both", said.append) == Path("both"), "Mistral's own layout"
    assert "hides the alias both" in said.pop()
    for name in ("params.json", "consolidated.00.safetensors"):
        (here / name).unlink()
    (here / "config.json").write_text("{}")
    assert paths.resolve("both", said.append) == Path("both")
    assert "hides the alias both" in said[-1] and str(alias) in said[-1]
    assert paths.resolve("./both", said.append) == Path("both") and len(said) == 2
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert paths.resolve("org/name", said.append) == Path("org/name")
    assert "holds no model; the hub is not searched" in said[-1] and not hub

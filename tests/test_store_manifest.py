"""The manifest of a store: damaged folders, hostile values, and whatever hypothesis makes of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import odd_stores
import pytest
from helpers import write_tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_stores import edit, flip, refused

from qmix.errors import StoreError, UsageError
from qmix.store import Store, describe

source = pytest.fixture(scope="module")(odd_stores.source)
stores = pytest.fixture(scope="module")(odd_stores.stores)
store = pytest.fixture(odd_stores.store)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda store: (store / name).unlink()


@pytest.mark.parametrize(("damage", "named"), [
    (remove("qmix.json"), "not quantized"), (remove("config.json"), "config.json"),
    (remove("dense.safetensors"), "dense.safetensors"), (remove("experts-01.safetensors"), "experts-01"),
    (lambda s: os.truncate(s / "experts-00.safetensors", 9000), "experts-00.safetensors"),
    (lambda s: os.truncate(s / "experts-00.safetensors", 10), "experts-00.safetensors"),
    (lambda s: flip(s / "config.json", 30), "config.json"),
    (lambda s: shutil.copy(s / "experts-00.safetensors", s / "experts-01.safetensors"), "layers.1.experts.0"),
    (lambda s: (s / "journal.jsonl").touch(), "not finished"),
    (lambda s: [(s / "dense.safetensors").unlink(), os.mkfifo(s / "dense.safetensors")], "dense.safetensors"),
    (lambda s: [(s / "config.json").unlink(), os.mkfifo(s / "config.json")], "config.json"),
    (lambda s: [(s / "qmix.json").unlink(), (s / "qmix.json").mkdir()], "qmix.json"),
])
def test_damaged_folders_are_refused_by_name(store: Path, damage: Callable[[Path], Any], named: str) -> None:
    damage(store)
    with pytest.raises((StoreError, UsageError)) as error:
        Store.open(store)
    assert named in error.value.message and str(store) in error.value.message and error.value.cure


def test_headers_must_be_those_of_the_configs(store: Path) -> None:
    path = store / "experts-00.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'.experts.0.w2.qweight"', b'.experts.0.w2.qwe1ght"'))
    assert "layers.0.experts.0.w2.qweight: missing" in refused(store).message
    path.write_bytes(data.replace(b'"BF16"', b'"F16" ', 1))
    assert "F16" in refused(store).message


def test_folders_that_are_no_store(tmp_path: Path, source: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nothing").message
    (tmp_path / "file").touch()
    assert "not a folder" in refused(tmp_path / "file").message
    assert "qmix.json: missing" in refused(tmp_path).message
    with pytest.raises(UsageError) as error:
        Store.open(source)
    assert error.value.exit_code == 2 and f"qmix quantize {source} tiny-int4" in str(error.value)
    spaced = write_tiny_checkpoint(tmp_path / "a model")
    with pytest.raises(UsageError, match=r"qmix quantize '.*/a model' 'a model-int4'"):
        Store.open(spaced)


def test_other_versions_say_what_to_install(store: Path) -> None:
    edit(store, lambda raw: raw.update(format_version=7, needs_qmix="3.2", records="of another kind"))
    error = refused(store)
    assert "format_version: got 7" in error.message and "qmix 3.2" in str(error.cure)
    edit(store, lambda raw: raw.update(needs_qmix="\x1b[31m$(reboot)"))
    assert "reboot" not in str(refused(store))
    edit(store, lambda raw: raw.update(format_version=0))
    assert "format_version: got 0" in refused(store).message


@pytest.mark.parametrize(("where", "value"), [
    (["format_version"], "1"), (["format_version"], True), (["format_version"], None), (["source"], []),
    (["source", "fingerprint"], 3), (["model", "dtype"], "float8"), (["model", "vocab"], []), (["model"], 1),
    (["model", "mtp"], {}),
    (["model", "layers"], [0, 7]), (["model", "layers"], "ab"), (["model", "kinds", 0, "mixer", "type"], "Sum"),
    (["model", "kinds", 0, "mixer", "heads"], 0), (["model", "kinds", 0, "mlp", "experts"], 2),
    (["model", "version"], 9), (["alignment", "record"], 512),
    (["quantization", "block"], 48),
    (["quantization", "block"], 64.0), (["quantization", "experts"], "int3"), (["quantization", "method"], None),
    (["quantization", "double_quant"], 1), (["records"], {}), (["records"], []), (["records", 0], 1),
    (["records", 0, "layer"], 1.0), (["records", 0, "layer"], 10**30), (["records", 0, "layer"], 1),
    (["records", 5, "expert"], -1), (["records", 1, "file"], "../../etc/passwd"),
    (["records", 1, "file"], "/dev/zero"), (["records", 1, "file"], "experts-01.safetensors"),
    (["records", 1, "offset"], 4096), (["records", 1, "offset"], 2**63), (["records", 1, "bytes"], 0),
    (["records", 1, "xxh3_128"], "0" * 31), (["records", 1, "xxh3_128"], 0), (["records", 1, "error"], 0.1),
    (["records", 1, "error", "w13"], -1), (["records", 1, "error", "w13"], 10**400),
    (["records", 1, "error", "w13"], float("nan")), (["records", 1, "error", "all"], float("inf")),
    (["dense", 0, "name"], "model.embed"), (["dense", 0, "name"], "layers.0.experts.0"),
    (["dense", 0, "format"], "int8"), (["dense", 0, "error"], 0.1), (["dense", 2, "error"], None),
    (["dense", 0, "file"], "experts-00.safetensors"), (["files", 0, "name"], "../config.json"),
    (["files", 0, "name"], ".."), (["files", 0, "bytes"], 2**64), (["files", 0, "name"], "con\nfig"),
])
def test_hostile_manifests_are_refused_by_key(store: Path, where: list[Any], value: Any) -> None:
    def change(raw: Any) -> None:
        for key in where[:-1]:
            raw = raw[key]
        raw[where[-1]] = value

    edit(store, change)
    error = refused(store)
    assert "qmix.json" in error.message or "config.json" in error.message
    assert "passwd" not in error.message or "records[1].file" in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 200_000,
                                  b'{"format_version":' + b"9" * 9999])
def test_manifests_that_are_not_json(store: Path, text: bytes) -> None:
    (store / "qmix.json").write_bytes(text)
    assert "qmix.json" in refused(store).message


@pytest.mark.parametrize(("layers", "told"), [(2_000_000_000, "model.layers: got"), (4000, "4000 layers")])
def test_a_model_of_absurd_size_costs_nothing(store: Path, layers: int, told: str) -> None:
    edit(store, lambda raw: raw["model"].update(layers=[0] * min(layers, 10**6)))
    assert told in refused(store).message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(
        ["../x", "int4", "bfloat16", 64, 2**63, 10**400, "experts-00.safetensors", "0" * 32]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_mutation_of_the_manifest_escapes(stores: dict[str, Path], fuzzed: Path, data: st.DataObject) -> None:
    raw = json.loads((stores["int4"] / "qmix.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        node: Any = raw
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and data.draw(st.integers(0, 3)):
                node = node[key]
                continue
            action = data.draw(st.sampled_from(["replace", "delete", "double"]))
            if action == "delete":
                del node[key]
            elif action == "double" and isinstance(node, list):
                node.append(node[key])
            else:
                node[key] = data.draw(json_values)
            break
    (fuzzed / "qmix.json").write_text(json.dumps(raw))
    try:
        with Store.open(fuzzed) as opened:
            opened.verify(deep=True)
            describe(opened)
    except StoreError as error:
        assert error.cure and str(fuzzed) in error.message


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans())
def test_no_damaged_byte_of_the_manifest_escapes(stores: dict[str, Path], fuzzed: Path, place: int, value: int,
                                                 cut: bool) -> None:
    text = bytearray((stores["int4"] / "qmix.json").read_bytes())
    text[place % len(text)] = value
    (fuzzed / "qmix.json").write_bytes(text[:place % len(text)] if cut else text)
    try:
        Store.open(fuzzed).close()
    except StoreError as error:
        assert error.cure


@pytest.fixture(scope="module")
def fuzzed(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(stores["int4"], tmp_path_factory.mktemp("fuzz") / "store"))

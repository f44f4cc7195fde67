"""Stores of version 1 load as they did: the model from config.json, dense tensors under the names of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash
from helpers import UNQUANTIZED, write_tiny_checkpoint

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.errors import StoreError
from qmix.formats import Packed
from qmix.quantize import quantize_checkpoint
from qmix.spec import ExpertKey
from qmix.store import Store, StoreLayout, version1


def as_version1(folder: Path) -> Path:
    """Write the store as qmix 0.1 did: another dense file, another manifest; records stay."""
    with Store.open(folder) as store:
        names = version1.labels(store.model)
        old, new = store.layout, StoreLayout.of(store.model, store.quant, names)
        dtype = store.model.dtype
    data = (folder / "dense.safetensors").read_bytes()
    file = new.files["dense.safetensors"]
    parts = [file.header]
    for name, region in old.dense.items():
        assert new.dense[name].offset == sum(map(len, parts))
        parts.append(data[region.offset:region.offset + region.nbytes])
    (folder / "dense.safetensors").write_bytes(b"".join(parts))
    raw = json.loads((folder / "qmix.json").read_text())
    del raw["model"], raw["alignment"]
    for entry in raw["dense"]:
        entry["offset"] = new.dense[entry["name"]].offset
        entry["name"] = names[entry["name"]]
    raw |= {"format_version": 1, "needs_qmix": "0.1.0", "dtype": dtype}
    (folder / "qmix.json").write_text(json.dumps(raw))
    return folder


def contents(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    with Store.open(folder) as store:
        assert store.verify(deep=True) == []
        for tensor in store.model.tensors():
            value = store.dense(tensor.name)
            parts = value.tensors if isinstance(value, Packed) else {"": value}
            found.update({f"{tensor.name}.{part}": t for part, t in parts.items()})
        for key in store.model.expert_keys:
            record = torch.empty(store.layout.record(key).nbytes, dtype=torch.uint8)
            store.read_record(key, record)
            found[str(key)] = record
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Checkpoint.open(write_tiny_checkpoint(tmp_path / "tiny")) as checkpoint:
        quantize_checkpoint(checkpoint, tmp_path / "store", QuantConfig(), threads=1)
    return tmp_path / "store"


@pytest.mark.parametrize("quant", [QuantConfig(), UNQUANTIZED, QuantConfig(dense="int4")],
                         ids=["int4", "keep", "dense-int4"])
def test_it_holds_the_same(tmp_path: Path, quant: QuantConfig) -> None:
    with Checkpoint.open(write_tiny_checkpoint(tmp_path / "tiny")) as checkpoint:
        quantize_checkpoint(checkpoint, tmp_path / "store", quant, threads=1)
        model = checkpoint.model
    new = contents(tmp_path / "store")
    old = contents(as_version1(tmp_path / "store"))
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in new)
    with Store.open(tmp_path / "store") as store:
        assert store.manifest.version == 1 and store.model == model


def test_its_identity_is_that_of_its_manifest(folder: Path) -> None:
    as_version1(folder)
    with Store.open(folder) as store:
        assert store.identity == xxhash.xxh3_128((folder / "qmix.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(("key", "value", "said"), [
    ("num_hidden_layers", 2_000_000_000, "num_hidden_layers: got 2000000000"),
    ("num_hidden_layers", 4000, "4000 layers"),
    ("hidden_size", "64", "hidden_size: got '64'"), ("model_type", "llama", "model_type: got 'llama'")])
def test_a_config_that_is_not_its_own_is_refused(folder: Path, key: str, value: object, said: str) -> None:
    as_version1(folder)
    config = json.dumps({**json.loads((folder / "config.json").read_text()), key: value})
    (folder / "config.json").write_text(config)
    raw = json.loads((folder / "qmix.json").read_text())
    entry = next(file for file in raw["files"] if file["name"] == "config.json")
    entry.update(bytes=len(config), xxh3_128=xxhash.xxh3_128(config.encode()).hexdigest())
    (folder / "qmix.json").write_text(json.dumps(raw))
    with pytest.raises(StoreError, match=said):
        Store.open(folder)


def test_a_missing_config_or_tensor_is_named(folder: Path) -> None:
    as_version1(folder)
    raw = json.loads((folder / "qmix.json").read_text())
    (folder / "qmix.json").write_text(json.dumps({**raw, "dense": raw["dense"][1:]}))
    with pytest.raises(StoreError, match="embedding"):
        Store.open(folder)
    (folder / "qmix.json").write_text(json.dumps(raw))
    with Store.open(folder) as store:
        assert store.model.expert_keys[5] == ExpertKey(1, 1)
    (folder / "config.json").unlink()
    with pytest.raises(StoreError, match=r"config\.json: missing"):
        Store.open(folder)

"""The store: its files held to the safetensors library and to checksums computed here, its errors to real damage."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import odd_stores
import pytest
import torch
import xxhash
from helpers import UNQUANTIZED, write_tiny_checkpoint
from odd_stores import QUANTS, flip, quantize, read, refused
from safetensors import safe_open
from safetensors.torch import load_file

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey
from qmix.errors import StoreError
from qmix.formats import Packed, unpack
from qmix.store import Manifest, Store, describe

source = pytest.fixture(scope="module")(odd_stores.source)
stores = pytest.fixture(scope="module")(odd_stores.stores)
store = pytest.fixture(odd_stores.store)


@pytest.mark.parametrize("name", QUANTS)
def test_safetensors_reads_every_tensor(stores: dict[str, Path], name: str) -> None:
    folder = stores[name]
    with Store.open(folder) as store:
        for layer in range(2):
            file = load_file(folder / f"experts-{layer:02}.safetensors")
            for e in range(3):
                for matrix, packed in zip(("w13", "w2"), read(store, ExpertKey(layer, e)), strict=True):
                    for tensor, value in packed.tensors.items():
                        found = file.pop(f"layers.{layer}.experts.{e}.{matrix}.{tensor}")
                        assert found.dtype == value.dtype and torch.equal(found, value)
            assert file and all(n.endswith(".pad") and not t.any() for n, t in file.items())
        file = load_file(folder / "dense.safetensors")
        for tensor in store.model.tensors():
            value = store.dense(tensor.name)
            parts = value.tensors if isinstance(value, Packed) else {"": value}
            for part, want in parts.items():
                found = file.pop(f"{tensor.name}.{part}" if part else tensor.name)
                assert found.dtype == want.dtype and torch.equal(found, want)
        assert all(n.endswith(".pad") and not t.any() for n, t in file.items())


@pytest.mark.parametrize("name", QUANTS)
def test_places_are_aligned_and_checksums_are_those_of_the_files(stores: dict[str, Path], name: str) -> None:
    folder = stores[name]
    raw = json.loads((folder / "qmix.json").read_text())
    ends: dict[str, int] = {}
    for entry in raw["records"] + raw["dense"]:
        data = (folder / entry["file"]).read_bytes()
        piece = data[entry["offset"]:entry["offset"] + entry["bytes"]]
        assert xxhash.xxh3_128(piece).hexdigest() == entry["xxh3_128"]
        if entry["file"] not in ends:
            assert entry["offset"] == 8 + int.from_bytes(data[:8], "little")
            assert entry["offset"] % 4096 == 0
        else:
            assert entry["offset"] == ends[entry["file"]]
        assert entry["offset"] % (4096 if "expert" in entry else 64) == 0
        ends[entry["file"]] = entry["offset"] + entry["bytes"]
    assert all(ends[file] == (folder / file).stat().st_size for file in ends)
    for entry in raw["files"]:
        assert xxhash.xxh3_128((folder / entry["name"]).read_bytes()).hexdigest() == entry["xxh3_128"]
    with Store.open(folder) as store:
        for placed in store.layout.kinds[0].placed:
            assert placed.offset % 64 == 0


@pytest.mark.parametrize("name", QUANTS)
def test_errors_in_the_manifest_are_those_of_the_weights(stores: dict[str, Path], source: Path, name: str) -> None:
    def rms(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        lost = sum((unpacked.double() - w.double()).square().sum().item() for unpacked, w in pairs)
        return (lost / sum(w.double().square().sum().item() for _, w in pairs)) ** 0.5

    with Store.open(stores[name]) as store, Checkpoint.open(source) as checkpoint:
        for key in store.model.expert_keys:
            w13, w2 = map(unpack, read(store, key))
            w1, down, w3 = checkpoint.expert(key)
            error = store.manifest.records[key].error
            assert error["w13"] == pytest.approx(rms([(w13, torch.cat([w1, w3]))]), rel=1e-4)
            assert error["w2"] == pytest.approx(rms([(w2, down)]), rel=1e-4)
            assert error["all"] == pytest.approx(rms([(w13, torch.cat([w1, w3])), (w2, down)]), rel=1e-4)
            assert error["all"] == 0 if name == "keep" else 0.02 < error["all"] < 0.15
        for tensor in store.model.tensors():
            value, weight = store.dense(tensor.name), checkpoint.dense(tensor.name)
            error = store.manifest.dense[tensor.name].error
            if isinstance(value, Packed):
                assert error == pytest.approx(rms([(unpack(value), weight)]), rel=1e-4, abs=1e-9)
            else:
                assert torch.equal(value, weight) and error is None


def test_round_trip_of_the_manifest(stores: dict[str, Path]) -> None:
    for folder in stores.values():
        manifest = Manifest.read(folder / "qmix.json")
        assert manifest.to_json() == (folder / "qmix.json").read_bytes()
        assert b"/" not in manifest.to_json()


def test_describe_adds_up(stores: dict[str, Path], source: Path) -> None:
    with Store.open(stores["int4"]) as store, Checkpoint.open(source) as checkpoint:
        found = describe(store)
        weights = sum(row["weights"] for row in found["classes"])
        assert weights * 2 == checkpoint.nbytes and found["parameters"] == weights
        assert found["bytes"] == sum(p.stat().st_size for p in stores["int4"].iterdir())
        assert found["files"] == len(list(stores["int4"].iterdir()))
        assert found["active_parameters"] == weights - 2 * 1 * 3 * 40 * 72
        errors = sorted((r.error["all"] for r in store.manifest.records.values()), reverse=True)
        assert [row["error"] for row in found["worst_experts"]] == errors[:5]
        assert found["classes"][0]["error_max"] == errors[0]
        assert found["source"] == "tiny"
        json.dumps(found)


def test_a_flipped_bit_is_found_when_read_and_by_verify(store: Path) -> None:
    record = json.loads((store / "qmix.json").read_text())["records"][4]
    flip(store / record["file"], record["offset"] + record["bytes"] - 1)  # in the padding, which counts too
    with Store.open(store) as opened:
        assert opened.verify(deep=False) == []
        problems = opened.verify(deep=True)
        assert len(problems) == 1 and "experts-01.safetensors" in problems[0]
        assert "layers.1.experts.1" in problems[0]
        with pytest.raises(StoreError, match=r"experts-01.safetensors: layers.1.experts.1: .*xxh3"):
            read(opened, ExpertKey(1, 1))
        opened.read_record(ExpertKey(1, 1), torch.empty(opened.layout.record_bytes, dtype=torch.uint8), verify=False)
        read(opened, ExpertKey(1, 0))


def test_a_flipped_bit_in_every_dense_tensor_and_copied_file(store: Path) -> None:
    raw = json.loads((store / "qmix.json").read_text())
    for entry in raw["dense"]:
        flip(store / entry["file"], entry["offset"])
    flip(store / "generation_config.json", 5)
    with Store.open(store) as opened:
        seen = []
        problems = opened.verify(True, lambda done, total, label: seen.append((done, total)))
        assert len(problems) == len(raw["dense"]) + 1
        for name in [entry["name"] for entry in raw["dense"]] + ["generation_config.json"]:
            assert any(name in problem for problem in problems)
        with pytest.raises(StoreError, match=r"final_norm"):
            opened.dense("final_norm")
        opened.dense("final_norm", verify=False)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == sum(
        entry["bytes"] for entry in raw["dense"] + raw["records"])


def test_files_cut_while_the_store_is_open(store: Path) -> None:
    with Store.open(store) as opened:
        os.truncate(store / "experts-01.safetensors", 5000)
        os.truncate(store / "dense.safetensors", 4097)
        with pytest.raises(StoreError, match=r"layers.1.experts.0: file ends at byte 5000"):
            read(opened, ExpertKey(1, 0))
        with pytest.raises(StoreError, match="file ends"):
            opened.dense("head")
        problems = opened.verify(deep=True)
    assert any("truncated" in p for p in problems) and any("layers.1.experts.2" in p for p in problems)


def test_a_path_that_is_not_utf8_is_no_damage(stores: dict[str, Path], tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(stores["int4"], odd)
    with Store.open(odd) as opened:
        assert opened.verify(deep=True) == []
    (odd / "dense.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(StoreError, match=r"dense\.safetensors"):
        Store.open(odd)


def test_files_are_closed(stores: dict[str, Path], store: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    with Store.open(stores["keep"]):
        assert opened() == before + 3
    assert opened() == before
    (store / "experts-01.safetensors").unlink()
    refused(store)
    assert opened() == before


def test_a_hundred_and_one_layers_sort(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "deep", num_hidden_layers=101, num_local_experts=1,
                                       num_experts_per_tok=1, hidden_size=8, intermediate_size=8, vocab_size=8,
                                       num_attention_heads=1, num_key_value_heads=1)
    out = quantize(checkpoint, tmp_path / "out", UNQUANTIZED)
    found = sorted(p.name for p in out.glob("experts-*"))
    assert found[0] == "experts-000.safetensors" and found[-1] == "experts-100.safetensors"
    with Store.open(out) as store, safe_open(out / found[100], "pt") as file:
        w13, _ = read(store, ExpertKey(100, 0))
        assert torch.equal(file.get_tensor("layers.100.experts.0.w13.weight"), w13["weight"])


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    out = quantize(write_tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True), tmp_path / "out", UNQUANTIZED)
    with Store.open(out) as store:
        assert "head" not in store.manifest.dense and not re.search('"name": "head', (out / "qmix.json").read_text())


def test_the_dtype_is_that_of_the_weights_whatever_config_says(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "half", dtype=torch.float16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    with Store.open(quantize(folder, tmp_path / "out", UNQUANTIZED)) as store:
        assert store.model.dtype == "float16"
        norm = store.dense("final_norm")
        assert isinstance(norm, torch.Tensor) and norm.dtype == torch.float16

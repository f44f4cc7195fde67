"""The store: its files held to the safetensors library and to checksums computed here, its errors to real
damage, and its manifest to whatever hypothesis makes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from helpers import UNQUANTIZED, write_tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey, QuantConfig
from qmix.errors import StoreError, UsageError
from qmix.formats import Packed, unpack
from qmix.quantize import quantize_checkpoint
from qmix.store import Manifest, Store, describe

NO_INT4 = {"method": "", "group_size": 0, "block": 0}
QUANTS = {
    "int4": QuantConfig(method="rtn"),
    "small": QuantConfig(method="rtn", dense="int4", group_size=32, block=32),
    "nf4": QuantConfig("nf4", "bf16", double_quant=True, **NO_INT4),
    "keep": UNQUANTIZED,
}
# 3 experts of 72 x 40: no size is a multiple of a block, a group or an alignment, so that pads are needed everywhere.
ODD = {"hidden_size": 40, "intermediate_size": 72, "num_local_experts": 3, "num_hidden_layers": 2,
       "vocab_size": 51, "head_dim": 10}


def quantize(checkpoint: Path, out: Path, quant: QuantConfig) -> Path:
    with Checkpoint.open(checkpoint) as source:
        quantize_checkpoint(source, out, quant, threads=1)
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("store") / "tiny", seed=3, **ODD)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


@pytest.fixture(scope="module")
def stores(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return {name: quantize(source, folder / name, quant) for name, quant in QUANTS.items()}


@pytest.fixture
def store(stores: dict[str, Path], tmp_path: Path) -> Path:
    """An int4 store that a test may damage."""
    return Path(shutil.copytree(stores["int4"], tmp_path / "store"))


def refused(path: Path) -> StoreError:
    with pytest.raises(StoreError) as error:
        Store.open(path)
    assert error.value.cure and "\n" not in error.value.message
    return error.value


def read(store: Store, key: ExpertKey) -> tuple[Packed, Packed]:
    buffer = torch.full((store.layout.record_bytes,), 255, dtype=torch.uint8)
    store.read_record(key, buffer)
    return store.expert(key, buffer)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change qmix.json."""
    raw = json.loads((path / "qmix.json").read_text())
    change(raw)
    (path / "qmix.json").write_text(json.dumps(raw))


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

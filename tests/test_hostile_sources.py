"""Sources that change, lead elsewhere, hold nothing but zeros, or say that they are larger than any."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers import UNQUANTIZED, tiny_config, tiny_tensors, write_checkpoint, write_tiny_checkpoint
from odd_stores import QUANTS, quantize
from tokenizer_files import demo_folder

from qmix import shards
from qmix.checkpoint import SINGLE, Checkpoint
from qmix.config import QuantConfig
from qmix.engine import load
from qmix.errors import CheckpointError, QmixError
from qmix.models.registry import read_model
from qmix.quantize import quantize_checkpoint
from qmix.store import Store


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- a file replaced while it is read ---

@pytest.mark.parametrize("how", ["by rename", "in place"])
def test_replaced_between_its_opening_and_its_header(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header of one file and the bytes of another would be weights in the wrong places."""
    path, other = write_tiny_checkpoint(tmp_path / "a"), write_tiny_checkpoint(tmp_path / "b", seed=1)
    read = shards.read_header

    def replaced(name: Path, error: type[CheckpointError]) -> object:
        if how == "by rename":
            shutil.copy(other / SINGLE, tmp_path / "new")
            (tmp_path / "new").replace(name)
        else:
            name.write_bytes((other / SINGLE).read_bytes())
            os.utime(name, ns=(1, 1))
        return read(name, error)

    monkeypatch.setattr(shards, "read_header", replaced)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was being read") as caught:
        Checkpoint.open(path)
    assert caught.value.cure


def test_renamed_over_while_it_is_quantized(tmp_path: Path) -> None:
    """What was opened is read to its end; a run that broke off takes nothing over from the other one."""
    path, other = write_tiny_checkpoint(tmp_path / "a"), write_tiny_checkpoint(tmp_path / "b", seed=1)
    quant = QUANTS["int4"]
    whole = [files(quantize(folder, tmp_path / f"{folder.name}-store", quant)) for folder in (path, other)]
    began = []

    def progress(done: int, total: int, label: str) -> None:
        if not began:
            began.append(shutil.copy(other / SINGLE, tmp_path / "new"))
            (tmp_path / "new").replace(path / SINGLE)

    with Checkpoint.open(path) as source:
        quantize_checkpoint(source, tmp_path / "out", quant, threads=1, progress=progress)
    found = files(tmp_path / "out")
    assert began and {name: data for name, data in found.items() if name != "qmix.json"} == {
        name: data for name, data in whole[0].items() if name != "qmix.json"} != whole[1]


# --- links ---

def test_a_link_to_a_strangers_file_is_not_copied(tmp_path: Path) -> None:
    secret = tmp_path / "home" / ".ssh" / "id_rsa"
    secret.parent.mkdir(parents=True)
    secret.write_text("SECRET")
    path = write_tiny_checkpoint(tmp_path / "c")
    for name in ("chat_template.jinja", "merges.txt", "additional_chat_templates/tool_use.jinja"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).symlink_to(secret)
        with pytest.raises(CheckpointError, match=r"a link to .*id_rsa") as caught:
            quantize(path, tmp_path / "out", QUANTS["int4"])
        assert "copy that file" in str(caught.value.cure) and not (tmp_path / "out").exists()
        (path / name).unlink()


def test_links_that_people_and_the_hub_set_are_followed(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "c")
    far = tmp_path / "far"
    shutil.copytree(path, far)
    (far / "chat_template.jinja").write_text("{{ 1 }}")
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    blob.write_text('{"eos_token_id": 2}')
    for name in ("config.json", SINGLE):  # all but one file of another folder
        (path / name).unlink()
        (path / name).symlink_to(far / name)
    (path / "generation_config.json").symlink_to(blob)
    (path / "mine.jinja").write_text("{{ 2 }}")
    (path / "chat_template.jinja").symlink_to("mine.jinja")
    store = quantize(path, tmp_path / "out", QUANTS["int4"])
    assert (store / "chat_template.jinja").read_text() == "{{ 2 }}" and not (store / "config.json").is_symlink()
    assert (store / "generation_config.json").read_text() == blob.read_text()


# --- zeros ---

PLAIN = {"method": "", "group_size": 0, "block": 0}
ALL = {"hqq": QuantConfig(), "rtn": QUANTS["int4"], "int2": QuantConfig("int2", "int4"), "nf4": QUANTS["nf4"],
       "int8": QuantConfig("int8", **PLAIN), "q8_0": QuantConfig("q8_0", "q8_0", **PLAIN), "keep": UNQUANTIZED}


@pytest.mark.parametrize("quant", ALL.values(), ids=ALL)
def test_all_weights_zero(quant: QuantConfig, tmp_path: Path) -> None:
    """No division by a scale or a norm of nothing: the store is whole, and every logit is zero."""
    raw = tiny_config(hidden_size=256, intermediate_size=256, vocab_size=512)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tiny_tensors(read_model(raw)).items()}
    path = write_checkpoint(demo_folder(tmp_path / "source"), raw, tensors)
    with Checkpoint.open(path) as source:
        quantize_checkpoint(source, tmp_path / "out", quant, threads=1)
    with Store.open(tmp_path / "out") as store:
        assert all(value == 0 for record in store.manifest.records.values() for value in record.error.values())
        assert all(dense.error in (None, 0) for dense in store.manifest.dense.values())
    with load(tmp_path / "out", context=64, scoring=True) as engine:
        assert all(torch.equal(logits, torch.zeros_like(logits)) for logits in engine.session().read([1, 2, 3]))


# --- absurd sizes ---

@pytest.mark.parametrize(("key", "value"), [("num_local_experts", 10**9), ("num_hidden_layers", 10**9),
                                            ("num_local_experts", 4096), ("hidden_size", 10**9),
                                            ("vocab_size", 10**18), ("intermediate_size", 2**62)])
def test_a_config_of_absurd_size_costs_nothing(key: str, value: int, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, key: value}))
    tracemalloc.start()
    with pytest.raises(QmixError) as caught:
        Checkpoint.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 3 layers of 4096 experts are as many names of tensors; nothing else may take memory.
    assert caught.value.exit_code in (2, 4) and peak < 64 * 2**20, (caught.value, peak)


@pytest.mark.parametrize(("length", "said"), [(100 * 2**20 + 1, "header of 104857601 bytes"),
                                              (100 * 2**20, "not JSON")])
def test_a_header_of_a_hundred_megabytes(length: int, said: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    with open(path / SINGLE, "wb") as file:
        file.write(struct.pack("<Q", length) + b"{" + b" " * 2**20)
        file.truncate(8 + length + 8)  # the rest is a hole
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(path)


def test_a_padded_header_is_read(tmp_path: Path) -> None:
    """Spaces behind the header are no damage, however many."""
    path = write_tiny_checkpoint(tmp_path)
    raw = (path / SINGLE).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    head = raw[8:8 + length].ljust(20 * 2**20)
    (path / SINGLE).write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + length:])
    with Checkpoint.open(path) as source:
        assert source.dense("head").numel()

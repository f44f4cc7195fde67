"""Stores of a model whose sizes fit nothing, which test_store.py and test_store_manifest.py read, damage and edit. Each
of them makes fixtures of source, stores and store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import UNQUANTIZED, write_tiny_checkpoint

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey, QuantConfig
from qmix.errors import StoreError
from qmix.formats import Packed
from qmix.quantize import quantize_checkpoint
from qmix.store import Store

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


def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("store") / "tiny", seed=3, **ODD)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


def stores(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return {name: quantize(source, folder / name, quant) for name, quant in QUANTS.items()}


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

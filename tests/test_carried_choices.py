"""Quantized GGUF files whose matrices cannot all stay as they are, in the formats that a store gets instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")
import gguf
import numpy as np
from carried_files import matrices, write
from test_architectures import logits, paged
from test_cli import qmix

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.engine import load
from qmix.errors import ConfigError
from qmix.formats import unpack
from qmix.quantize import quantize_checkpoint
from qmix.quantize.carried import carry_all
from qmix.store import Store


def mixture(name: str) -> str:
    """Types that no store has, alone and beside one that stores have."""
    if "ffn_up" in name and "blk.1." in name:
        return "Q6_K"
    if "ffn_gate" in name and "blk.1." in name:
        return "Q3_K"
    if "ffn_down" in name or "attn_q" in name:
        return "Q3_K"
    return "Q4_K"


def test_what_cannot_stay_gets_at_least_a_bit_more(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "mixtral", mixture)
    ran = qmix("quantize", path, tmp_path / "store", "--threads", 1, "--method", "rtn")
    assert ran.returncode == 0, ran.stderr
    said = " ".join(ran.stderr.split())
    assert "12 matrices in Q3_K are quantized again as int4g64" in said
    assert "4 matrices in Q3_K and Q6_K, gate and up of different types, are quantized again as q8_0" in said
    assert "3 Q3_K are quantized again as --dense says" in said
    there = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
             for tensor in gguf.GGUFReader(path).tensors if "_exps" in tensor.name}
    with Store.open(tmp_path / "store") as store:
        assert store.verify(deep=True) == []
        for (name, expert), m in matrices(store).items():
            exact = there[name][expert]
            if "gate" in name:
                exact = np.concatenate((exact, there[name.replace("gate", "up")][expert]))
            off = np.linalg.norm(unpack(m).numpy() - exact) / np.linalg.norm(exact)
            layer = name.split(".")[1]
            assert m.spec.format == ("int4" if "down" in name else "q8_0" if layer == "1" else "q4_k")
            assert off == 0 if m.spec.format == "q4_k" else 0 < off < (0.02 if m.spec.format == "q8_0" else 0.15)
        errors = [r.error for key, r in store.manifest.records.items() if key.layer == 0]
        assert all(e["w13"] == 0 < e["all"] < e["w2"] for e in errors)  # carried weights count in the whole
    with load(tmp_path / "store", threads=1, context=64) as engine:
        resident = logits(engine)
    with paged(tmp_path / "store") as engine:
        assert torch.equal(logits(engine), resident)


def test_unquantized_experts_in_a_quantized_file(tmp_path: Path) -> None:
    """q8_0 is the most that they get, and the line says so; --format q8_0 says what it keeps."""
    types = {"ffn_gate": "Q8_0", "ffn_up": "Q3_K", "ffn_down": "F32"}

    def type_of(name: str) -> str:
        return next((kind for part, kind in types.items() if part in name), "Q8_0" if "attn_q" in name else "F32")

    path = write(tmp_path / "m.gguf", "mixtral", type_of)
    said = " ".join(qmix("quantize", path, tmp_path / "out", "--dry-run").stderr.split())
    assert "matrices in F32 are quantized as q8_0, the most that a mix has" in said
    assert "in Q8_0 and Q3_K, gate and up of different types, are quantized again as q8_0, the most that" in said
    assert "F32 are stored as --dense says" in said
    for dense, kept in (("q8_0", "3 of 15 matrices are in the format asked for and stay so"),
                        ("int8", "(Q3_K, Q8_0); they are read as")):
        said = " ".join(qmix("quantize", path, tmp_path / "out", "--format", "q8_0", "--dense", dense,
                             "--dry-run").stderr.split())
        assert kept in said and "adds to their error" in said


def test_a_half_carried_expert_is_summed_by_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its carried half is never decoded whole."""
    path = write(tmp_path / "m.gguf", "mixtral", mixture)
    monkeypatch.setattr("qmix.formats.unpack", None)  # calling it would fail
    with Checkpoint.open(path) as checkpoint:
        quantize_checkpoint(checkpoint, tmp_path / "out", carry_all(checkpoint, QuantConfig(method="rtn"), None))


def test_q8_0_from_unquantized_weights(tmp_path: Path) -> None:
    """--format q8_0 carries Q8_0, says so, and quantizes what is not quantized."""
    path = write(tmp_path / "m.gguf", "mixtral", lambda name: "Q8_0" if "_exps" in name else "F32")
    made = qmix("quantize", path, tmp_path / "a", "--format", "q8_0", "--dense", "q8_0")
    assert made.returncode == 0
    said = " ".join(made.stderr.split())
    assert "matrices are in the format asked for and stay as they are" in said and "adds to" not in said
    with Store.open(tmp_path / "a") as store:
        assert store.quant.experts == "q8_0" and all(r.error["all"] == 0 for r in store.manifest.records.values())
        assert all(0 < d.error < 0.01 for d in store.manifest.dense.values() if d.error is not None)
    with load(tmp_path / "a", threads=1, context=64) as engine:
        assert torch.isfinite(logits(engine)).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_a_scale_that_is_no_number_is_refused(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "mixtral", lambda name: kind)
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down_exps.weight")
    nbytes = gguf.GGML_QUANT_SIZES[found.tensor_type][1]
    with open(path, "r+b") as file:
        file.seek(found.data_offset + 7 * nbytes + {"Q6_K": 208}.get(kind, 0))
        file.write(b"\x00\x7c")
    ran = qmix("quantize", path, tmp_path / "out", "--threads", 1)
    assert ran.returncode == 4 and "blk.1.ffn_down_exps.weight: holds a scale that is not a number" in " ".join(
        ran.stderr.split()), ran.stderr


def test_experts_in_mxfp4_beside_matrices_in_q8_0(tmp_path: Path) -> None:
    """As gpt-oss's GGUF files are published: nothing is quantized again."""
    path = write(tmp_path / "m.gguf", "gpt_oss", lambda name: "MXFP4" if "_exps" in name else "Q8_0")
    ran = qmix("quantize", path, tmp_path / "store", "--threads", 1)
    said = " ".join(ran.stderr.split())
    assert ran.returncode == 0 and "kept bit for bit: 10 q8_0" in said and "again" not in said, said
    with Store.open(tmp_path / "store") as store:
        assert store.quant.experts == "mxfp4" and store.verify(deep=True) == []
        assert {d.format for d in store.manifest.dense.values()} == {"q8_0", "plain"}
        assert all(not d.error for d in store.manifest.dense.values())
    with load(tmp_path / "store", threads=1, context=64) as engine:
        resident = logits(engine)
    with paged(tmp_path / "store") as engine:
        assert torch.equal(logits(engine), resident)
    assert "kept bit for bit: 10 q8_0" in " ".join(qmix("plan", path, "--ram", "4G").stderr.split())


def test_a_config_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="q4_x"):
        QuantConfig("mixed", kinds=(("q4_x", "q4_k"),), mix=("0",), method="", group_size=0, block=0)
    with pytest.raises(ConfigError, match="method"):
        QuantConfig("mixed", kinds=(("q4_k", "q4_k"),), mix=("0",))
    with pytest.raises(ConfigError, match="dense_formats"):
        QuantConfig(dense_formats=(("head", "int4"),))
    with pytest.raises(ConfigError, match="each tensor once"):
        QuantConfig(dense_formats=(("head", "q4_k"), ("head", "q6_k")))
    with pytest.raises(ConfigError, match="format"):
        QuantConfig("q4_k", method="", group_size=0, block=0)

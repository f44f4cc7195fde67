"""A multi-token-prediction head on its way into a store: killed and resumed, calibrated, left out, named; its plan from
a config.json alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FIRST
from model_configs import with_keys
from mtp_models import add_tensors, write_with_head
from quantize_jobs import Stop, files, run, stop_after
from safetensors.torch import load_file, save_file
from test_cli import qmix
from test_mtp import IDS

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey, QuantConfig
from qmix.engine import load
from qmix.errors import CheckpointError, ConfigError
from qmix.formats import unpack
from qmix.models import read_model
from qmix.quantize.calibration import Calibration
from qmix.spec.json import from_json, to_json
from qmix.store import Store

RTN = QuantConfig(method="rtn")
GPTQ = QuantConfig(dense="int4", method="gptq", group_size=32, block=32)
TEXT = Calibration(torch.randint(3, 128, (11, 40), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5_moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtp") / "source"
    return write_with_head(FIRST[request.param], folder, request.param == "qwen3_next", torch.bfloat16)[1]


@pytest.mark.parametrize("quant", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_a_broken_run_resumes_to_the_same_bytes(source: Path, tmp_path: Path, quant: QuantConfig) -> None:
    """Also in the middle of the head, which comes last; the text that calibrates the model does not reach it."""
    text = TEXT if quant is GPTQ else None
    report = run(source, tmp_path / "whole", quant, calibration=text)
    whole, last = files(tmp_path / "whole"), report.regions
    for regions in (5, last - 3):
        out = tmp_path / f"resumed {regions}"
        with pytest.raises(Stop):
            run(source, out, quant, calibration=text, progress=stop_after(regions))
        again = run(source, out, quant, calibration=text)
        assert 0 < again.resumed < again.regions and files(out) == whole
    with Store.open(tmp_path / "whole") as store, Checkpoint.open(source) as checkpoint:
        model, head = store.model, checkpoint.model.num_layers
        assert model == checkpoint.model and model.mtp_head is not None
        assert {"experts-00.safetensors", f"experts-{head:02}.safetensors"} <= whole.keys()
        assert store.verify(deep=True) == []
        records = [r for r in store.manifest.records.values() if r.key.layer == head]
        assert len(records) == 8 and all(0 < r.error["all"] < 0.2 for r in records)
        if quant is GPTQ:
            assert {r.calibrated and (r.calibrated.method, r.calibrated.tokens) for r in records} == {("hqq", 0)}
            assert any(r.calibrated and r.calibrated.method == "gptq" for r in store.manifest.records.values())
        key = ExpertKey(head, 3)
        w1, w2, w3 = checkpoint.expert(key)
        buffer = torch.empty(store.layout.records[key].nbytes, dtype=torch.uint8)
        store.read_record(key, buffer)
        for got, want in zip(store.expert(key, buffer), (torch.cat((w1, w3)), w2), strict=True):
            assert (unpack(got).float() - want.float()).norm() < 0.2 * want.float().norm()


JOB = """
import sys
from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.quantize import quantize_checkpoint
import os, signal
left = [int(sys.argv[3])]
def progress(done, total, label):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
with Checkpoint.open(sys.argv[1]) as checkpoint:
    quantize_checkpoint(checkpoint, sys.argv[2], QuantConfig(method="rtn"), threads=1, progress=progress)
"""


def test_a_killed_run_resumes_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "whole", RTN)
    dead = subprocess.run([sys.executable, "-c", JOB, source, tmp_path / "out", str(report.regions - 4)], check=False)
    assert dead.returncode == -signal.SIGKILL
    assert run(source, tmp_path / "out", RTN).resumed > 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_store_without_it_is_the_store_of_a_checkpoint_without_it(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in source.iterdir():
        if file.name == "model.safetensors":
            tensors = {name: t for name, t in load_file(file).items() if not name.startswith("mtp.")}
            save_file(tensors, bare / file.name, {"format": "pt"})
        else:
            (bare / file.name).write_bytes(file.read_bytes())
    done = qmix("quantize", source, tmp_path / "without", "--no-mtp", "--method", "rtn")
    assert done.returncode == 0 and "tensors of a multi-token-prediction head, which is left out)" in done.stderr
    done = qmix("quantize", bare, tmp_path / "none", "--method", "rtn")
    assert done.returncode == 0 and "head" not in done.stderr.replace("output head", "").replace("and head", "")
    got, want = files(tmp_path / "without"), files(tmp_path / "none")
    del got["qmix.json"], want["qmix.json"]  # which name their sources
    assert got == want
    with load(tmp_path / "without", threads=1, context=64, mtp=True) as engine:
        session = engine.session()
        session.prefill(IDS[:9])
        assert session.mtp is None and session.draft(5, 2) == []
    done = qmix("show", tmp_path / "without", "--json")
    assert "mtp_layers" not in json.loads(done.stdout)


def test_a_mix_has_none(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the fox and the dog and the cat " * 200)
    done = qmix("quantize", source, tmp_path / "out", "--bpw", "7", "--calibration", text, "--calibration-tokens",
                "256", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "tensors of a multi-token-prediction head, which is left out)" in done.stderr
    with Store.open(tmp_path / "out") as store:
        quant = store.quant
        assert store.model.mtp_head is None and quant.experts == "mixed"
    with Checkpoint.open(source) as checkpoint, pytest.raises(ConfigError, match=r"mix: got .* want .*one without"):
        quant.check_model(checkpoint.model)


def test_heads_that_qmix_does_not_know_are_skipped_and_named(tmp_path: Path) -> None:
    """Two layers, or an embedding of its own; and a head with a tensor missing is a damaged checkpoint."""
    raw = FIRST["qwen3_5_moe"]
    _, source = write_with_head(raw, tmp_path / "source")
    with Checkpoint.open(source) as checkpoint:
        assert checkpoint.model.mtp_head is not None and checkpoint.skipped == ()
    add_tensors(source, {"mtp.embed_tokens.weight": torch.ones(512, 64)})
    with Checkpoint.open(source) as checkpoint:
        assert checkpoint.model.mtp_head is None and not checkpoint.has_mtp_head
        assert {name.split(".")[0] for name in checkpoint.skipped} == {"mtp"}
    done = qmix("quantize", source, tmp_path / "out", "--dry-run")
    assert "tensors of a multi-token-prediction head, which qmix does not use)" in done.stderr
    file = source / "model.safetensors"
    tensors = load_file(file)
    del tensors["mtp.embed_tokens.weight"], tensors["mtp.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mtp\.layers\.0\.self_attn\.k_proj\.weight: missing") as error:
        Checkpoint.open(source)
    assert "--no-mtp" in str(error.value.cure)
    done = qmix("quantize", source, tmp_path / "out", "--method", "rtn", "--no-mtp")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe"])
def test_a_plan_counts_it_from_the_config_alone(kind: str, tmp_path: Path) -> None:
    """That of Qwen3-Next says nothing of a head, but where a key of others is added."""
    extra: Mapping[str, Any] = {"mtp_num_hidden_layers": 1} if kind == "qwen3_5_moe" else {
        "num_nextn_predict_layers": 1}
    raw, found = with_keys(FIRST[kind], extra), {}
    for name, config in (("with", raw), ("without", FIRST[kind])):
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(config)))
        done = qmix("plan", tmp_path / f"{name}.json", "--ram", "1G", "--json")
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)
    assert found["with"]["mtp_records"] == 8 and "mtp_records" not in found["without"]
    assert found["with"]["records"] == found["without"]["records"] + 8
    model = read_model(raw)
    assert from_json(json.loads(json.dumps(to_json(model)))) == model
    done = qmix("plan", tmp_path / "with.json", "--ram", "1G", "--vram", "2G", "--json")
    assert "mtp_records" not in json.loads(done.stdout)
    assert "without the multi-token-prediction head, which a GPU does not compute yet" in done.stderr


def test_the_reference_of_an_evaluation_goes_without(source: Path) -> None:
    with Checkpoint.open(source, mtp=False) as checkpoint:
        assert checkpoint.model.mtp_head is None
        assert checkpoint.nbytes == sum(t.nbytes for name, t in load_file(source / "model.safetensors").items()
                                        if not name.startswith("mtp."))

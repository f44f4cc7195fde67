"""What is fetched from the hub: a server that speaks its protocol, and real commands that ask it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import UNQUANTIZED
from hub_server import COMMIT, WASTE, Served, repository, weights
from test_consolidated import write as write_consolidated
from warm_python import WarmPython

from qmix import hub, modelfiles
from qmix.checkpoint import INDEX, SINGLE, Checkpoint
from qmix.errors import CheckpointError
from qmix.hub.private import claimed, drop_unused, private_folder
from qmix.quantize import quantize_checkpoint

Command = Callable[..., subprocess.CompletedProcess[str]]
KEEP = ("--format", "keep", "--dense", "keep", "-t", "1")
Server = Callable[[Path], tuple[dict[str, str], list[str]]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Server]:
    """serve(folder) -> (environment of a command that asks this hub, names of the files fetched)."""
    servers: list[Served] = []

    def start(folder: Path) -> tuple[dict[str, str], list[str]]:
        servers.append(Served(folder, tmp_path / "cache"))
        return servers[-1].env, servers[-1].fetched

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def qmix(warm_python: WarmPython) -> Command:
    return lambda env, *args: warm_python.run("-m", "qmix", *args, env=env, cwd=Path(env["HF_HOME"]).parent)


@pytest.mark.parametrize("shards", [1, 2])
def test_only_what_the_index_names_is_fetched(serve: Server, qmix: Command, tmp_path: Path,
                                                    shards: int) -> None:
    path = repository(tmp_path / "repo", shards)
    want = [SINGLE] if shards == 1 else [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    env, fetched = serve(path)
    done = qmix(env, "quantize", "org/name", "out", "--format", "keep", "-t", 1)
    assert done.returncode == 0, done.stderr
    assert weights(fetched) == want and not {*fetched} & {*WASTE}
    assert {"config.json", "tokenizer.model", "tokenizer_config.json", "chat_template.json"} <= {*fetched}
    manifest = json.loads((tmp_path / "out" / "qmix.json").read_text())
    assert (manifest["source"]["name"], manifest["source"]["revision"]) == ("org/name", COMMIT)
    before = len(fetched)
    again = qmix(env, "quantize", f"org/name@{COMMIT}", "out2", "--format", "keep", "-t", 1)
    assert again.returncode == 0 and len(fetched) == before, "what is in the cache is not fetched again"


def test_a_repository_in_mistral_s_own_layout_alone(serve: Server, qmix: Command, tmp_path: Path) -> None:
    """Two files of weights, and a tokenizer under the name that it has there."""
    write_consolidated(tmp_path / "repo", "mixtral", shards=2)
    env, fetched = serve(tmp_path / "repo")
    done = qmix(env, "show", "org/name")
    assert done.returncode == 2 and "qmix quantize org/name name-int4" in done.stderr and weights(fetched) == []
    done = qmix(env, "plan", "org/name")
    assert done.returncode == 4 and "planned when its weights are here" in done.stderr and weights(fetched) == []
    done = qmix(env, "quantize", "org/name", "out", *KEEP)
    assert done.returncode == 0 and "tokenizer.model.v3: read as tokenizer.model" in done.stderr, done.stderr
    assert weights(fetched) == [f"consolidated-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert qmix(env, "quantize", tmp_path / "repo", "want", *KEEP).returncode == 0
    for path in (tmp_path / "want").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    fetched.clear()
    assert qmix(env, "quantize", "org/name", "again", "--offline", "--dry-run", *KEEP).returncode == 0
    assert qmix(env, "plan", "org/name").returncode == 0
    assert weights(fetched) == []


def test_a_params_json_that_qmix_does_not_read_fetches_nothing(serve: Server, qmix: Command, tmp_path: Path) -> None:
    write_consolidated(tmp_path / "repo", "mixtral", change=lambda params: params.update(quantization={"q": "fp8"}))
    env, fetched = serve(tmp_path / "repo")
    done = qmix(env, "quantize", "org/name", "out")
    assert done.returncode == 4 and "params.json: quantization: got" in done.stderr and not weights(fetched)


def test_a_stale_index_of_a_repository(serve: Server, qmix: Command, tmp_path: Path) -> None:
    path = repository(tmp_path / "repo")
    (path / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    env, fetched = serve(path)
    done = qmix(env, "quantize", "org/name", "out", "--format", "keep", "-t", 1)
    assert done.returncode == 0 and weights(fetched) == [SINGLE], done.stderr
    assert f"skipped: {INDEX}" in done.stderr


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "original/model.safetensors", "*", 3])
def test_an_index_that_leads_elsewhere_fetches_nothing(serve: Server, qmix: Command, tmp_path: Path,
                                                         name: Any) -> None:
    path = repository(tmp_path / "repo")
    (path / SINGLE).unlink()
    (path / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    env, fetched = serve(path)
    done = qmix(env, "quantize", "org/name", "out", "-t", 1)
    assert done.returncode == 4 and "weight_map.x" in done.stderr and weights(fetched) == [], done.stderr


def test_a_repository_of_pickles(serve: Server, qmix: Command, tmp_path: Path) -> None:
    path = repository(tmp_path / "repo")
    (path / SINGLE).unlink()
    env, fetched = serve(path)
    done = qmix(env, "quantize", "org/name", "out", "-t", 1)
    assert done.returncode == 4 and "no safetensors weights" in done.stderr and weights(fetched) == []


@pytest.mark.parametrize("said", [{"quant_method": "hqq", "bits": 4}, {"quant_method": "mxfp4"}])
def test_a_quantized_repository_is_refused_before_its_weights_are_fetched(
        serve: Server, qmix: Command, tmp_path: Path, said: dict[str, Any]) -> None:
    path = repository(tmp_path / "repo")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    env, fetched = serve(path)
    done = qmix(env, "quantize", "org/name", "out", "-t", 1)
    assert done.returncode == 4 and f"quantized already, as {said['quant_method']}" in done.stderr, done.stderr
    assert "config.json" in fetched and weights(fetched) == []


def test_what_modelopts_own_file_says_is_read_before_weights_are_fetched(serve: Server, qmix: Command,
                                                                         tmp_path: Path) -> None:
    path = repository(tmp_path / "repo")
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    env, fetched = serve(path)
    done = qmix(env, "quantize", "org/name", "out", "-t", 1)
    assert done.returncode == 4 and "W4A8_AWQ" in done.stderr and weights(fetched) == [], done.stderr


def test_pickled_weights_that_an_index_names_are_not_fetched(serve: Server, qmix: Command, tmp_path: Path) -> None:
    path = repository(tmp_path / "repo")
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE, "b": "pytorch_model.bin"}}))
    (path / "pytorch_model.bin").write_bytes(b"x")
    env, fetched = serve(path)
    done = qmix(env, "quantize", "org/name", "out", "-t", 1)
    assert done.returncode == 4 and "pytorch_model.bin" in done.stderr, done.stderr
    assert weights(fetched) == [] and "pytorch_model.bin" not in fetched


def test_a_private_folder_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container under any uid: whoever needs none goes on."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "~no-such-user-of-qmix/hub")
    assert private_folder("org/name") is None and drop_unused("org/name") == 0
    with pytest.raises(CheckpointError, match="no home folder") as error, claimed("org/name"):
        pass
    assert "HF_HOME" in (error.value.cure or "")


def test_a_disk_that_is_too_small_is_found_before_a_weight_is_fetched(
        serve: Server, tmp_path: Path) -> None:
    """In a process of its own from the start, for sitecustomize.py."""
    path = repository(tmp_path / "repo")
    env, fetched = serve(path)
    (tmp_path / "sitecustomize.py").write_text(
        "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)\n")
    done = subprocess.run([sys.executable, "-m", "qmix", "quantize", "org/name", "out", "-t", "1"], text=True,
                          env={**env, "PYTHONPATH": str(tmp_path)}, capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 3 and "short of" in done.stderr and "HF_HOME" in done.stderr, done.stderr
    assert weights(fetched) == []


def test_a_store_of_the_hub_and_a_checkpoint_that_is_none(serve: Server, qmix: Command, tmp_path: Path) -> None:
    source = repository(tmp_path / "repo")
    env, fetched = serve(source)
    done = qmix(env, "show", "org/name")
    assert done.returncode == 2 and "qmix quantize org/name name-int4" in done.stderr and weights(fetched) == []
    with Checkpoint.open(source) as opened:
        quantize_checkpoint(opened, tmp_path / "store", UNQUANTIZED, threads=1)
    (tmp_path / "store" / "original").mkdir()
    (tmp_path / "store" / "original" / "model.safetensors").write_bytes(b"waste")
    env, fetched = serve(tmp_path / "store")
    env["HF_HOME"] = str(tmp_path / "other")
    done = qmix(env, "verify", "org/name", "--deep")
    assert done.returncode == 0, done.stderr
    assert weights(fetched) == ["dense.safetensors", *(f"experts-0{i}.safetensors" for i in range(3))]


def test_planning_needs_the_config_alone(serve: Server, qmix: Command, tmp_path: Path) -> None:
    env, fetched = serve(repository(tmp_path / "repo"))
    done = qmix(env, "plan", "org/name")
    assert done.returncode == 0 and fetched == ["config.json"], done.stderr


def test_an_absent_repository_is_one_line(serve: Server, qmix: Command, tmp_path: Path) -> None:
    env, _ = serve(repository(tmp_path / "repo"))
    done = qmix(env, "quantize", "org/other", "out")
    assert done.returncode == 4 and "org/other: the hub did not deliver it" in done.stderr
    assert "Traceback" not in done.stderr
    done = qmix({**env, "HF_ENDPOINT": "http://127.0.0.1:9"}, "quantize", "org/absent", "out")
    assert done.returncode == 4 and "the hub did not deliver it" in done.stderr and "Traceback" not in done.stderr


def test_every_file_that_a_store_copies_is_fetched() -> None:
    assert {*modelfiles.FILES, INDEX, SINGLE, "config.json"} <= {*hub.FILES, hub.SINGLE}
    assert (hub.INDEX, hub.SINGLE) == (INDEX, SINGLE)
    assert not any("*" in name or "/" in name for name in hub.FILES)

"""What is fetched from the hub: a server that speaks its protocol, and real commands that ask it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from helpers import UNQUANTIZED, write_tiny_checkpoint
from tokenizer_files import demo_folder
from warm_python import WarmPython

from qmix import hub, modelfiles
from qmix.checkpoint import INDEX, SINGLE, Checkpoint
from qmix.quantize import quantize_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WASTE = ("consolidated.safetensors", "original/model.safetensors", "onnx/model.safetensors", "pytorch_model.bin",
         "checkpoint-500/optimizer.safetensors", "checkpoint-500/config.json", "model.fp16.safetensors", "README.md")
Command = Callable[..., subprocess.CompletedProcess[str]]
Server = Callable[[Path], tuple[dict[str, str], list[str]]]


class Hub(BaseHTTPRequestHandler):
    """One repository, org/name, in a folder; `fetched` gets the files whose bytes are asked for."""

    folder: Path
    fetched: list[str]
    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        files = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if p.is_file()}
        if path.startswith("/api/models/org/name/tree/"):
            rows = [{"type": "file", "path": name, "size": p.stat().st_size, "oid": oid(p)}
                    for name, p in files.items()]
            self.answer(json.dumps(rows).encode(), **{"Content-Type": "application/json"})
        elif path.startswith("/api/models/org/name"):
            rows = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": rows}).encode(),
                        **{"Content-Type": "application/json"})
        elif (name := path.removeprefix(f"/org/name/resolve/{COMMIT}/")) in files:
            if self.command == "GET":
                self.fetched.append(name)
            self.answer(files[name].read_bytes(), ETag=f'"{oid(files[name])}"')
        else:
            self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Server]:
    """serve(folder) -> (environment of a command that asks this hub, names of the files fetched)."""
    servers = []

    def start(folder: Path) -> tuple[dict[str, str], list[str]]:
        fetched: list[str] = []
        handler = type("Handler", (Hub,), {"folder": folder, "fetched": fetched})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        return {**clean, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}, fetched

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def qmix(warm_python: WarmPython) -> Command:
    return lambda env, *args: warm_python.run("-m", "qmix", *args, env=env, cwd=Path(env["HF_HOME"]).parent)


def repository(path: Path, shards: int = 1) -> Path:
    """A checkpoint with a tokenizer, and all that a repository may hold besides."""
    write_tiny_checkpoint(path, shards=shards, vocab_size=512)
    demo_folder(path / "tokenizer")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (path / "tokenizer" / name).rename(path / name)
    (path / "tokenizer" / "config.json").unlink()
    (path / "chat_template.json").write_text('{"chat_template": "x"}')
    for name in WASTE:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"waste")
    return path


def weights(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors"))


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

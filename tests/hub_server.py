"""A server on this machine that speaks the hub's HTTP, with its faults; and what a repository on it may hold."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import gguf
import k_blocks
import torch
from helpers import tiny_config, tiny_tensors, write_tiny_checkpoint
from tokenizer_files import DEMO_TEMPLATE, demo_folder, spm_model

from qmix.models import read_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WASTE = ("consolidated.safetensors", "original/model.safetensors", "onnx/model.safetensors", "pytorch_model.bin",
         "checkpoint-500/optimizer.safetensors", "checkpoint-500/config.json", "model.fp16.safetensors", "README.md")


class Hub(BaseHTTPRequestHandler):
    """One repository, org/name, in a folder; `fetched` gets the files whose bytes are asked for, `ranges` their first
    byte. token: what may read it, None = anyone; gated: whether only some may; status: {file: [codes]} that are
    answered first; cut: {file: [bytes]} after which a connection is lost; held: no byte beyond the first `cut` of a
    file comes before it is set. commit: what main is; sizes: {file: bytes} that are said to be there instead."""

    folder: Path
    fetched: list[str]
    ranges: list[int]
    commit = COMMIT
    sizes: dict[str, int]
    token: str | None = None
    gated = False
    status: dict[str, list[int]]
    cut: dict[str, list[int]]
    held: threading.Event | None = None
    reached: threading.Event
    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        files = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if p.is_file()}
        api = f"/api/models/{REPO}"
        if self.gated:
            self.answer(b"", 403, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        elif self.token is not None and self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer(b"", 401, **{"X-Error-Code": "RepoNotFound"})
        elif path.startswith(f"{api}/tree/"):
            rows = [{"type": "file", "path": name, "size": p.stat().st_size, "oid": oid(p)}
                    for name, p in files.items()]
            self.answer(json.dumps(rows).encode(), Content_Type="application/json")
        elif path.startswith(api):
            revision = path.removeprefix(api).removeprefix("/revision/")
            if revision not in ("", "main", "v1", self.commit):
                self.answer(b"", 404, **{"X-Error-Code": "RevisionNotFound"})
                return
            sizes = {name: self.sizes.get(name, p.stat().st_size) for name, p in files.items()}
            rows = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            self.answer(json.dumps({"id": REPO, "sha": self.commit, "siblings": rows}).encode(),
                        Content_Type="application/json")
        elif (name := re.sub(rf"^/{REPO}/resolve/[^/]*/", "", path)) in files:
            self._file(name, files[name])
        else:
            self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _file(self, name: str, path: Path) -> None:
        data = path.read_bytes()
        tag = sha256(path, path.stat().st_mtime_ns) if name.endswith((".safetensors", ".gguf")) else oid(path)
        headers = {"ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if self.command != "GET":
            self.answer(data, **headers)
            return
        self.fetched.append(name)
        if self.status.get(name):
            self.answer(b"", self.status[name].pop(0))
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(found[1]) if found else 0
        self.ranges.append(first)
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        rest = data[first:]
        self.send_response(206 if first else 200)
        for key, value in {"Content-Length": str(len(rest)), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        cut = self.cut[name].pop(0) if self.cut.get(name) else None
        try:
            self.wfile.write(rest if cut is None else rest[:cut])
            self.wfile.flush()
            if cut is not None:
                self.reached.set()
                if self.held is not None:
                    self.held.wait(60)
                self.close_connection |= cut < len(rest)
        except OSError:  # the client has what it wants
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


REPO = "org/name"


@cache
def sha256(path: Path, mtime: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class Served:
    """A running server. handler: the Hub, whose faults a test sets; env: of a command that asks it, with the cache
    in `home`."""

    def __init__(self, folder: Path, home: Path):
        self.handler = type("Handler", (Hub,), {"folder": folder, "fetched": [], "ranges": [], "status": {}, "cut": {},
                                                "sizes": {}, "reached": threading.Event()})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None  # type: ignore[method-assign]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        self.env = {**clean, "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}", "HF_HOME": str(home),
                    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}

    @property
    def fetched(self) -> list[str]:
        return self.handler.fetched

    def weights(self) -> list[str]:
        """The files of weights that were asked for."""
        return weights(self.fetched)

    def stop(self) -> None:
        if self.handler.held is not None:
            self.handler.held.set()
        self._server.shutdown()
        self._server.server_close()


def weights(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.endswith((".safetensors", ".gguf")))


def repository(path: Path, shards: int = 1, **how: Any) -> Path:
    """A checkpoint with a tokenizer, and all that a repository may hold besides."""
    write_tiny_checkpoint(path, shards=shards, vocab_size=512, **how)
    demo_folder(path / "tokenizer")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (path / "tokenizer" / name).rename(path / name)
    (path / "tokenizer" / "config.json").unlink()
    (path / "chat_template.json").write_text('{"chat_template": "x"}')
    for name in WASTE:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"waste")
    return path


def write_gguf(path: Path, type_name: str = "Q8_0", split: int = 0) -> Path:
    """A tiny Mixtral with a tokenizer and chat template as a GGUF file, or as several of `split` tensors each."""
    raw = tiny_config(vocab_size=512, intermediate_size=64, num_hidden_layers=2)
    model = read_model({**raw, "dtype": "float32"})
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(512)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    _add_tokenizer(writer)
    for name, tensor in _gguf_names(tiny_tensors(model, dtype=torch.float32)):
        matrix = tensor.dim() > 1 and "ffn_gate_inp" not in name
        kind = gguf.GGMLQuantizationType[type_name if matrix else "F32"]
        writer.add_tensor(name, k_blocks.quantize(tensor.contiguous().numpy(), kind.name), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_names(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The rows of q and k stay in another order than a converter gives them: the model is random anyway."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    found: dict[str, torch.Tensor] = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if expert := re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.\d+\.(w[123])\.weight", name):
            part = {"w1": "gate", "w2": "down", "w3": "up"}[expert[2]]
            stacks.setdefault(f"blk.{expert[1]}.ffn_{part}_exps.weight", []).append(tensor)
        else:
            mapped = table.get_name(name, try_suffixes=(".weight",))
            assert mapped is not None, name
            found[mapped] = tensor
    return [*found.items(), *((name, torch.stack(rows)) for name, rows in stacks.items())]


def _add_tokenizer(writer: Any) -> None:
    import sentencepiece

    spm = sentencepiece.SentencePieceProcessor(model_proto=spm_model())
    writer.add_tokenizer_model("llama")
    pieces = [spm.id_to_piece(i) for i in range(spm.vocab_size())]
    kinds = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1
             for i in range(len(pieces))]
    filler = [f"<filler{i}>" for i in range(512 - len(pieces))]
    writer.add_token_list([*pieces, *filler])
    writer.add_token_scores([*(spm.get_score(i) for i in range(len(pieces))), *[0.0] * len(filler)])
    writer.add_token_types([*kinds, *[5] * len(filler)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(DEMO_TEMPLATE)


Serve = Callable[[Path], Served]

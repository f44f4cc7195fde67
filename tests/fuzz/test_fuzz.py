"""Mutated files and made-up templates: each is read, or refused in one line with a documented exit code, within 20
seconds of CPU and 3 GiB. The same seeds give the same files; see conftest.py for longer runs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import batch
import gguf_files
import gguf_models
import mutate
import pytest
import torch
from helpers import write_tiny_checkpoint
from odd_stores import ODD, QUANTS, quantize
from tokenizer_files import CHATML, byte_level_json, demo_folder, spelled_json, write_folder

from qmix.checkpoint import Checkpoint
from qmix.gguf.header import open_header
from qmix.models.consolidated import consolidated_config
from qmix.models.registry import ARCHITECTURES, read_model
from qmix.spec.json import from_json, to_json
from qmix.store import Store
from qmix.tensorfile import read_header
from qmix.tokenizer import Message, load
from qmix.tokenizer.sandbox import Template

Fuzz = Callable[..., None]


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """fuzz(count, once)"""
    def run(count: int, once: Callable[[random.Random], object]) -> None:
        seconds = request.config.getoption("--fuzz-seconds")
        found = batch.run(request.node.name, count, once, request.config.getoption("--fuzz-seed"), seconds)
        print(f"{request.node.name}: {sum(found.values())} tries: {dict(found)}")
        assert sum(found.values()) >= (1 if seconds else count)
    return run




@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("fuzz") / "c", num_hidden_layers=1, num_local_experts=2,
                                 shards=2)


def test_safetensors_headers(checkpoint: Path, tmp_path: Path, fuzz: Fuzz) -> None:
    raw, path = next(checkpoint.glob("*.safetensors")).read_bytes(), tmp_path / "m.safetensors"

    def once(dice: random.Random) -> None:
        path.write_bytes(mutate.mutate_safetensors(raw, dice))
        found = read_header(path)
        assert all(found.data_start <= e.offset and e.offset + e.nbytes <= found.size for e in found.entries.values())

    fuzz(3000, once)


def test_gguf_headers(tmp_path: Path, fuzz: Fuzz) -> None:
    raw, path = b"".join(gguf_files.parts()), tmp_path / "m.gguf"

    def once(dice: random.Random) -> None:
        path.write_bytes(mutate.mutate_bytes(raw, dice))
        file = open_header(path).file
        assert all(file.data_start <= e.offset and e.offset + e.nbytes <= file.size for e in file.entries.values())

    fuzz(3000, once)


def test_config_files(fuzz: Fuzz) -> None:
    """Of every architecture; a model that is taken survives as a store keeps it."""
    def once(dice: random.Random) -> None:
        kind = dice.choice(sorted(ARCHITECTURES))
        raw = json.loads(json.dumps(dict(ARCHITECTURES[kind].TINY)))
        model = read_model(mutate.mutate_json(raw, dice))
        assert from_json(json.loads(json.dumps(to_json(model)))) == model

    fuzz(3000, once)


def test_models_of_stores(fuzz: Fuzz) -> None:
    plain = [to_json(read_model(dict(file.TINY))) for file in ARCHITECTURES.values()]

    def once(dice: random.Random) -> None:
        from_json(mutate.mutate_json(dice.choice(plain), dice))

    fuzz(1500, once)


def test_checkpoints(checkpoint: Path, tmp_path: Path, fuzz: Fuzz) -> None:
    """A folder whose config.json, index or shard is mutated, is opened, and read where that can be."""
    path = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    good = {file.name: file.read_bytes() for file in path.iterdir()}

    def once(dice: random.Random) -> None:
        name = dice.choice(sorted(good))
        raw = good[name]
        (path / name).write_bytes(mutate.mutate_safetensors(raw, dice) if name.endswith("safetensors") else
                                  mutate.as_json(mutate.mutate_json(json.loads(raw), dice), dice))
        try:
            with Checkpoint.open(path) as opened:
                opened.fingerprint()
                opened.expert(next(iter(opened.model.expert_keys)))
        finally:
            (path / name).write_bytes(raw)

    fuzz(600, once)


@pytest.mark.parametrize("case", ["fp8-blocks", "pack4-zeros", "nvfp4", "awq", "gptq-desc-act"])
def test_lowbit_checkpoints(case: str, tmp_path: Path, fuzz: Fuzz) -> None:
    """Of quantized weights; the config's own object is mutated as often as all else."""
    from lowbit_checkpoints import write_lowbit

    path = tmp_path / "c"
    write_lowbit(path, "mixtral", case)
    names = ("config.json", "model.safetensors")
    good = {name: (path / name).read_bytes() for name in names}
    config = json.loads(good["config.json"])

    def once(dice: random.Random) -> None:
        name = dice.choice(names)
        if name == "config.json":
            inner = mutate.mutate_json(json.loads(json.dumps(config["quantization_config"])), dice)
            (path / name).write_text(json.dumps({**config, "quantization_config": inner}))
        else:
            (path / name).write_bytes(mutate.mutate_safetensors(good[name], dice))
        try:
            with Checkpoint.open(path) as opened:
                key = next(iter(opened.model.expert_keys))
                opened.expert(key)
                opened.carriable(opened.model.expert_tensors(key)[2].name)
        finally:
            (path / name).write_bytes(good[name])

    fuzz(40, once)


def test_mistral_params(fuzz: Fuzz) -> None:
    params = {"dim": 64, "n_layers": 2, "hidden_dim": 96, "head_dim": 16, "n_heads": 4, "n_kv_heads": 2,
              "norm_eps": 1e-5, "vocab_size": 512, "sliding_window": "16",
              "moe": {"num_experts": 4, "num_experts_per_tok": 2}}

    def once(dice: random.Random) -> None:
        read_model(consolidated_config(mutate.mutate_json(json.loads(json.dumps(params)), dice))[0])

    fuzz(500, once)


def test_gguf_models(tmp_path: Path, fuzz: Fuzz) -> None:
    """A whole model in a GGUF file, whose header is mutated."""
    from architectures import random_model

    torch.manual_seed(0)
    raw = dict(ARCHITECTURES["mixtral"].TINY)
    path = gguf_models.write(tmp_path / "m.gguf", random_model(raw), "mixtral")
    good = path.read_bytes()
    head = open_header(path).file.data_start

    def once(dice: random.Random) -> None:
        path.write_bytes(mutate.mutate_bytes(good[:head], dice) + good[head:])
        with Checkpoint.open(path):
            pass

    fuzz(400, once)


KINDS: dict[str, Callable[[Path], Path]] = {
    "spm": demo_folder, "bytes": lambda path: write_folder(path, json_text=byte_level_json(), chat_template=CHATML),
    "spelled": lambda path: write_folder(path, json_text=spelled_json(), chat_template=CHATML, eos_token="</s>")}


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers(kind: str, tmp_path: Path, fuzz: Fuzz) -> None:
    path = KINDS[kind](tmp_path / "t")
    good = {file.name: file.read_bytes() for file in path.iterdir()}

    def once(dice: random.Random) -> None:
        name = dice.choice(sorted(good))
        raw = good[name]
        (path / name).write_bytes(mutate.mutate_bytes(raw, dice) if name.endswith(".model") or dice.random() < 0.2 else
                                  mutate.as_json(mutate.mutate_json(json.loads(raw), dice), dice))
        try:
            tokenizer = load(path)
            ids = tokenizer.encode_chat([Message("user", "A fox, <s> 12 \U0001F98A")])
            tokenizer.decode(ids)
            tokenizer.encode("The owl.\n")
        finally:
            (path / name).write_bytes(raw)

    fuzz(250, once)


def test_stores(tmp_path: Path, fuzz: Fuzz) -> None:
    source = write_tiny_checkpoint(tmp_path / "tiny", **{**ODD, "num_hidden_layers": 1})
    path = quantize(source, tmp_path / "s", QUANTS["int4"])
    good = {file.name: file.read_bytes() for file in path.iterdir()}

    def once(dice: random.Random) -> None:
        name = dice.choice(sorted(good))
        raw = good[name]
        (path / name).write_bytes(mutate.mutate_safetensors(raw, dice) if name.endswith("safetensors") else
                                  mutate.as_json(mutate.mutate_json(json.loads(raw), dice), dice))
        try:
            with Store.open(path) as store:
                for region in store.layout.dense:
                    store.dense(region)
                for key, region in store.layout.records.items():
                    store.read_record(key, torch.empty(region.nbytes, dtype=torch.uint8))
                if (path / name).read_bytes() != raw:
                    assert name in ("qmix.json", "config.json")  # of which not every byte decides something
        finally:
            (path / name).write_bytes(raw)

    fuzz(600, once)


def test_chat_templates(fuzz: Fuzz) -> None:
    messages: list[Any] = [{"role": "user", "content": "a <b> \u00e9" * 99}, {"role": "assistant", "content": "yes"}]

    def once(dice: random.Random) -> None:
        Template(mutate.template(dice), Path("t.jinja"), now=lambda: datetime(2024, 7, 1)).render(
            messages, {"bos_token": "<s>"}, prompt=True)

    fuzz(600, once)

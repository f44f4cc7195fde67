"""Mutated checkpoints and stores through the command itself: a documented exit code, one line and its cure instead of a
traceback, nothing written but OUT, and a good store at OUT untouched where the command fails."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import mutate
import pytest
from helpers import write_tiny_checkpoint
from odd_stores import ODD, QUANTS, quantize
from tokenizer_files import demo_folder
from warm_python import WarmPython

COUNT = int(os.environ.get("QMIX_FUZZ_COMMANDS", "24"))
LIMITED = """
import resource, sys
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + 4 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (most, most))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from qmix.cli import main
main(sys.argv[1:])
"""


def damage(path: Path, dice: random.Random) -> str:
    """Mutate one file of a folder; its name."""
    name = dice.choice(sorted(file.name for file in path.iterdir() if file.is_file()))
    raw = (path / name).read_bytes()
    if name.endswith(".safetensors"):
        found = mutate.mutate_safetensors(raw, dice)
    elif name.endswith(".json"):
        found = mutate.as_json(mutate.mutate_json(json.loads(raw), dice), dice)
    else:
        found = mutate.mutate_bytes(raw, dice)
    (path / name).write_bytes(found)
    return name


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = demo_folder(tmp_path_factory.mktemp("commands") / "source")
    return write_tiny_checkpoint(path, **{**ODD, "num_hidden_layers": 1, "vocab_size": 512})


@pytest.fixture(scope="module")
def store(source: Path) -> Path:
    return quantize(source, source.parent / "store", QUANTS["int4"])


@pytest.mark.parametrize("seed", range(COUNT))
def test_quantize(seed: int, source: Path, store: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    dice = random.Random(f"quantize {seed}")
    path = Path(shutil.copytree(source, tmp_path / "in"))
    out = Path(shutil.copytree(store, tmp_path / "out"))
    name, before, given = damage(path, dice), files(out), None
    given = files(path)
    done = warm_python.run("-c", LIMITED, "quantize", path, out, "--method", "rtn", "--force", cwd=tmp_path)
    assert done.returncode in (0, 2, 3, 4), (name, done.returncode, done.stderr)
    assert "Traceback" not in done.stderr and "fault in qmix" not in done.stderr, (name, done.stderr)
    assert files(path) == given and {p.name for p in tmp_path.iterdir()} <= {"in", "out", "out.partial"}
    if done.returncode:
        assert "error: " in done.stderr and files(out) == before, (name, done.stderr)


@pytest.mark.parametrize("seed", range(COUNT))
def test_generate(seed: int, store: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    path = Path(shutil.copytree(store, tmp_path / "store"))
    name = damage(path, random.Random(f"generate {seed}"))
    given = files(path)
    done = warm_python.run("-c", LIMITED, "generate", path, "-p", "fox", "-n", "2", cwd=tmp_path)
    assert done.returncode in (0, 2, 3, 4), (name, done.returncode, done.stderr)
    assert "Traceback" not in done.stderr and "fault in qmix" not in done.stderr, (name, done.stderr)
    assert files(path) == given and (done.returncode == 0 or "error: " in done.stderr)

"""The public Python API: docs/python.md and examples/ run as they stand, on the bundled model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from warm_python import WarmPython

import qmix
from qmix.demo import CHECKPOINT

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the names that the examples use are the bundled model."""
    made = tmp_path_factory.mktemp("python-api")
    (made / "Mixtral-8x7B-Instruct-v0.1").symlink_to(CHECKPOINT)
    with qmix.Checkpoint.open(CHECKPOINT) as source:
        qmix.quantize_checkpoint(source, made / "mixtral-int4", qmix.QuantConfig(block=32), threads=1)
    return made


def run(python: WarmPython, code: str, folder: Path, *arguments: str) -> str:
    done = python.run("-c", code, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


EACH = """
import sys
for number, block in enumerate(open(sys.argv[1], encoding="utf-8").read().split("\\0")):
    print(f"\\n-- {number}", flush=True)
    exec(compile(block, f"example {number}", "exec"), {"__name__": "__main__"})
"""


def test_the_documents_examples(folder: Path, warm_python: WarmPython) -> None:
    """One after the other in one process, each with names of its own."""
    blocks = folder / "blocks"
    blocks.write_text("\0".join(BLOCKS), encoding="utf-8")
    printed = re.split("\n-- [0-9]+\n", run(warm_python, EACH, folder, str(blocks)))
    assert len(printed) == 1 + len(BLOCKS) and all(text.strip() for text in printed[1:])


@pytest.mark.parametrize(("name", "arguments", "printed"), [
    ("ask", ("Who are you?",), "."), ("conversation", ("Who are you?", "Why?"), "in the KV cache"),
    ("next_tokens", ("Once upon a",), "%")])
def test_the_examples(name: str, arguments: tuple[str, ...], printed: str, folder: Path,
                      warm_python: WarmPython) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert printed in run(warm_python, source, folder, "mixtral-int4", *arguments)


def test_every_public_name_is_there_and_documented() -> None:
    for name in qmix.__all__:
        assert getattr(qmix, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qmix.nothing  # noqa: B018

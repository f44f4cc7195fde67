"""The house keeps its floors: a module imports only from lower floors or from its own package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qmix.demo import CHECKPOINT

ROOT = Path(__file__).parents[1] / "qmix"
# Floor 0 is a ladder: each of its modules may import those before it.
LADDER = ("errors", "textfile", "bounded", "modelfiles", "streams", "process", "spec", "models", "schemes", "config",
          "tensorfile", "sizes", "gguf", "settings", "hub", "paths", "json_cache", "render", "failures")
FLOORS = (
    {"formats"},
    {"shards"},
    {"lowbit"},
    {"sources"},
    {"gguf_checkpoint"},
    {"checkpoint", "store", "kernels", "hardware", "device"},
    {"forward"},
    {"quantize", "offload", "tokenizer", "sampling", "speculation"},
    {"generate"},
    {"engine"},
    {"analysis", "bench", "chat", "demo", "evaluate", "serve"},
    {"commands"},
    {"cli"},
)
FLOOR = {name: (1 + height, 0) for height, names in enumerate(FLOORS) for name in names}
FLOOR |= {name: (0, rung) for rung, name in enumerate(LADDER)}
# __init__ and __main__ of qmix itself only point into the house, lazily.
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem not in ("__init__", "__main__"))


def room(path: Path) -> str:
    """quantize/job.py -> "quantize", errors.py -> "errors"."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of qmix that a file imports anywhere, functions and TYPE_CHECKING included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("qmix.")}
    return found & set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    assert here in FLOOR, f"{here} has no floor: give it one here and in the design"
    for other in imported_rooms(path) - {here}:
        assert FLOOR[other] < FLOOR[here], f"{path.relative_to(ROOT)} (floor {FLOOR[here]}) imports {other}"


def test_the_readme_shows_these_floors() -> None:
    block = next(b for b in (ROOT.parent / "README.md").read_text().split("```") if re.match(r"\n\d+ cli", b))
    shown: dict[str, int] = {}
    height = -1
    for line in block.strip().splitlines():
        number, names = re.fullmatch(r"(\d*)\s+(.*)", line).groups()  # type: ignore[union-attr]
        height = int(number or height)
        shown |= {name: height for name in re.split(r"\s{2,}", names) if name in FLOOR}  # the rest is prose
    assert shown == {name: height for name, (height, _) in FLOOR.items()}


def imported_modules(code: str) -> set[str]:
    script = f"import sys\nsys.argv = ['qmix', '--help']\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stderr.split()}


HEAVY = {"torch", "bitsandbytes", "transformers", "accelerate", "safetensors", "sentencepiece", "numpy", "kernels"}


@pytest.mark.parametrize("code", [
    "import qmix",
    "from qmix.cli import main\ntry: main()\nexcept SystemExit: pass",
    "import qmix.forward.program, qmix.kernels.ops, qmix.spec",
    "import qmix.offload.plan, qmix.offload.needs, qmix.kernels.kv_size",
    "import qmix.sizes, qmix.config, qmix.tensorfile, qmix.settings, qmix.paths, qmix.json_cache, qmix.render",
])
def test_help_and_floor_zero_import_nothing_heavy(code: str) -> None:
    assert not imported_modules(code) & HEAVY


def test_quantizing_and_answering_import_torch_without_its_compiler(tmp_path: Path) -> None:
    """torch._dynamo, and sympy with it, would take three seconds of each start."""
    said = imported_modules(f"""
from qmix.cli import main
for arguments in (["quantize", {str(CHECKPOINT)!r}, {str(tmp_path / "st")!r}],
                  ["generate", {str(tmp_path / "st")!r}, "-p", "a", "-n", "2"]):
    sys.argv = ["qmix", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code
sys.stderr.flush()
print(*(name.replace(".", "/") for name in sys.modules), file=sys.stderr)""")
    assert "torch" in said
    assert not said & {"torch/_dynamo", "torch/_inductor", "sympy", "transformers", "accelerate", "triton"}


def test_bitsandbytes_is_imported_only_for_its_formats() -> None:
    rooms = "qmix.engine, qmix.kernels.table, qmix.quantize, qmix.formats"
    assert "bitsandbytes" not in imported_modules(f"import {rooms}")

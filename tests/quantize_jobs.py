"""What test_quantize_job.py and test_quantize_resume.py share: a small source, a job that is run on it or stopped in
the middle, and what it leaves. Each of them makes fixtures of source, whole, out and made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import write_tiny_checkpoint

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.quantize import Report, pipeline, quantize_checkpoint

RTN = QuantConfig(method="rtn")
NF4 = QuantConfig("nf4", "int8", "", 0, 0, double_quant=True)
LAYERS, EXPERTS = 3, 4
REGIONS = LAYERS * (7 + EXPERTS) + 3


def run(source: Path, out: Path, quant: QuantConfig = RTN, **options: Any) -> Report:
    with Checkpoint.open(source) as checkpoint:
        return quantize_checkpoint(checkpoint, out, quant, **{"threads": 1, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def beside(out: Path) -> set[str]:
    """What stands in OUT's folder apart from OUT."""
    return {path.name for path in out.parent.iterdir()} - {out.name}


class Stop(Exception):
    """Raised by a test in the middle of a job."""


def stop_after(regions: int, error: type[BaseException] = Stop) -> Callable[[int, int, str], None]:
    """A progress callback that raises once so many regions are done."""
    left = [regions]

    def progress(done: int, total: int, label: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise error

    return progress


def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("job") / "tiny", seed=1, shards=3)
    for name in ("tokenizer.model", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text(f"the {name}")
    (folder / "README.md").write_text("is not copied")
    return folder


class Whole(NamedTuple):
    path: Path
    files: dict[str, bytes]


def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The store of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(source, out)
    return Whole(out, files(out))


def out(tmp_path: Path) -> Path:
    return tmp_path / "models" / "out"


def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the regions that are quantized while the test runs."""
    found: list[str] = []
    quantize = pipeline._quantize

    def counted(source: Any, work: Any, *rest: Any) -> Any:
        found.append(work.region.name)
        return quantize(source, work, *rest)

    monkeypatch.setattr(pipeline, "_quantize", counted)
    return found

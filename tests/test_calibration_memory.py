"""What a calibration needs of memory, as it is counted before the start, against the peak of a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_models import write

from qmix import hardware
from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.hardware.memory import reset_peak
from qmix.quantize import Calibration, quantize_checkpoint
from qmix.quantize.budget import peak_bytes

QUANT = QuantConfig("int4", "int4", "gptq", 32, 32)
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 256, "intermediate_size": 1536, "moe_intermediate_size": 256, "num_hidden_layers": 2},
    "mistral": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 1},
}
TOKENS = 16 * 512
NOISE = 24 * 2**20  # allocator, threads' stacks, MKL's buffers


@pytest.mark.parametrize("architecture", SHAPES)
def test_the_peak_is_what_was_said(tmp_path: Path, architecture: str) -> None:
    done = subprocess.run([sys.executable, __file__, architecture, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got, said = map(int, done.stdout.split())
    print(f"{got / 2**20:.0f} MiB taken, {said / 2**20:.0f} MiB said")
    assert got < said + NOISE and got > 0.5 * said


def peak(architecture: str, folder: Path) -> tuple[int, int]:
    """(what the process took more than before, what peak_bytes says)."""
    text = Calibration(torch.randint(3, 128, (TOKENS // 512, 512), generator=torch.Generator().manual_seed(0)))
    warm, large = write(folder / "warm", architecture), write(folder / "large", architecture, **SHAPES[architecture])
    with Checkpoint.open(warm) as source:  # what a first run leaves behind: imports, thread pools
        quantize_checkpoint(source, folder / "first", QUANT, calibration=Calibration(text.ids[:2, :40]), threads=1)
    with Checkpoint.open(large) as source:
        said = peak_bytes(source.model, text.tokens, 1)
        before = hardware.resident_bytes()
        reset_peak()
        quantize_checkpoint(source, folder / "out", QUANT, calibration=text, threads=1)
    return hardware.peak_bytes() - before, said


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*peak(sys.argv[1], Path(sys.argv[2])))

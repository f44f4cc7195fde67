"""Mixtral's bits are what they were: records, logits and tokens at the portable level (golden_mixtral.py), by
golden_mixtral.json. Records are bits of one version of torch, logits and tokens also of its build (the wheel of the CPU
index) and of the C library's functions: with another one a test skips, after the records where these count, and says
which (pytest -rs).

Where a change of bits is meant, golden_mixtral.py prints the new ones; the changelog says why they changed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from golden_mixtral import ENVIRONMENT

from qmix.demo import CHECKPOINT
from qmix.kernels import native

HERE = Path(__file__).parent
TRAINED = HERE.parents[1] / "shared/models/wiki-moe-29m"
GOLDEN: dict[str, Any] = json.loads((HERE / "golden_mixtral.json").read_text())

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or "portable" not in native.levels(),
    reason="golden bits are those of x86-64 with the native kernels")


def bits_of(checkpoint: Path) -> dict[str, Any]:
    """In a process of its own: what fixes bits is read at a program's start."""
    done = subprocess.run([sys.executable, str(HERE / "golden_mixtral.py"), str(checkpoint)], check=True, text=True,
                          env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name, checkpoint", [("demo", CHECKPOINT), ("trained", TRAINED)])
def test_mixtral_has_its_bits(name: str, checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        pytest.skip(f"{checkpoint} is not here")
    compare(bits_of(checkpoint), GOLDEN[name])


def compare(found: dict[str, Any], want: dict[str, Any]) -> None:
    if found["torch"].partition("+")[0] != want["torch"].partition("+")[0]:
        pytest.skip(f"golden bits are those of torch {want['torch']}; this is {found['torch']}")
    assert {method: found[method] for method in ("rtn", "hqq")} == {method: want[method] for method in ("rtn", "hqq")}
    if found["torch"] != want["torch"]:
        pytest.skip(f"records are as they were; golden logits are those of torch {want['torch']}, not {found['torch']}")
    if found["libm"] != want["libm"]:
        pytest.skip("records are as they were; golden logits are those of another C library's expf, exp and sincos")
    assert found == want


def test_another_build_of_the_same_torch_is_held_to_the_records() -> None:
    want = GOLDEN["demo"]
    other = want | {"torch": want["torch"].partition("+")[0] + "+cu130", "tokens": []}
    with pytest.raises(pytest.skip.Exception, match="records are as they were"):
        compare(other, want)
    with pytest.raises(AssertionError):
        compare(other | {"rtn": want["hqq"]}, want)

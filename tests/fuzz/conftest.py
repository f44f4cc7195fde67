"""How long the fuzzer runs: by default as many mutations as it counts, a minute in all; with --fuzz-seconds N (or
QMIX_FUZZ_SECONDS) each of its tests goes on for N seconds, with further seeds. --fuzz-seed begins elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=float(os.environ.get("QMIX_FUZZ_SECONDS", "0")))
    parser.addoption("--fuzz-seed", type=int, default=int(os.environ.get("QMIX_FUZZ_SEED", "0")))

"""How long the fuzzer runs: by default as many mutations as it counts, a minute in all; with --fuzz-seconds N (or
QMIX_FUZZ_SECONDS) each of its tests goes on for N seconds, with further seeds. The options are in tests/conftest.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(120 + config.getoption("--fuzz-seconds")))

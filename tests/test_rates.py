"""The doctor's speeds of kernels: what is counted, over which bytes, and where it is shown."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qmix.commands.doctor import report
from qmix.commands.doctor.speeds import Speeds
from qmix.formats.packed import Packed
from qmix.kernels import rates, reference
from qmix.sizes import MIB


def table(calls: list[tuple[int, int]]) -> Any:
    def linear(x: Tensor, m: Packed) -> None:
        calls.append((len(x), m["qweight"].data_ptr()))
    return SimpleNamespace(linear=linear, native=None)


def clock(step: float) -> Callable[[], float]:
    ticks = count()
    return lambda: step * next(ticks)


@pytest.mark.parametrize(("name", "block", "nbytes"), [
    ("int4", 64, 2 * MIB), ("int2", 32, MIB), ("int8", 0, 4 * MIB), ("mxfp4", 64, 2 * MIB)])
def test_each_matrix_of_the_buffer_is_read_in_turn(name: str, block: int, nbytes: int) -> None:
    buffer = torch.randint(0, 256, (3 * nbytes + 100,), dtype=torch.uint8)
    matrices = rates.matrices_in(name, block, buffer)
    assert [m["qweight"].data_ptr() - buffer.data_ptr() for m in matrices] == [0, nbytes, 2 * nbytes]
    assert torch.equal(matrices[1]["qweight"].view(torch.uint8).reshape(-1), buffer[nbytes:2 * nbytes])
    calls: list[tuple[int, int]] = []
    rates.measure(table(calls), name, block, buffer, 6.0, clock(1.0))
    ones = [at - buffer.data_ptr() for tokens, at in calls if tokens == 1]
    assert ones[1:] == 2 * [0, nbytes, 2 * nbytes]  # the first starts threads
    assert {tokens for tokens, _ in calls} == {1, rates.TOKENS}


def test_bytes_and_operations_are_those_of_the_calls() -> None:
    calls: list[tuple[int, int]] = []
    found = rates.measure(table(calls), "int8", 0, torch.zeros(4 * MIB, dtype=torch.uint8), 6.0, clock(1.0))
    nbytes = rates.ROWS * rates.COLS + 2 * rates.ROWS
    assert found.gbps == pytest.approx(6 * nbytes / 7.0 / 1e9)  # the clock is looked at after each call, and once more
    assert found.gflops == pytest.approx(2 * rates.TOKENS * rates.ROWS * rates.COLS / 1e9)


def test_the_doctor_shows_them_beside_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_kernel(formats: list[str], blocks: list[int], **_: Any) -> Any:
        return SimpleNamespace(**vars(table([])), kernels={(formats[0], blocks[0]): reference.linear},
                               names={formats[0]: "some kernel"}, layer=SimpleNamespace(name="some layer"))

    monkeypatch.setattr(report, "select", one_kernel)
    found, _ = report.kernels(Speeds(8 * MIB, 0.001))
    assert found["memory_read_gbps"] > 0 and len(found["table"]) == 8
    for row in found["table"]:
        assert row["gbps_one_token"] > 0 and row["gflops_128_tokens"] > 0, row
    assert "memory_read_gbps" not in report.kernels()[0]

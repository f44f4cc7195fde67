"""The stand-in keeps what a device promises: order within a stream, events between them, errors for whoever waits; and
work that is repeated is captured once."""

from __future__ import annotations

import random
import time
from contextlib import closing

import pytest
import torch

from qmix.config import ExpertKey
from qmix.device import Repeated, Routed, StandIn
from qmix.device.cuda import open_cuda
from qmix.errors import QmixError, UsageError
from qmix.offload.slot_table import NOWHERE, SlotTable

pytestmark = pytest.mark.usefixtures("no_thread_stays")


def test_a_stream_keeps_its_order_and_waits_for_events_of_others() -> None:
    dice = random.Random(0)
    done: list[str] = []
    with closing(StandIn(lambda: time.sleep(dice.random() * 0.002))) as device:
        other = device.stream()
        for i in range(5):
            device.compute.run(lambda i=i: done.append(f"a{i}"))
        there = device.compute.record()
        other.after(there)
        for i in range(5):
            other.run(lambda i=i: done.append(f"b{i}"))
        last = other.record()
        device.compute.after(last)
        device.compute.run(lambda: done.append("end"))
        device.synchronize()
        assert done == [f"{name}{i}" for name in "ab" for i in range(5)] + ["end"]
        assert there.done() and last.done() and device.launches == 6


def test_work_that_fails_ends_its_stream_and_whoever_waits_is_told() -> None:
    done: list[int] = []

    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with closing(StandIn()) as device:
        device.compute.run(lambda: done.append(1))
        device.compute.record().wait()
        device.compute.run(fail)
        device.compute.run(lambda: done.append(2))
        for _ in range(2):
            with pytest.raises(QmixError, match="the device failed: RuntimeError: an illegal memory access"):
                device.wait(device.compute.record())
        assert done == [1] and device.waits == 2


def test_repeated_work_is_captured_at_its_second_launch() -> None:
    done, captured = [], []
    with closing(StandIn()) as device:
        real = device.capture
        device.capture = lambda work: captured.append(work) or real(work)  # type: ignore[assignment, func-returns-value]
        work = Repeated(device, lambda: done.append(1))
        warm = []
        for _ in range(4):
            work.launch()
            warm.append(work.warm)
        device.synchronize()
        assert done == [1] * 4 and len(captured) == 1 and warm == [False, True, True, True]


def test_what_is_routed_comes_to_the_host_in_one_copy() -> None:
    with closing(StandIn()) as device:
        routed = Routed(device, 3, 5, 2, 2, 4)
        routed.x.copy_(torch.arange(15.0).view(3, 5))
        routed.topk_weights.copy_(torch.rand(3, 2))
        routed.ids.copy_(torch.arange(6).view(3, 2))
        routed.ahead.copy_(torch.arange(24).view(3, 2, 4))
        routed.read_back(0)
        for here, there in ((routed.x, routed.host_x), (routed.topk_weights, routed.host_topk_weights),
                            (routed.ids, routed.host_ids), (routed.ahead, routed.host_ahead)):
            assert torch.equal(here, there) and here.data_ptr() != there.data_ptr()


def test_the_slot_table_changes_in_order_with_the_work_that_reads_it() -> None:
    found: list[list[int]] = []
    with closing(StandIn(lambda: time.sleep(0.001))) as device:
        table = SlotTable(device, 2, 3)

        def look() -> None:
            found.append(table.row(1).tolist())

        table.enter(ExpertKey(1, 2), 7)
        device.compute.run(look)
        table.leave(ExpertKey(1, 2))
        table.leave(ExpertKey(1, 0))  # was not there
        table.enter(ExpertKey(1, 1), 7)
        assert table.here(1) == {1: 7}, "the host knows at once"
        device.compute.run(look)
        device.synchronize()
        assert found == [[NOWHERE, NOWHERE, 7], [NOWHERE, 7, NOWHERE]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_told() -> None:
    with pytest.raises(UsageError, match="torch sees no NVIDIA GPU") as error:
        open_cuda()
    assert "CUDA" in (error.value.cure or "") or "nvidia-smi" in (error.value.cure or "")

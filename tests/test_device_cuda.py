"""What qmix/device/cuda.py asks of torch, with a torch.cuda that is made up: captures that fail, page-locked memory,
what a context takes. The fake keeps the rules of torch's own CUDAGraph and allocator that matter here (read from their
sources): a capture that the driver has invalidated ends in the stream and not in the allocator."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qmix.device import cuda, nvml
from qmix.device.cuda import CONTEXT, FAILURES, Cuda, open_cuda
from qmix.errors import QmixError
from qmix.sizes import GIB, MIB


class Driver:
    """The state behind the fake: which pools the allocator serves, what the stream captures, what memory is in use."""

    def __init__(self) -> None:
        self.underway: dict[tuple[int, int], weakref.ref[Graph]] = {}  # pools that torch's allocator gives to a capture
        self.host: set[tuple[int, int]] = set()  # and pools that its allocator of page-locked memory gives to one
        self.uses: dict[tuple[int, int], int] = {}
        self.capturing: Graph | None = None
        self.invalid = False
        self.pools = 0
        self.free, self.total, self.reserved = 23 * GIB, 24 * GIB, 0

    def handle(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    def end_pool(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        del self.underway[pool]

    def allocate(self) -> None:
        """What every allocation does: it asks the graphs that are underway, which must be there still."""
        for graph in self.underway.values():
            assert graph() is not None, "the allocator asks a graph that is gone"


class Graph:
    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.ended = False
        self.replays = 0
        self.pool: tuple[int, int] | None = None

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        if pool in self.driver.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        assert self.driver.uses.get(pool) != 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.driver.uses[pool] = self.driver.uses.get(pool, 0) + 1
        self.driver.underway[pool], self.pool = weakref.ref(self), pool
        if pool in self.driver.host:
            raise RuntimeError("beginAllocateToPool: already recording to pool_id")
        self.driver.host.add(pool)
        if self.driver.capturing is not None:
            raise RuntimeError("CUDA error: operation would make the legacy stream depend on a capturing stream")
        self.driver.capturing, self.driver.invalid = self, False

    def capture_end(self) -> None:
        if self.driver.capturing is not self:
            raise RuntimeError("CUDA error: the operation is not permitted: no capture")
        self.driver.capturing = None  # in any case
        if self.driver.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore lines")
        assert self.pool is not None
        self.driver.end_pool(0, self.pool)
        self.driver.host.remove(self.pool)
        self.ended = True

    def replay(self) -> None:
        assert self.ended
        self.replays += 1

    def __del__(self) -> None:
        if self.ended and self.pool is not None:
            self.driver.uses[self.pool] -= 1


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    found = Driver()

    @contextmanager
    def stream(stream: object) -> Iterator[None]:
        yield

    about = SimpleNamespace(name="a card", major=8, minor=9, uuid="5f2b")
    for name, value in {
            "get_device_properties": lambda *_: about, "mem_get_info": lambda *_: (found.free, found.total),
            "memory_reserved": lambda *_: found.reserved, "Stream": lambda *_: object(), "stream": stream,
            "CUDAGraph": lambda: Graph(found), "graph_pool_handle": found.handle, "is_available": lambda: True,
            "device_count": lambda: 1, "set_device": lambda _: None, "empty_cache": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", found.end_pool, raising=False)
    monkeypatch.setattr(cuda, "_page_locked", lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    monkeypatch.setattr(nvml, "used_bytes", lambda uuid: None)
    yield found


def fail(driver: Driver, error: BaseException, invalidate: bool) -> Any:
    def work() -> None:
        driver.invalid = invalidate
        raise error

    return work


def test_work_is_captured_once_and_replayed(driver: Driver) -> None:
    device, done = Cuda(0), []
    for _ in range(3):
        launch = device.capture(lambda: done.append(1))
        launch()
        launch()
    assert len(done) == 3 and device.launches == 6 and not device.trouble and not driver.underway
    assert driver.pools == 1, "a pool for every graph would hold each one's memory"


@pytest.mark.parametrize("invalidate", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("an operation is not permitted when stream is capturing\nmore"),
                                   ValueError(""), KeyboardInterrupt()])
def test_a_capture_that_fails_ends_in_stream_and_allocator(driver: Driver, error: BaseException,
                                                           invalidate: bool) -> None:
    device, done = Cuda(0), []
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            device.capture(fail(driver, error, invalidate))
    else:
        device.capture(fail(driver, error, invalidate))
        reason = str(error).partition("\n")[0] or type(error).__name__
        assert device.trouble == f"no CUDA graphs here ({reason}): kernels are launched one by one, which is slower"
    assert driver.capturing is None and not driver.underway
    driver.allocate()
    launch = device.capture(lambda: done.append(1))
    launch()
    launch()
    assert done == [1] and device.launches == 2, "the next one is captured again"


def test_a_capture_that_only_its_end_shows_to_have_failed_is_run_by_launches(driver: Driver) -> None:
    device, done = Cuda(0), []

    def work() -> None:
        driver.invalid = driver.capturing is not None
        done.append(1)

    launch = device.capture(work)
    launch()
    launch()
    assert len(done) == 3 and device.launches == 2 and "previous error during capture" in device.trouble
    assert not driver.underway and driver.capturing is None


def test_a_capture_that_cannot_begin_leaves_nothing_begun(driver: Driver) -> None:
    device = Cuda(0)
    driver.capturing = Graph(driver)  # another one
    device.capture(lambda: None)
    assert not driver.underway and "legacy stream" in device.trouble


def test_after_some_failures_no_more_are_tried(driver: Driver) -> None:
    device, tried = Cuda(0), []

    def work() -> None:
        if driver.capturing is not None:
            tried.append(1)
            raise RuntimeError("no")

    for _ in range(10):
        device.capture(work)()
    assert len(tried) == FAILURES and device.launches == 10


def test_a_pool_is_not_given_up_while_graphs_may_still_be_made(driver: Driver) -> None:
    device = Cuda(0)
    for _ in range(3):
        launch = device.capture(lambda: None)
        launch()
        del launch  # the fake's __del__ runs at once: the last user of the pool, but for the first graph
    assert not device.trouble


def test_what_does_not_fit_the_arena_leaves_room_for_what_does(driver: Driver) -> None:
    device = Cuda(0)
    small = device.host(3, dtype=torch.int64)
    large = device.host(cuda.ARENA, dtype=torch.uint8)
    next_one = device.host(5, 2, dtype=torch.float32)
    arena = device._arena.untyped_storage().data_ptr()
    assert small.untyped_storage().data_ptr() == next_one.untyped_storage().data_ptr() == arena
    assert large.untyped_storage().data_ptr() != arena and len(large) == cuda.ARENA
    assert next_one.data_ptr() == arena + 256 and next_one.shape == (5, 2)
    rest = device.host(cuda.ARENA - 512, dtype=torch.uint8)
    assert rest.data_ptr() == arena + 512
    assert device.host(1, dtype=torch.uint8).untyped_storage().data_ptr() != arena


def test_a_context_is_measured_where_the_driver_tells(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 GiB in use a desktop has 700 MiB."""
    answers = iter([700 * MIB, 1000 * MIB])
    monkeypatch.setattr(nvml, "used_bytes", lambda uuid: next(answers) if uuid == "GPU-5f2b" else None)
    device = open_cuda()
    assert device.taken() == 300 * MIB


@pytest.mark.parametrize("answers", [(None, None), (700 * MIB, None), (1000 * MIB, 1000 * MIB), (900 * MIB, 800 * MIB),
                                     (0, 30 * GIB)])
def test_else_it_is_bounded(driver: Driver, monkeypatch: pytest.MonkeyPatch, answers: tuple[Any, Any]) -> None:
    told = iter(answers)
    monkeypatch.setattr(nvml, "used_bytes", lambda uuid: next(told))
    assert open_cuda().taken() == CONTEXT
    driver.free = driver.total - 100 * MIB
    monkeypatch.setattr(nvml, "used_bytes", lambda uuid: None)
    assert open_cuda().taken() == 100 * MIB


def test_what_goes_elsewhere_than_to_tensors(driver: Driver) -> None:
    driver.reserved = 10 * MIB
    device = Cuda(0)
    driver.reserved += 2 * GIB
    driver.free -= 2 * GIB + 77 * MIB
    assert device.beside() == 77 * MIB and device.memory() == (driver.free, driver.total)
    driver.free += GIB  # another program has ended
    assert device.beside() == 0


def test_a_card_that_has_failed_is_told_and_can_be_closed(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore lines")

    device = Cuda(0)
    event = cuda._Event(SimpleNamespace(synchronize=fail))  # type: ignore[arg-type]
    with pytest.raises(QmixError, match="the GPU failed: CUDA error: an illegal memory access was"):
        device.wait(event)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    device.close()


class Library:
    """libnvidia-ml, made up: what each call gives back, and whether it was shut down."""

    def __init__(self, *codes: int):
        self.codes = dict(zip(("init", "handle", "info"), codes, strict=True))
        self.open = 0

    def nvmlInit_v2(self) -> int:
        self.open += self.codes["init"] == 0
        return self.codes["init"]

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: ctypes.c_char_p, card: Any) -> int:
        assert uuid.value == b"GPU-1"
        card._obj.value = 0x1234
        return self.codes["handle"]

    def nvmlDeviceGetMemoryInfo(self, card: ctypes.c_void_p, memory: Any) -> int:
        assert card.value == 0x1234
        memory._obj.total, memory._obj.free, memory._obj.used = 24 * GIB, 23 * GIB, GIB
        return self.codes["info"]


@pytest.mark.parametrize(("codes", "want"), [((0, 0, 0), GIB), ((9, 0, 0), None), ((0, 6, 0), None), ((0, 0, 3), None)])
def test_the_drivers_library_is_asked(codes: tuple[int, ...], want: int | None) -> None:
    library = Library(*codes)
    assert nvml.used_bytes("GPU-1", lambda name: library) == want  # type: ignore[arg-type, return-value]
    assert library.open == 0


def test_without_the_drivers_library() -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    assert nvml.used_bytes("GPU-1", missing) is None
    assert nvml.used_bytes("GPU-1", lambda name: SimpleNamespace()) is None  # type: ignore[arg-type, return-value]

"""Pools page-locked in pieces, by a driver that the test plays: whole slots, each once, given back in turn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix.device import pinning
from qmix.device.pinning import PAGE, pin_pool
from qmix.offload.pool import slot_pool


class Driver:
    """Registers memory up to `most` bytes; knows what is registered, and the order in which it was and was not."""

    def __init__(self, most: int = 10**12):
        self.most = most
        self.held: dict[int, int] = {}
        self.gone: list[int] = []

    def register(self, address: int, nbytes: int) -> None:
        assert nbytes > 0
        for other, size in self.held.items():
            assert address + nbytes <= other or other + size <= address, "registered twice"
        if sum(self.held.values()) + nbytes > self.most:
            raise RuntimeError("out of memory (2)")
        self.held[address] = nbytes

    def unregister(self, address: int) -> None:
        del self.held[address]
        self.gone.append(address)


@given(slots=st.integers(0, 9), pages=st.integers(1, 3), limit=st.integers(0, 40 * PAGE), piece=st.integers(1, 9),
       most=st.integers(0, 40))
def test_whole_slots_from_the_first_one_on_within_the_limit(slots: int, pages: int, limit: int, piece: int,
                                                            most: int) -> None:
    size, driver, said = pages * PAGE, Driver(most * PAGE), list[str]()
    pool = slot_pool(slots, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinning, "PIECE", piece * PAGE)
        pinned = pin_pool(pool, limit, said.append, driver.register, driver.unregister)
    held = sorted(driver.held.items())
    assert sum(driver.held.values()) == pinned.nbytes == pinned.slots * size <= limit
    at = pool.data_ptr()
    for address, nbytes in held:
        assert address == at and nbytes % size == 0 and nbytes <= max(size, piece * PAGE)
        at += nbytes
    wanted = min(slots, limit // size)
    assert pinned.slots <= wanted and bool(said) == (pinned.slots < wanted) and len(said) <= 1
    if said:  # less than a slot is left of what was allowed
        assert driver.most - pinned.nbytes < size
    pinned.close()
    assert not driver.held and driver.gone == [address for address, _ in reversed(held)]
    pinned.close()
    assert len(driver.gone) == len(held) and pinned.nbytes == 0


def test_a_refusal_is_said_in_one_line_with_what_is_page_locked() -> None:
    driver, said = Driver(5 * PAGE), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinning, "PIECE", 2 * PAGE)
        pin_pool(slot_pool(8, PAGE), 10**9, said.append, driver.register, driver.unregister)
    assert said == ["page-locked 20.0 KiB of 32.0 KiB of RAM for the GPU; the system refused more (out of memory "
                    "(2)), so copies from the rest are slower"]


def test_a_gpu_that_has_failed_does_not_keep_the_rest_from_being_given_back() -> None:
    driver = Driver()

    def broken(address: int) -> None:
        driver.unregister(address)
        raise RuntimeError("unspecified launch failure (719)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinning, "PIECE", PAGE)
        pinned = pin_pool(slot_pool(3, PAGE), 10**9, register=driver.register, unregister=broken)
    pinned.close()
    assert len(driver.gone) == 3


def test_a_pool_that_shares_pages_with_others_is_refused() -> None:
    driver = Driver()
    for pool in (torch.zeros(4, PAGE + 64, dtype=torch.uint8), slot_pool(4, 2 * PAGE)[:, :PAGE],
                 slot_pool(2, PAGE).view(-1)[64:PAGE + 64].view(1, PAGE)):
        with pytest.raises(ValueError, match="whole pages"):
            pin_pool(pool, 10**9, register=driver.register, unregister=driver.unregister)
    assert not driver.held


class Runtime:
    """What torch.cuda.cudart() is: functions that return codes."""

    def __init__(self, code: int):
        self.code = code
        self.asked: list[tuple[int, ...]] = []

    def cudaHostRegister(self, *args: int) -> int:
        self.asked.append(args)
        return self.code

    def cudaHostUnregister(self, *args: int) -> int:
        self.asked.append(args)
        return self.code


@pytest.mark.parametrize("code", [0, 2])
def test_codes_of_the_runtime_become_errors(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, said = Runtime(code), list[str]()

    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"no ({code})")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    if code:  # the launch that takes note of it; this torch has no CUDA
        monkeypatch.setattr(torch, "zeros", lambda *shape, device: runtime.asked.append((0,)) or broken())
    pool = slot_pool(2, PAGE)
    pin_pool(pool, 10**9, said.append).close()
    if code:
        tries = [(pool.data_ptr(), 2 * PAGE, 0), (0,), (pool.data_ptr(), PAGE, 0), (0,)]
        assert runtime.asked == tries and "no (2)" in said[0]
    else:
        assert runtime.asked == [(pool.data_ptr(), 2 * PAGE, 0), (pool.data_ptr(),)] and not said


def broken() -> torch.Tensor:
    raise RuntimeError("CUDA error: out of memory")

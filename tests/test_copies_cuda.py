"""Two tiers, the upper one on a GPU where there is one: page-locked below, work that reads slots as they change."""

from __future__ import annotations

import random

import pytest
import torch
from test_reads import CHUNK, RECORD, FakeRecords, content, key
from test_tiers import cache

from qmix.device import Device, StandIn
from qmix.device.cuda import open_cuda
from qmix.device.pinning import pin_pool
from qmix.formats import memory
from qmix.offload.copies import Copies
from qmix.offload.pool import slot_pool
from qmix.offload.reads import Readers
from qmix.offload.tiers import Tier

ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=ONLY)])
def test_records_go_up_and_come_down_while_the_device_reads_them(where: str) -> None:
    device: Device = StandIn() if where == "cpu" else open_cuda()
    dice, said, saw = random.Random(3), list[str](), []
    below = slot_pool(4, RECORD)
    pinned = pin_pool(below, 3 * RECORD, said.append) if where == "cuda" else None  # the last one stays pageable
    readers = Readers(FakeRecords(), 2, CHUNK)
    low = Tier(below, cache(4), readers)
    copies = Copies(low, device, CHUNK)
    pool = torch.zeros(3, RECORD, dtype=torch.uint8, device=device.torch_device)
    device.compute.record().wait()  # or zeros would follow what the other stream copies
    high = Tier(pool, cache(3), copies, copies.take_back)
    for _ in range(60):
        wanted = key(dice.randrange(8))
        high.cache.begin_token()
        high.cache.use(wanted)
        assert high.want(wanted, "demand")
        high.wait(wanted, RECORD)
        slot, found = high.bytes_of(wanted), torch.empty(RECORD, dtype=torch.uint8, device=device.torch_device)

        def work(slot: torch.Tensor = slot, found: torch.Tensor = found) -> None:
            found.copy_(slot)

        device.compute.run(work)
        high.used([wanted], device.compute.record())
        saw.append((wanted, found))
    device.compute.record().wait()
    landed = [(wanted, found.cpu()) for wanted, found in saw]  # held: `memory` of a tensor that has gone is anything
    assert all(bytes(memory(found)) == content(k) for k, found in landed)
    assert copies.bytes_down > 0 and not said
    copies.close()
    readers.close()
    if pinned is not None:
        assert pinned.slots == 3
        pinned.close()
    device.close()

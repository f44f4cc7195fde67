"""Engines on a device, the CPU standing in for it, with so many slots above and below, and a conversation with them.
Tests of them make fixtures of stores and resident."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import UNQUANTIZED, write_tiny_stores
from torch import Tensor

from qmix import hardware
from qmix.config import QuantConfig
from qmix.device import StandIn
from qmix.engine import Engine, Placement, load
from qmix.offload.needs import Needs
from qmix.offload.plan import RESERVE, STAGING
from qmix.store import Store

CONTEXT = 120
LAYERS, EXPERTS, TOP_K = 4, 8, 2
ALL = LAYERS * EXPERTS
IDS = [(7 * i * i + 3) % 500 + 3 for i in range(60)]
FORMATS = {"int4": QuantConfig(), "keep": UNQUANTIZED, "int8": QuantConfig(experts="int8", dense="int4"),
           "nf4": QuantConfig(experts="nf4", dense="int8", method="", group_size=0, block=0)}


def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tiny_stores(tmp_path_factory.mktemp("device"), FORMATS, num_hidden_layers=LAYERS,
                             num_local_experts=EXPERTS)


def delays(seed: int, share: float = 0.1, longest: float = 0.002) -> Callable[[], None]:
    """Now and then a stream is late."""
    dice = random.Random(seed)

    def delay() -> None:
        if dice.random() < share:
            time.sleep(dice.random() * longest)

    return delay


def bring_up(monkeypatch: pytest.MonkeyPatch, folder: Path, above: int, below: int, device: StandIn | None = None,
             exact: bool = True, records: int = ALL, **how: Any) -> Engine:
    """The store at `folder`, of `records`, with so many slots on the device and below, whatever this process weighs."""
    monkeypatch.setattr(hardware, "resident_bytes", lambda: 0)
    with Store.open(folder) as store:
        needs = Needs.of(store.model, store.quant, how.setdefault("context", CONTEXT), how.get("kv", "bf16"))
    there = needs.on_device
    vram = RESERVE + there.dense + there.kv + there.workspace + above * needs.record
    placement = Placement(device or StandIn(), vram, exact=exact, tuned=how.pop("tuned", None))
    engine = load(folder, threads=how.pop("threads", 1), ram=RESERVE + below * needs.record, placement=placement,
                  activations=how.pop("activations", "bf16"), **how)
    fast, slow = engine.plan.tiers
    assert fast.slots == above
    assert slow.slots == (records if above < records <= below else min(below, records - above + STAGING))
    return engine


def run(engine: Engine) -> Tensor:
    """Logits of a conversation of two turns: prompt, answer, another prompt, answer."""
    session = engine.session()
    found = [session.prefill(IDS[:40])]
    for turn in range(2):
        for token in IDS[turn * 12:turn * 12 + 12]:
            found.append(session.decode(token).clone())
        if turn == 0:
            found.append(session.prefill(IDS[40:]))
    return torch.stack(found)


def resident(stores: dict[str, Path]) -> dict[str, Tensor]:
    found = {}
    for name, folder in stores.items():
        with load(folder, threads=1, context=CONTEXT, activations="bf16", placement=Placement(StandIn())) as engine:
            assert engine.plan.tiers[0].slots == ALL
            found[name] = run(engine)
            assert engine.stats()["experts"] == {"vram": 100.0}
    return found

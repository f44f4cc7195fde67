"""Prompts on a device whose experts are computed many at a time, the CPU standing in for it: the same bits under every
budget, with Triton's kernels too; the statistics of one expert after the other; what an interrupted prompt leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FIRST
from device_engines import ALL, EXPERTS, IDS, LAYERS, bring_up, delays
from fast_interpreter import HAVE_TRITON
from helpers import write_tiny_stores
from model_configs import with_keys
from test_architectures_device import stored
from torch import Tensor

from qmix.config import Cancel, QuantConfig
from qmix.device import StandIn
from qmix.engine import Engine
from qmix.errors import Interrupted
from qmix.kernels import prompt_experts
from qmix.kernels.prompt_experts import TorchPromptExperts
from qmix.offload.device_prompts import Choices

pytestmark = pytest.mark.usefixtures("no_thread_stays")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_stores(tmp_path_factory.mktemp("prompts"), {"int4": QuantConfig()}, num_hidden_layers=LAYERS,
                             num_local_experts=EXPERTS)["int4"]


def told(engine: Engine) -> tuple[Any, ...]:
    """What is known of the prompts so far: choices by layer, and what was counted."""
    figures = engine.stats()["offload"]["prefill"]
    return engine._offload.stats.to_json(), [figures[name] for name in ("chosen", "hits", "misses", "below")]


@pytest.mark.parametrize(("above", "below"), [(ALL, 2), (9, ALL), (9, 25)])
def test_statistics_and_numbers_of_one_expert_after_the_other(store: Path, above: int, below: int,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts and a token between: the same kernels, so even the bits agree."""
    found, numbers = [], []
    for together in (True, False):
        monkeypatch.setattr(TorchPromptExperts, "handles", lambda *how, together=together: together)
        with bring_up(monkeypatch, store, above, below, StandIn(delays(2)), prefetch="off") as engine:
            experts: Any = engine._offload.experts
            assert (experts.prompts is not None) == together
            low = experts._below.tier
            for key in list(low):  # it is filled beside the first tokens, and what has not come yet is not counted
                low.wait(key, len(low.bytes_of(key)))
            session = engine.session()
            numbers.append(torch.stack([session.prefill(IDS[:40]), session.decode(7).clone(),
                                        session.prefill(IDS[40:])]))
            found.append(told(engine))
    assert found[0] == found[1]
    assert torch.equal(numbers[0], numbers[1])


def test_an_interrupted_prompt_is_not_counted(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the layers before have sent to the host is dropped; the next prompt is counted as if nothing had been."""
    sent: list[int] = []
    real = Choices.send

    def send(self: Choices, ids: Tensor) -> Any:
        sent.append(len(ids))
        if len(sent) == LAYERS + 3:
            cancel.set()
        return real(self, ids)

    monkeypatch.setattr(Choices, "send", send)
    cancel = Cancel()
    with bring_up(monkeypatch, store, ALL, 2) as engine:
        engine.session().prefill(IDS[:20])
        first = told(engine)
        with pytest.raises(Interrupted):
            engine.session().prefill(IDS[:30], cancel)
        engine.session().prefill(IDS[:20])
        twice = told(engine)
    with bring_up(monkeypatch, store, ALL, 2) as engine:
        for _ in range(2):
            engine.session().prefill(IDS[:20])
        assert told(engine)[0] == twice[0] != first[0]


def test_launches_with_little_room(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16, three at a time: the same bits, with all experts there and with some."""
    found = []
    for above, most in ((ALL, 100), (ALL, 3), (6, 3)):
        monkeypatch.setattr(prompt_experts, "tiles_of_launch", lambda *how, most=most: most)
        with bring_up(monkeypatch, store, above, 9, StandIn(delays(4))) as engine:
            found.append(engine.session().prefill(IDS[:60]).clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def counting(calls: Counter[str], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*how: Any, **more: Any) -> Any:
        calls[name] += 1
        return real(*how, **more)

    return counted


@pytest.mark.skipif(not HAVE_TRITON or torch.cuda.is_available(), reason="for Triton's interpreter")
@pytest.mark.parametrize(("kind", "keys", "quant"), [
    ("qwen3_moe", {"mlp_only_layers": [], "num_experts": 6}, QuantConfig()),
    ("gpt_oss", {"num_local_experts": 6}, QuantConfig("mxfp4", "int8", "", 0, 0))])
def test_tritons_kernels_under_every_budget(kind: str, keys: dict[str, Any], quant: QuantConfig, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits with all experts in VRAM and with half of them, with biases and clamped activations too. Where all
    are there, a layer takes one call of each operation; else two more for each expert that comes later."""
    from qmix.kernels.cuda_grouped import TritonPromptExperts

    raw = with_keys(FIRST[kind], {"num_hidden_layers": 2, "num_experts_per_tok": 2, **keys})
    folder, calls, found = stored(raw, tmp_path, quant), Counter[str](), []
    for name in ("sort", "gate_up", "down", "combine"):
        monkeypatch.setattr(TritonPromptExperts, name, counting(calls, name, getattr(TritonPromptExperts, name)))
    for above, below in ((12, 2), (6, 4)):
        calls.clear()
        device = StandIn(delays(above), torch.float16, triton=True)  # the interpreter gets bf16 products wrong
        with bring_up(monkeypatch, folder, above, below, device, records=12, context=32, prefetch="off") as engine:
            found.append(engine.session().prefill(IDS[:9]).clone())
            misses = engine.stats()["offload"]["prefill"]["misses"]
        assert calls == {"sort": 2, "gate_up": 2 + misses, "down": 2 + misses, "combine": 2}
        assert (misses > 0) == (above < 12)
        assert torch.equal(found[-1], found[0])

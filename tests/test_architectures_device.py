"""Every architecture that a device runs, on one, the CPU standing in for it: the numbers of the CPU's own engine, and
the same bits under every budget of both memories. test_lower_device.py has the bits of the Ops."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from architectures import FIRST, quantized, random_model, write
from device_engines import bring_up, delays
from fast_interpreter import HAVE_TRITON
from model_configs import ON_DEVICE, RUN, TINY, with_keys
from test_cli import qmix
from torch import Tensor

from qmix.config import QuantConfig
from qmix.device import Device, StandIn
from qmix.device.cuda import open_cuda
from qmix.engine import Engine, Placement, load
from qmix.errors import DoesNotFit, UsageError
from qmix.forward.lower_device import not_on_device
from qmix.models import read_model
from qmix.offload.needs import Needs
from qmix.store import Store

IDS = torch.randint(3, 500, (60,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPT, CONTEXT = 33, 64  # longer than the windows

pytestmark = pytest.mark.usefixtures("no_thread_stays")


def stored(raw: Mapping[str, Any], folder: Path, quant: QuantConfig = QuantConfig()) -> Path:  # noqa: B008
    source = write(random_model(raw, torch.bfloat16), raw, folder / "source", published=False)
    return quantized(source, folder / quant.experts, quant)


@pytest.fixture(scope="module", params=ON_DEVICE)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, raw = tmp_path_factory.mktemp(request.param), FIRST[request.param]
    return stored(raw, folder)


def logits(engine: Engine, count: int = 9) -> Tensor:
    session = engine.session()
    return torch.stack([session.prefill(IDS[:PROMPT]), *(
        session.decode(token).clone() for token in IDS[PROMPT:PROMPT + count])])


def everything_there(store: Path, kv: str = "bf16", device: Device | None = None) -> Engine:
    return load(store, threads=1, context=CONTEXT, activations="bf16", kv=kv, placement=Placement(device or StandIn()))


@pytest.fixture(scope="module")
def want(store: Path) -> Tensor:
    """With all records on the device."""
    with everything_there(store) as engine:
        assert engine.plan.tiers[0].slots == len(engine.model.expert_keys)
        found = logits(engine)
        assert engine.stats()["offload"]["decode"]["chosen"] == 9 * engine.model.chosen
        return found


def tight(monkeypatch: pytest.MonkeyPatch, store: Path, below: int | None = 2, above: int | None = None,
          kv: str = "bf16", prefetch: str = "both") -> Engine:
    """The fewest slots on the device with which qmix runs; below: None for all records."""
    with Store.open(store) as opened:
        records = len(opened.model.expert_keys)
        least = Needs.of(opened.model, opened.quant, CONTEXT).least_slots
    return bring_up(monkeypatch, store, least if above is None else above, below or records, StandIn(delays(7)),
                    records=records, context=CONTEXT, kv=kv, prefetch=prefetch)


def test_the_numbers_of_the_cpus_engine(store: Path, want: Tensor) -> None:
    with load(store, threads=1, context=CONTEXT, activations="bf16") as engine:
        found = logits(engine)
    errors = (want - found).norm(dim=1) / found.norm(dim=1)
    assert errors.median() < bounds.model_apart(engine.model.num_layers)


@pytest.mark.parametrize(("below", "prefetch"), [(2, "both"), (2, "off"), (None, "ahead")])
def test_the_same_bits_under_every_budget(store: Path, want: Tensor, below: int | None, prefetch: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    with tight(monkeypatch, store, below, prefetch=prefetch) as engine:
        for _ in range(2):  # the second time with statistics
            assert torch.equal(logits(engine), want)
        figures, model = engine.stats()["offload"], engine.model
    assert figures["decode"]["chosen"] == 18 * model.chosen == figures["decode"]["hits"] + figures["decode"]["misses"]
    assert figures["decode"]["misses"] > 0
    assert prefetch == "off" or figures["prefetcher"]["issued"] > 0


def test_a_slot_less_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(store) as opened:
        least = Needs.of(opened.model, opened.quant, CONTEXT).least_slots
    with pytest.raises(DoesNotFit, match=rf"of VRAM, has .*short of .*{least} expert slots"):
        tight(monkeypatch, store, above=least - 1)


def test_drafts_and_sessions_have_the_bits_of_single_tokens(store: Path, want: Tensor,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in (everything_there(store), tight(monkeypatch, store)):
        with engine:
            session, at = engine.session(), PROMPT
            session.prefill(IDS[:PROMPT])
            for count in (3, 5):
                found = session.verify([*IDS[at:at + count], 3, 4])[:count]  # two that turn out wrong
                assert torch.equal(found, want[at - PROMPT + 1:at - PROMPT + 1 + count])
                at += count
                session.trim(at)
            if engine.plan.tiers[0].slots == len(engine.model.expert_keys):
                other = engine.session()
                other.prefill(IDS[5:20])
                both = engine.step([other, session], [[9], [IDS[at]]], "decode")
                assert torch.equal(both[1], want[at - PROMPT + 1])


def test_keys_and_values_in_int8(store: Path, want: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with everything_there(store, "int8") as engine:
        resident = logits(engine)
    with tight(monkeypatch, store, kv="int8") as engine:
        assert torch.equal(logits(engine), resident)
    assert not torch.equal(resident, want)
    assert torch.nn.functional.cosine_similarity(resident, want, dim=1).min() > 0.98


def test_a_plan_of_a_config_is_that_of_the_store(store: Path) -> None:
    how = ("--vram", "2G", "--ram", "1G", "--disk", 2, "--ram-speed", 30, "--pcie", 20, "--vram-speed", 900, "--json")
    by_config, by_store = (qmix("plan", path, *how) for path in (store.parent / "source" / "config.json", store))
    assert by_config.returncode == by_store.returncode == 0, by_config.stderr + by_store.stderr
    plans = [json.loads(done.stdout) for done in (by_config, by_store)]
    assert plans[0] | {"model": ""} == plans[1] | {"model": ""}
    assert {row["memory"] for row in plans[0]["memory"]} == {"VRAM", "RAM", "disk"}


def test_what_a_device_does_not_compute_is_computed_by_the_cpu(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --device auto; a device that is named is an error, and so is one that is planned for."""
    reason = "qmix's GPU kernels do not compute this: Attend with sinks"
    for place in ("qmix.engine.device_choice", "qmix.commands.plan.report"):
        monkeypatch.setattr(f"{place}.not_on_device", lambda model: reason)
    refuses_devices(store, reason, monkeypatch)


@pytest.mark.parametrize("kind", [kind for kind in RUN if kind not in ON_DEVICE])
def test_an_architecture_that_a_device_does_not_compute(kind: str, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    refuses_devices(stored(FIRST[kind], tmp_path), not_on_device(read_model(TINY[kind])), monkeypatch)


def refuses_devices(store: Path, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.engine.machine._any", lambda say: StandIn())
    monkeypatch.setattr("qmix.engine.machine.TINY", 0)
    said: list[str] = []
    with load(store, threads=1, context=CONTEXT, placement=Placement("auto"), say=said.append) as engine:
        assert engine.device is None
    assert any(reason in line and line.endswith("; the CPU computes") for line in said)
    with pytest.raises(UsageError, match=re.escape(reason)):
        load(store, threads=1, context=CONTEXT, placement=Placement(StandIn()))
    done = qmix("plan", store, "--vram", "2G")
    assert done.returncode == 2 and f"--vram 2.0 GiB: {reason}" in done.stderr


FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ONE_OF_EACH = {"num_hidden_layers": 2, "full_attention_interval": 2, **FEW_EXPERTS}
SMALL = {"mistral": {"num_hidden_layers": 1}, "olmoe": {"num_hidden_layers": 1, **FEW_EXPERTS},
         "qwen3_moe": {"num_hidden_layers": 2, "mlp_only_layers": [0], **FEW_EXPERTS},
         "glm4_moe": {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2},
         "gemma4": {"num_hidden_layers": 2, "num_experts": 4, "top_k_experts": 2},
         "gpt_oss": {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
         "qwen3_next": ONE_OF_EACH, "qwen3_5_moe": ONE_OF_EACH}


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("kind", [kind for kind in ON_DEVICE if kind != "mixtral"])
def test_tritons_kernels_in_the_engine(kind: str, tmp_path: Path) -> None:
    """Under the interpreter, or on a GPU: the numbers of the CPU's kernels, for a prompt and two tokens at once. It
    takes seconds for a layer; test_device_engine.py has more of Mixtral."""
    store = stored(with_keys(FIRST[kind], SMALL.get(kind, {})), tmp_path)
    # The interpreter gets bf16 products wrong.
    triton = open_cuda(0) if torch.cuda.is_available() else StandIn(half=torch.float16, triton=True)
    found = []
    for device in (StandIn(), triton):
        with everything_there(store, device=device) as engine:
            session = engine.session()
            session.prefill(IDS[:3])
            found.append(session.verify(IDS[3:5]).cpu())
    errors = (found[1] - found[0]).norm(dim=1) / found[0].norm(dim=1)
    assert errors.max() < bounds.model_apart(engine.model.num_layers)

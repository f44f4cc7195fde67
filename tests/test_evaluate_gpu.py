"""Two models compared on one device, the CPU standing in for it: in one budget of its memory, with the figures that the
CPU's engines give; and on the CPU, said, where the device is of no use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import make_store
from test_plan import MIXTRAL

from qmix.bench.text import recorded_text
from qmix.commands.eval import _share_of
from qmix.commands.loading import Loading
from qmix.config import Cancel, QuantConfig
from qmix.demo import CHECKPOINT
from qmix.device import StandIn
from qmix.engine import Engine, Placement, load
from qmix.errors import DoesNotFit, QmixError, UsageError
from qmix.evaluate import Request, run
from qmix.evaluate.memory import (
    Gpu,
    Part,
    divide_on_gpu,
    model_part,
    reference_part,
    taken,
    tensors_beside,
    tensors_to_come,
)
from qmix.offload.needs import Needs
from qmix.offload.plan import RESERVE, STAGING, plan
from qmix.sizes import GIB, MIB

UNQUANTIZED = QuantConfig(experts="keep", dense="keep", method="", group_size=0, block=0)
SHORT = {"window": 128, "most": 400}

pytestmark = pytest.mark.usefixtures("no_thread_stays")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluate-gpu")
    return {"int4": make_store(CHECKPOINT, folder / "int4", QuantConfig()),
            "keep": make_store(CHECKPOINT, folder / "keep", UNQUANTIZED)}


class Loads:
    """An OpenEngine that remembers what it was asked for; `fails`: the load of that number raises `error`."""

    def __init__(self, fails: int | None = None, error: QmixError | None = None):
        self.parts: list[Part | None] = []
        self.engines: list[Engine] = []
        self._fails, self._error = fails, error

    def __call__(self, folder: Path, context: int, part: Part | None) -> Engine:
        self.parts.append(part)
        if len(self.parts) - 1 == self._fails:
            assert self._error is not None
            raise self._error
        assert part is not None
        placement = None if part.vram is None else Placement(StandIn(), part.vram[0], base=part.vram[1])
        self.engines.append(load(folder, threads=1, context=context, ram=part.ram[0], base=part.ram[1], scoring=True,
                                 activations="bf16", placement=placement))
        return self.engines[-1]


def request_of(stores: dict[str, Path], journals: Path, gpu: Gpu | None) -> Request:
    return Request(stores["int4"], recorded_text(), "a text", journals, stores["keep"], activations="bf16",
                   gpu=lambda record: gpu, **SHORT)


def evaluated(request: Request, loads: Loads) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    return run(request, loads, cancel=Cancel(), say=lines.append, progress=lambda *_: None), lines


def test_both_on_the_device_give_the_figures_of_the_cpu(stores: dict[str, Path], tmp_path: Path) -> None:
    """The stand-in computes prompts with the CPU's kernels: what differs is who calls them."""
    want, lines = evaluated(request_of(stores, tmp_path / "cpu", None), Loads())
    assert want["device"] == "CPU" and "reference and model are both computed on the CPU" in lines
    loads = Loads()
    gpu = Gpu("a device", (2 * GIB, 100 * MIB), True)
    got, lines = evaluated(request_of(stores, tmp_path / "gpu", gpu), loads)
    assert got["device"] == "the CPU in a GPU's place"
    assert "reference and model are both computed on a device" in lines
    for name in ("perplexity", "reference_perplexity", "kl_mean", "kl_p99", "top1"):
        assert got[name] == pytest.approx(want[name], rel=1e-5)
    assert got["kl_mean"] > 0
    reference, model = loads.engines
    assert [engine.store.path for engine in loads.engines] == [stores["keep"], stores["int4"]]
    assert model.plan.tiers[0].base == taken(reference.plan.tiers[0])
    assert model.plan.tiers[0].total <= 2 * GIB


def test_a_checkpoint_beside_the_model_on_one_device(stores: dict[str, Path], tmp_path: Path) -> None:
    """As above, the reference being the checkpoint that transformers and accelerate run."""
    pytest.importorskip("accelerate")
    want, _ = evaluated(replace(request_of(stores, tmp_path / "cpu", None), reference=CHECKPOINT), Loads())
    loads, gpu = Loads(), Gpu("a device", (2 * GIB, 100 * MIB), True)
    got, lines = evaluated(replace(request_of(stores, tmp_path / "gpu", gpu), reference=CHECKPOINT), loads)
    assert got["device"] == "the CPU in a GPU's place"
    assert "reference and model are both computed on a device" in lines
    assert any("all its weights in VRAM" in line for line in lines)
    assert got["reference_perplexity"] == want["reference_perplexity"]
    for name in ("perplexity", "kl_mean", "kl_p99", "top1"):
        assert got[name] == pytest.approx(want[name], rel=1e-5)
    small = replace(gpu, budget=(300 * MIB, 0))
    with pytest.raises(DoesNotFit, match=r"both models need .* of VRAM at least, have 300 MiB"):
        evaluated(replace(request_of(stores, tmp_path, small), reference=CHECKPOINT), Loads())
    other = replace(request_of(stores, tmp_path, replace(small, chosen=False)), reference=CHECKPOINT)
    assert any("not on a device: both models need" in line for line in evaluated(other, Loads())[1])


@given(st.integers(0, 200 * GIB), st.integers(0, GIB), st.integers(0, 200 * GIB), st.integers(0, GIB))
def test_a_checkpoint_and_a_model_fit_one_gpu_and_one_ram(vram: int, vram_base: int, ram: int, base: int) -> None:
    """Mixtral 8x7B in bf16 beside int4."""
    needs, least, beside, weights = Needs.of(MIXTRAL, QuantConfig(), 2048, scoring=True), 4 * GIB, 3 * GIB, 87 * GIB
    try:
        granted, above = divide_on_gpu((least, weights), beside, needs, (ram, base), (vram, vram_base))
    except DoesNotFit as e:
        at_least = least + needs.dense + needs.kv + needs.on_device.workspace + needs.least_bytes
        if "of VRAM" in e.message:
            assert vram < vram_base + max(RESERVE, vram // 50) + at_least
        else:
            assert ram < base + max(RESERVE, ram // 50) + beside + STAGING * needs.record
        return
    assert granted >= beside and least <= above <= least + weights
    model = plan(needs, ram, base + granted, vram, vram_base + above)
    for one, budget in zip(model.tiers, (vram, ram), strict=True):
        assert one.total <= budget
    fast = model.tiers[0]
    held = vram_base + fast.dense + fast.kv + fast.experts
    assert held + tensors_beside(above, model) == vram - fast.beside
    if above < least + weights and not model.resident:  # nothing lies idle in VRAM while a model is short of it
        assert vram - fast.total < needs.record + 2 * MIB + vram // 1000


def test_a_store_is_at_no_distance_from_itself(stores: dict[str, Path], tmp_path: Path) -> None:
    gpu = Gpu("a device", (2 * GIB, 0), True)
    found, _ = evaluated(replace(request_of(stores, tmp_path, gpu), reference=stores["int4"]), Loads())
    assert (found["kl_mean"], found["kl_p99"], found["top1"]) == (0, 0, 1)


def test_a_run_on_a_device_is_another_evaluation(stores: dict[str, Path], tmp_path: Path) -> None:
    gpu = Gpu("a device", (2 * GIB, 0), True)
    evaluated(request_of(stores, tmp_path, None), Loads())
    assert not any("resumed" in line for line in evaluated(request_of(stores, tmp_path, gpu), Loads())[1])
    assert any("resumed" in line for line in evaluated(request_of(stores, tmp_path, gpu), Loads())[1])


@pytest.mark.parametrize("fails", [0, 1])
def test_where_auto_cannot_use_the_device_the_cpu_computes_both(stores: dict[str, Path], tmp_path: Path,
                                                                fails: int) -> None:
    error = DoesNotFit("the GPU did not allocate 3 GiB for expert slots")
    loads = Loads(fails, error)
    found, lines = evaluated(request_of(stores, tmp_path, Gpu("a card", (2 * GIB, 0), False)), loads)
    assert f"not on a card: {error.message}; the CPU computes both models" in lines and found["device"] == "CPU"
    assert [part is not None and part.vram is not None for part in loads.parts] == [True] * (fails + 1) + [False] * 2
    with pytest.raises(DoesNotFit, match="did not allocate 3 GiB"):
        evaluated(request_of(stores, tmp_path, Gpu("a card", (2 * GIB, 0), True)), Loads(fails, error))


def test_a_device_that_is_too_small_is_said_with_the_numbers(stores: dict[str, Path], tmp_path: Path) -> None:
    small = Gpu("a card", (RESERVE, 0), True)
    with pytest.raises(DoesNotFit, match=r"both models need .* of VRAM at least, have 256 MiB"):
        evaluated(request_of(stores, tmp_path, small), Loads())
    _, lines = evaluated(request_of(stores, tmp_path, replace(small, chosen=False)), Loads())
    assert any("not on a card: both models need" in line for line in lines)


@given(st.integers(0, 80 * GIB), st.integers(0, GIB), st.integers(0, 100 * GIB), st.integers(0, GIB),
       st.sampled_from([256, 4096]))
def test_two_models_fit_one_gpu_and_one_ram(vram: int, vram_base: int, ram: int, base: int, context: int) -> None:
    first, second = (Needs.of(MIXTRAL, quant, context, scoring=True) for quant in (UNQUANTIZED, QuantConfig()))
    least = sum(n.dense + n.kv + n.on_device.workspace + n.least_bytes for n in (first, second))
    try:
        part = reference_part(first, second, (ram, base), (vram, vram_base))
    except DoesNotFit as e:
        if "of VRAM" in e.message:
            assert vram < vram_base + max(RESERVE, vram // 50) + least
        else:
            assert ram < base + max(RESERVE, ram // 50) + STAGING * (first.record + second.record)
        return
    assert part.vram is not None
    reference = plan(first, *part.ram, *part.vram)
    rest = model_part(reference, (ram, base), (vram, vram_base))
    assert rest.vram is not None
    model = plan(second, *rest.ram, *rest.vram)
    for one, budget in zip(model.tiers, (vram, ram), strict=True):
        assert one.total <= budget
    fast, theirs = model.tiers[0], reference.tiers[0]
    held = vram_base + sum(t.dense + t.kv + t.experts for t in (fast, theirs))
    assert held + tensors_to_come(reference, model) == vram - fast.beside
    if not (reference.resident and model.resident):  # nothing lies idle in RAM
        assert ram - model.ram.total < max(first.record, second.record) + 2 * MIB + ram // 1000


def test_flags_that_carry_a_part() -> None:
    how = Loading(margin="1G", device="auto")
    on_cpu = _share_of(how, Part((5 * GIB, 1)))
    assert (on_cpu.ram, on_cpu.margin, on_cpu.device, on_cpu.vram) == (str(5 * GIB), None, "cpu", "auto")
    part = Part((5 * GIB, 1), (7 * GIB, 2))
    on_gpu = _share_of(how, part)
    assert (on_gpu.device, on_gpu.vram, on_gpu.pin) == ("cuda", str(7 * GIB), "auto")
    limited = _share_of(replace(how, device="cuda:1", pin="2G"), part)
    assert (limited.device, limited.pin) == ("cuda:1", str(GIB))


@pytest.mark.parametrize(("flags", "words"), [(["--device", "cuda"], "torch sees no NVIDIA GPU"),
                                              (["--vram", "8G"], "no GPU is in use"),
                                              (["--pin", "1G"], "no GPU is in use")])
def test_without_a_gpu_its_flags_are_refused(stores: dict[str, Path], flags: list[str], words: str, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    from qmix.cli import main

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "text").write_text("x y z and so on")
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(stores["int4"]), "-f", str(tmp_path / "text"), "--against", str(stores["keep"]), *flags])
    assert ended.value.code == UsageError.exit_code and words in capsys.readouterr().err

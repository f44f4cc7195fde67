"""`--fit auto`: what it chooses for described machines and for this one with faked memory, and its promise of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from helpers import write_tiny_checkpoint
from model_configs import TINY, with_keys
from test_cli import qmix
from test_hardware import fake_root
from test_planning import MIXTRAL
from tokenizer_files import DEMO_TEMPLATE, spm_model

from qmix import demo, hardware
from qmix.checkpoint import Checkpoint
from qmix.commands.fitting import FASTER, fit_auto
from qmix.commands.plan.report import Machine, plan_trunk
from qmix.commands.quantization import Described, Flags
from qmix.commands.quantize import command
from qmix.commands.quantize.calibration import mixed_config, own_text
from qmix.config import QuantConfig
from qmix.errors import DoesNotFit
from qmix.models import read_model
from qmix.offload.forecast import Speeds, forecast
from qmix.offload.head import plan_with_head
from qmix.offload.plan import PROGRAM, Needs
from qmix.quantize.fit import even, smallest
from qmix.quantize.mix import FORMATS
from qmix.quantize.sensitivity import Sensitivity
from qmix.sizes import GIB, MIB
from qmix.spec import Model
from qmix.store import Store

SPEEDS = Speeds(40, 3, 25, 900)
MODEL = read_model(MIXTRAL)
HEADED = read_model(with_keys(TINY["qwen3_5_moe"], {
    "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 256, "mtp_num_hidden_layers": 1}))
SOURCE = Described(MODEL, None)
with Checkpoint.open(demo.CHECKPOINT) as _demo:
    EXPERTS, LEAST = (Needs.of(_demo.model, quant, 8).expert_bytes
                      for quant in (QuantConfig(), smallest(_demo.model, QuantConfig())))
INT4 = Needs.of(MODEL, QuantConfig(), 8192)


def plan_ram(model: Model) -> int:
    """Bytes that a plan takes beside experts."""
    needs = Needs.of(model, QuantConfig(), model.max_positions)
    return PROGRAM + needs.dense + needs.kv + needs.workspace + 256 * MIB


def fitted(machine: Machine) -> tuple[Any, list[str]]:
    said: list[str] = []
    return fit_auto(SOURCE, Flags(), machine, 0, "bf16", SPEEDS, said.append), said


@pytest.mark.parametrize("ram", [17.5, 18, 20, 22.7, 24, 27])
def test_a_mix_fills_ram_and_no_more(ram: float) -> None:
    """All experts in memory, and no mix of a record more would be."""
    machine = Machine(ram=int(ram * GIB))
    found, said = fitted(machine)
    assert found.wanted is not None and "does not fit into RAM" in said[0]
    plan = plan_trunk(Needs.of(MODEL, even(MODEL, QuantConfig(), found.wanted), 8192), machine)
    assert plan.resident and plan.ram.total <= int(ram * GIB)
    assert plan.ram.budget - plan.ram.total < INT4.record, "less than a record is left over"
    assert found.wanted.records < INT4.expert_bytes


def test_where_the_default_fits_no_mix_is_made() -> None:
    needed = PROGRAM + INT4.dense + INT4.kv + INT4.workspace + INT4.expert_bytes
    enough = next(ram for ram in range(needed, 2 * needed, MIB) if ram - max(256 * MIB, ram // 50) >= needed)
    found, said = fitted(Machine(ram=enough))
    assert found.wanted is None and found.fits(QuantConfig()) and "fits into RAM as it is" in said[0]
    found, said = fitted(Machine(ram=enough - 2 * MIB))
    assert found.wanted is not None and not found.fits(QuantConfig())


@pytest.mark.parametrize(("ram", "mix"), [(15, True), (12, False), (6, False)])
def test_too_small_for_any_mix(ram: int, mix: bool) -> None:
    """Said with both speeds; the smallest mix only where it is at least FASTER times as fast."""
    machine = Machine(ram=ram * GIB)
    found, said = fitted(machine)
    least = smallest(MODEL, QuantConfig())
    speeds = [forecast(plan_trunk(Needs.of(MODEL, quant, 8192), machine), SPEEDS).least
              for quant in (least, QuantConfig())]
    assert (speeds[0] >= FASTER * speeds[1]) is mix is (found.wanted is not None)
    assert "not even the smallest mix" in said[0] and f"{speeds[1 if mix else 0]:.2f} to" in said[1]
    if found.wanted is not None:
        assert found.wanted.records == Needs.of(MODEL, least, 8192).expert_bytes


def test_nothing_runs_in_too_little() -> None:
    with pytest.raises(DoesNotFit, match="short of"):
        fitted(Machine(ram=3 * GIB))


@pytest.mark.parametrize(("vram", "ram", "where"), [
    (80, 32, "fits into VRAM as it is"), (24, 32, "does not fit into VRAM;"), (12, 32, "fits into VRAM and RAM"),
    (8, 16, "does not fit into VRAM and RAM"), (6, 8, "not even the smallest mix")])
def test_with_a_gpu_vram_comes_first(vram: int, ram: int, where: str) -> None:
    machine = Machine(ram=ram * GIB, vram=vram * GIB)
    found, said = fitted(machine)
    assert where in said[0]
    if found.wanted is not None and "VRAM" in where:
        plan = plan_trunk(Needs.of(MODEL, even(MODEL, QuantConfig(), found.wanted), 8192), machine)
        assert plan.resident and all(tier.total <= tier.budget for tier in plan.tiers)
        assert plan.tiers[0].slots >= plan.needs.records or "and RAM" in where


def test_plan_forecasts_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    done = qmix("plan", tmp_path / "config.json", "--fit", "auto", "--ram", "24G", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["on_disk_bytes"] == 0 and found["record_bytes"] < INT4.record
    assert "fit: int4" in done.stderr and "bits a weight" in done.stderr and "KL divergence" in done.stderr
    dense = ("--dense", "int4", "--group-size", 32)
    done = qmix("plan", tmp_path / "config.json", "--fit", "auto", "--ram", "24G", *dense)
    assert done.returncode == 0, done.stderr
    for flags, word in ((("--fit", "22G"), "--fit auto alone"), (("--fit", "auto", "--format", "int4"), "--format"),
                        (("--fit", "auto", "--group-size", 32), "--group-size")):
        done = qmix("plan", tmp_path / "config.json", *flags)
        assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr


def test_memory_that_a_cgroup_limits_is_what_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GiB free of a machine with more: the same mix as for --ram of what `auto` takes of that."""
    limit, used = 26 * GIB, 2 * GIB
    root = fake_root(tmp_path, {"proc/self/cgroup": "0::/app\n", "sys/fs/cgroup/app/memory.max": f"{limit}\n",
                                "sys/fs/cgroup/app/memory.current": f"{used}\n"})
    real = hardware.memory
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=60 * GIB))
    monkeypatch.setattr("qmix.hardware.memory", lambda: real(root))
    monkeypatch.setattr("qmix.hardware.address_space_left", lambda: None)
    monkeypatch.setattr("qmix.hardware.resident_bytes", lambda: 400 * MIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = fit_auto(SOURCE, Flags(), Machine(), 0, "bf16", SPEEDS, lambda line: None)
    want = fitted(Machine(ram=limit - used + 400 * MIB - GIB))[0]
    assert found.wanted == want.wanted is not None


@pytest.fixture
def quantize_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Quantizes the demo with --fit auto on a machine with so many bytes of RAM for experts; what was said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(room: int, dry_run: bool) -> str:
        with Checkpoint.open(demo.CHECKPOINT) as checkpoint:
            ram = plan_ram(checkpoint.model) + room
        monkeypatch.setattr("qmix.commands.plan.report._ram", lambda machine: ram)
        command.quantize(str(demo.CHECKPOINT), tmp_path / "store", fit="auto", threads=1, dry_run=dry_run)
        return capsys.readouterr().err

    return run


def test_a_mix_is_made_and_what_it_costs_is_said(quantize_in: Any, tmp_path: Path) -> None:
    room = (EXPERTS + LEAST) // 2
    said = quantize_in(room, dry_run=False)
    with Store.open(tmp_path / "store") as store:
        records = sum(store.layout.record(key).nbytes for key in store.model.expert_keys)
        assert store.quant.experts == "mixed" and LEAST < records <= room
    assert "no --calibration FILE" in said and "predicted from 512 tokens of qmix's own text" in said


def test_what_fits_is_not_measured(quantize_in: Any) -> None:
    said = quantize_in(EXPERTS, dry_run=True)
    assert "nothing is measured" in said and "measuring" not in said and "int4 g64 hqq" in said


def test_the_smallest_mix_is_all_of_one_kind(quantize_in: Any) -> None:
    said = quantize_in(LEAST, dry_run=True)
    assert "int2g64" in said or "int2 g64" in said, said


def test_memory_that_shrinks_while_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fitted before fits after, and what fits at no size ends."""
    with Checkpoint.open(demo.CHECKPOINT, False) as checkpoint:
        model = checkpoint.model
        ram = [plan_ram(model) + (EXPERTS + LEAST) // 2]
        monkeypatch.setattr("qmix.commands.plan.report._ram", lambda machine: machine.ram or ram[0])
        found = fit_auto(checkpoint, Flags(), Machine(), 0, "bf16", SPEEDS, lambda line: None)
        assert found.wanted is not None and found.wanted.records > LEAST
        ram[0] //= 2
        assert found.fits(even(model, QuantConfig(), found.wanted))
        damages = {m: dict.fromkeys(FORMATS, 1.0) for m in ("w13", "w2")}
        alike = Sensitivity(dict.fromkeys(model.expert_keys, damages), {}, ())
        monkeypatch.setattr("qmix.quantize.fit.sensitivity", lambda *args: alike)
        with pytest.raises(DoesNotFit, match="not even the smallest mix"):
            mixed_config(checkpoint, QuantConfig(), found.wanted, own_text(checkpoint), 1, fits=lambda quant: False)


@pytest.mark.parametrize("room", [0.1, 0.5, 0.9])
def test_a_head_that_leaves_room_for_the_experts(room: float) -> None:
    """Where the default format fits without its multi-token-prediction head, loading has all experts in memory."""
    whole, trunk = (Needs.of(m, QuantConfig(), 512) for m in (HEADED, HEADED.trunk))
    assert HEADED.mtp_head is not None
    ram = next(ram for ram in range(trunk.expert_bytes, 4 * trunk.expert_bytes, MIB) if _resident(trunk, ram))
    ram += int(room * (whole.expert_bytes - trunk.expert_bytes))
    found = fit_auto(Described(HEADED, None), Flags(), Machine(ram=ram), 512, "bf16", SPEEDS, lambda line: None)
    assert found.wanted is None and plan_with_head(whole, trunk, ram, PROGRAM)[0].resident


def _resident(needs: Needs, ram: int) -> bool:
    try:
        return plan_trunk(needs, Machine(ram=ram)).resident
    except DoesNotFit:
        return False


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "tiny", vocab_size=512)
    (source / "tokenizer.model").write_bytes(spm_model())
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": DEMO_TEMPLATE}))
    for flags, word in ((("--sensitivity", "full"), "--sensitivity full"),
                        (("--fit", "auto", "--bpw", "3"), "one size"),
                        (("--fit", "auto", "--sensitivity", "x"), "sampled or full"),
                        (("--fit", "auto", "--calibration-tokens", "9"), "--calibration FILE"),
                        (("--fit", "auto", "--method", "gptq"), "--calibration FILE")):
        done = qmix("quantize", source, tmp_path / "out", *flags)
        assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr, done.stderr

"""The contents of `qmix plan`: where every byte of a model would go, and how fast it should then run.

It works for a store, a checkpoint or a config.json alone, and for this machine or one described by its sizes and
bandwidths. Nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmix import hardware
from qmix.bounded import MAX_TEXT, parse_json, read_file
from qmix.checkpoint import Checkpoint, ignored_keys, is_consolidated
from qmix.commands.quantization import Described, Flags, choose
from qmix.commands.skipped import skipped_lines
from qmix.config import ExpertKey, QuantConfig
from qmix.engine import Placement
from qmix.errors import CheckpointError, ConfigError, UsageError
from qmix.forward.lower_device import not_on_device
from qmix.gguf.header import is_gguf
from qmix.hardware.gpu_memory import GpuMemory
from qmix.models import published_experts, read_model
from qmix.offload import router_stats
from qmix.offload.forecast import Speeds, forecast, known_shares
from qmix.offload.head import plan_with_head
from qmix.offload.needs import Needs, choose_context
from qmix.offload.plan import CUDA_CONTEXT, PROGRAM, UNMEASURED, Plan, margin_of
from qmix.offload.plan import plan as make_plan
from qmix.schemes import read_quantization
from qmix.shards import read_json
from qmix.sizes import format_bytes, record_layouts
from qmix.spec import Model
from qmix.store import CONFIG, MANIFEST, Store

TYPICAL = Speeds(ram=40.0, disk=3.0, pcie=25.0, vram=900.0)  # GB/s, for what was neither measured nor given


How = Callable[[Checkpoint | Described, Flags, Callable[[str], None]], QuantConfig]


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes and GB/s; None where they are to be found out, and vram None also without a GPU. vram_taken: of vram, by
    this process and the driver; None = as gpu says, which is what was measured on one, or as much as is usual. pin:
    bytes of ram that may be page-locked; None = all."""

    ram: int | None = None
    margin: int | None = None
    vram: int | None = None
    ram_speed: float | None = None
    vram_speed: float | None = None
    pcie: float | None = None
    disk: float | None = None
    vram_taken: int | None = None
    pin: int | None = None
    gpu: GpuMemory | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """shares: of tokens that chose each expert, {} where this model has no router statistics yet."""

    name: str
    model: Model
    quant: QuantConfig
    shares: Mapping[ExpertKey, float]


def by_flags(source: Checkpoint | Described, flags: Flags, say: Callable[[str], None]) -> QuantConfig:
    """As `qmix quantize` with these flags has it."""
    return choose(source, flags, None, say)[0]


def find_model(path: Path, flags: Flags | None, state: Path | None, say: Callable[[str], None],
               how: How = by_flags) -> Planned:
    """The model at `path`: a store, a GGUF file, a folder with a config.json, or a config.json. flags: how `qmix
    quantize` would be called for one that is no store, which decides and is said as there; None = without any. how:
    finds the formats of such a one. UsageError for a store, which is quantized."""
    flags = flags or Flags()
    if (path / MANIFEST).is_file():
        if flags != Flags():
            raise UsageError(f"{path}: is quantized already", "drop --format, --group-size and --dense")
        with Store.open(path) as store:
            model = store.model
            stats = router_stats.load(state, store.identity, len(model.record_layers), model.num_experts, say)
            return Planned(path.resolve().name, model, store.quant, known_shares(stats))
    weights = is_gguf(path) or _is_lowbit(path) or is_consolidated(path)
    model, quant = (_read_weights if weights else _read_config)(path, flags, say, how)
    return Planned(path.resolve().name, model, quant, {})


def _is_lowbit(path: Path) -> bool:
    """Whether it is a folder with weights that are quantized already: what of them can stay is seen in the files."""
    if not path.is_dir() or not any(path.glob("*.safetensors")):
        return False
    try:
        raw = read_json(path / CONFIG)
        return (raw.get("quantization_config") is not None or (path / "hf_quant_config.json").exists()) \
            and published_experts(raw) is None
    except (CheckpointError, ConfigError):  # said when it is read
        return False


def _read_weights(path: Path, flags: Flags, say: Callable[[str], None], how: How) -> tuple[Model, QuantConfig]:
    """The model of a GGUF file, or of a folder, and how it is quantized. What `qmix quantize` would say is said."""
    with Checkpoint.open(path) as checkpoint:
        for line in skipped_lines(checkpoint):
            say(f"skipped: {line}")
        for note in checkpoint.notes:
            say(f"note: {note}")
        return checkpoint.model, how(checkpoint, flags, say)


def _read_config(path: Path, flags: Flags, say: Callable[[str], None], how: How) -> tuple[Model, QuantConfig]:
    """The same, of a folder with a config.json, or of a config.json."""
    file = path / CONFIG if path.is_dir() else path
    try:
        raw = parse_json(read_file(file, MAX_TEXT, CheckpointError, "name a store, a checkpoint or a config.json"))
        if not isinstance(raw, dict):
            raise ValueError("not an object")
        model = read_model(raw)
        published = published_experts(raw)
        if raw.get("quantization_config") is not None and published is None:
            say(f"note: {file}: quantization_config: {read_quantization(raw['quantization_config']).title}: what of it "
                "can stay as it is is seen in the weights, which are not here")
    except ConfigError as e:
        raise CheckpointError(f"{file}: {e.message}", e.cure) from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: {getattr(e, 'strerror', None) or str(e).splitlines()[0]}",
                              "name a store, a checkpoint or a config.json") from None
    for note in ignored_keys(file, raw):
        say(f"note: {note}")
    return model, how(Described(model, published), flags, say)


def find_gpu(planned: Planned, machine: Machine, device: str, say: Callable[[str], None]) -> Machine:
    """`machine` with the memory that the engine would take of this machine's GPU, said; as it is where its GPU is
    described, or none is to be used here. device: as of `--device`. Raises what the engine would."""
    if machine.vram is not None:
        if device != "auto":
            raise UsageError(f"--device {device}: --vram describes a GPU", "drop one of the two")
        if lacking := not_on_device(planned.model):
            raise UsageError(f"--vram {format_bytes(machine.vram)}: {lacking}", "plan without a GPU")
        return machine
    placement = Placement(device)
    found = placement.open(max(layout.nbytes for layout in record_layouts(planned.model, planned.quant)), say)
    if found is None:
        return machine
    if lacking := not_on_device(planned.model):
        found.close()
        if device != "auto":
            raise UsageError(f"--device {device}: {lacking}", "plan without a GPU")
        say(f"not on {found.name}: {lacking}; planned for the CPU")
        return machine
    try:
        vram, taken = placement.vram_budget(found)
    finally:
        found.close()
    say(f"planned for {found.name} with {format_bytes(vram)} of its memory (--vram 24G plans for another GPU, --device "
        "cpu for none)")
    measured = machine.gpu if machine.gpu is not None and machine.gpu.card == found.name else None
    return replace(machine, vram=vram, vram_taken=taken, pin=placement.pin_budget(), gpu=measured)


def describe(planned: Planned, context: int, machine: Machine, known: Speeds | None, say: Callable[[str], None],
             kv: str = "bf16") -> dict[str, Any]:
    """All that `qmix plan` prints, as nested plain data; kv: how keys and values are kept. DoesNotFit says how much is
    missing."""
    if context > planned.model.max_positions:
        raise UsageError(f"--ctx-size {context}: the model was trained for {planned.model.max_positions} positions",
                         f"choose at most {planned.model.max_positions}")
    model = planned.model
    if model.mtp_head is not None and machine.vram is not None:
        say("without the multi-token-prediction head, which a GPU does not compute yet")
        model = model.trunk
    needs = Needs.of(model, planned.quant, choose_context(model, context), kv)
    if machine.vram is not None:
        say(_beside_line(machine))
    if model.mtp_head is not None:
        found, left_out = plan_with_head(needs, Needs.of(model.trunk, planned.quant, needs.context, kv), _ram(machine),
                                         PROGRAM)
        if left_out:
            say(left_out)
    else:
        found = plan_trunk(needs, machine)
    needs = found.needs
    speeds, assumed = speeds_of(machine, known)
    if assumed:
        say(f"assumed, neither measured nor given: {', '.join(assumed)} (qmix doctor --bandwidth measures)")
    guess = forecast(found, speeds, planned.shares)
    return {
        "model": planned.name, "context": needs.context, "kv_cache": needs.kv_cache,
        "records": needs.records, **({"mtp_records": needs.mtp} if needs.mtp else {}),
        "record_bytes": needs.record, "in_memory": found.slots,
        "on_disk_bytes": found.on_disk,
        "memory": _rows(found),
        "hit_rate": round(guess.hit, 4), "hit_rate_from": "router statistics" if planned.shares else
        "all experts equally likely", "disk_bytes_per_token": guess.disk_bytes,
        "tokens_per_second": [round(guess.least, 2), round(guess.most, 2)], "limited_by": guess.bottleneck,
        "plan": found.lines(), "forecast": guess.line().removeprefix("forecast: "),
    }


def known_gpu(file: Path | None, say: Callable[[str], None]) -> GpuMemory | None:
    """What runs on a GPU have measured of its memory; None where there were none."""
    from qmix.hardware import gpu_memory

    return None if file is None else gpu_memory.load(file, say)


def plan_trunk(needs: Needs, machine: Machine) -> Plan:
    """Where a model without a multi-token-prediction head goes; DoesNotFit says how much is missing."""
    gpu = machine.gpu
    taken = machine.vram_taken if machine.vram_taken is not None else gpu.context if gpu else CUDA_CONTEXT
    beside = gpu.beside if gpu else UNMEASURED
    return make_plan(needs, _ram(machine), PROGRAM, machine.vram, taken, machine.pin, beside)


def at_once(machine: Machine) -> Machine:
    """`machine` with the RAM that there is now, which later plans for it then have too."""
    return replace(machine, ram=_ram(machine), margin=None)


def _beside_line(machine: Machine) -> str:
    """How it is known what of a GPU's memory torch does not count."""
    gpu = machine.gpu
    what = "code and graphs" if machine.vram_taken is not None else "the driver, code and graphs"
    return (f"of VRAM, for {what}: as measured on {gpu.card} on {gpu.measured}" if gpu else
            f"of VRAM, for {what}: assumed, the first run on a GPU measures it")


def _ram(machine: Machine) -> int:
    if machine.ram is not None:
        if machine.margin is not None:
            raise UsageError("--margin: only has an effect with --ram auto", "drop one of --ram and --margin")
        return machine.ram
    mappable = hardware.address_space_left()
    available = hardware.memory().available
    available = available if mappable is None else min(available, mappable)
    return hardware.resident_bytes() + available - margin_of(available, machine.margin)


def speeds_of(machine: Machine, known: Speeds | None) -> tuple[Speeds, list[str]]:
    """(GB/s: given, else measured, else typical; what is only typical, as text)."""
    wanted = ["ram", "disk", *(["pcie", "vram"] if machine.vram is not None else [])]
    given = {"ram": machine.ram_speed, "disk": machine.disk, "pcie": machine.pcie, "vram": machine.vram_speed}
    if machine.vram is None:
        for flag, value in (("--pcie", machine.pcie), ("--vram-speed", machine.vram_speed)):
            if value is not None:
                raise UsageError(f"{flag} {value:g}: only has an effect with a GPU, and none is in use",
                                 "name a GPU's memory with --vram too")
    values: dict[str, float] = {}
    assumed = []
    for name in wanted:
        value = given[name] or (getattr(known, name) if known is not None else None)
        if value is None:
            value = getattr(TYPICAL, name)
            assumed.append(f"{name} {value:g} GB/s")
        values[name] = value
    return Speeds(**values), assumed


def _rows(plan: Plan) -> list[dict[str, Any]]:
    rows = []
    for tier in plan.tiers:
        rows += [{"memory": tier.name, "holds": name, "bytes": nbytes, "size": format_bytes(nbytes)}
                 for name, nbytes in tier.parts()]
        free = tier.budget - tier.total
        rows.append({"memory": tier.name, "holds": "unused", "bytes": free, "size": format_bytes(free)})
    return [*rows, {"memory": "disk", "holds": "experts", "bytes": plan.on_disk, "size": format_bytes(plan.on_disk)}]

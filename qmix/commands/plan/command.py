"""`qmix plan`: the flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qmix import hub, paths, render
from qmix.commands.loading import known_speeds
from qmix.commands.options import (
    Context,
    Device,
    Json,
    KvCache,
    Margin,
    ModelArgument,
    Ram,
    margin_bytes,
    model_folder,
    size_or_auto,
)
from qmix.commands.quantization import Described, Flags
from qmix.config import QuantConfig
from qmix.errors import UsageError
from qmix.hub import MANIFEST

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint


def plan(
    model: ModelArgument = None, ctx_size: Context = 0,
    ram: Ram = "auto", margin: Margin = None,
    vram: Annotated[str, typer.Option("--vram", help="Memory of a GPU (24G): what the model would do there; auto = of "
                                      "this machine's, where it has one.")] = "auto",
    device: Device = "auto",
    disk: Annotated[float | None, typer.Option("--disk", min=0.001, max=1e5, show_default=False,
                                               help="Disk bandwidth, GB/s; default: as measured.")] = None,
    ram_speed: Annotated[float | None, typer.Option("--ram-speed", min=0.001, max=1e5, show_default=False,
                                                    help="Memory bandwidth, GB/s; default: as measured.")] = None,
    pcie: Annotated[float | None, typer.Option("--pcie", min=0.001, max=1e5, show_default=False,
                                               help="Host-to-GPU bandwidth, GB/s.")] = None,
    vram_speed: Annotated[float | None, typer.Option("--vram-speed", min=0.001, max=1e5, show_default=False,
                                                     help="GPU memory bandwidth, GB/s.")] = None,
    format: Annotated[str | None, typer.Option("--format", show_default=False,
                                               help="For a model that is no store: as of qmix quantize.")] = None,
    dense: Annotated[str | None, typer.Option("--dense", show_default=False, help="The same for attention.")] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", show_default=False, help="The same.")] = None,
    fit: Annotated[str | None, typer.Option("--fit", show_default=False, help="auto: the formats that qmix quantize "
                                            "--fit auto chooses for that machine; only a size is forecast of a mix, "
                                            "nothing is measured.")] = None,
    kv_cache: KvCache = "bf16", json: Json = False,
) -> None:
    """Print where every byte of a model would go and how fast it should run; exit 3 if it cannot fit."""
    from qmix.commands.plan import report as planning

    flags = Flags(format, dense, group_size=group_size)
    if fit not in (None, "auto"):
        raise UsageError(f"--fit {fit}: plan knows --fit auto alone", "drop it: --ram and --vram describe a machine")
    if fit is not None and (format is not None or (group_size is not None and dense != "int4")):
        raise UsageError("--fit auto: chooses the formats itself", "drop --format and --group-size")
    path = paths.resolve(model, render.say, "config") if model else model_folder(model)

    def say(line: str) -> None:
        """Of a GGUF model of the hub, the file is a preview in a folder that nobody knows."""
        render.say(line.replace(str(path), path.name) if model and hub.is_preview(path) else line)

    machine = planning.Machine(size_or_auto("--ram", ram), margin_bytes(margin),
                               size_or_auto("--vram", vram), ram_speed, vram_speed, pcie, disk,
                               gpu=planning.known_gpu(paths.if_any(paths.gpu_memory_file), render.say))
    known = known_speeds(paths.if_any(paths.hardware_file), render.say)

    def fitted(source: Checkpoint | Described, flags: Flags, say: Callable[[str], None]) -> QuantConfig:
        from qmix.commands.fitting import forecast_fit

        return forecast_fit(source, flags, machine, device, ctx_size, kv_cache, known, say)

    if fit is not None and (path / MANIFEST).is_file():
        raise UsageError(f"{path}: is quantized already", "drop --fit auto")
    found = planning.find_model(path, flags, paths.if_any(paths.routing_folder), say,
                                planning.by_flags if fit is None else fitted)
    if fit is not None and found.quant.experts == "mixed":
        found = replace(found, model=found.model.trunk)  # a mix that is measured has no multi-token-prediction head
    machine = planning.find_gpu(found, machine, device, render.say)
    print(render.document(planning.describe(found, ctx_size, machine, known, render.say, kv_cache), as_json=json))

"""From the flags to a loaded engine: how a command brings a model up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmix import paths, render
from qmix.commands.options import margin_bytes, size_or_auto
from qmix.errors import UsageError

if TYPE_CHECKING:
    from qmix.offload.forecast import Speeds


@dataclass(frozen=True, slots=True)
class Loading:
    """How a model is brought up: threads and context, budget, paging, KV cache, device; mtp: with its
    multi-token-prediction head, where the store has one."""

    ctx_size: int = 0
    threads: int | None = None
    ram: str = "auto"
    margin: str | None = None
    cache_policy: str = "auto"
    prefetch: str = "auto"
    no_prefetch: bool = False
    verify: str = "first"
    activations: str = "auto"
    kv_cache: str = "bf16"
    trace: Path | None = None
    device: str = "cpu"
    vram: str = "auto"
    pin: str = "auto"
    exact: bool = False
    mtp: bool = False


def load_engine(folder: Path, how: Loading, keep_statistics: bool = True,
                base: int | None = None, say: Callable[[str], None] = render.say, recorder: Any = None,
                scoring: bool = False, vram_base: int | None = None) -> Any:
    """The engine, its choices said and its loading shown on stderr. keep_statistics: start with the router
    statistics of earlier runs, and add to them. base, scoring: see engine.load; vram_base: see engine.Placement;
    recorder: its `trace`, where that is no file."""
    from qmix.engine import Placement, load

    ram = size_or_auto("--ram", how.ram)
    margin = margin_bytes(how.margin)
    if how.no_prefetch and how.prefetch not in ("auto", "off"):
        raise UsageError(f"--no-prefetch with --prefetch {how.prefetch}", "drop one of the two")
    state = paths.if_any(paths.routing_folder) if keep_statistics else None
    if keep_statistics and state is None:
        say("no home folder: router statistics are not kept (set HOME or XDG_STATE_HOME)")
    with render.byte_bar("load") as progress:
        return load(folder, threads=how.threads, context=how.ctx_size, ram=ram, margin=margin, policy=how.cache_policy,
                    prefetch="off" if how.no_prefetch else how.prefetch, verify=how.verify,
                    activations=how.activations, kv=how.kv_cache, trace=how.trace if recorder is None else recorder,
                    state=state, speeds=known_speeds(paths.if_any(paths.hardware_file), render.say),
                    base=base, scoring=scoring, mtp=how.mtp, say=say, progress=progress,
                    placement=Placement(how.device, size_or_auto("--vram", how.vram), size_or_auto("--pin", how.pin),
                                        how.exact, vram_base, paths.if_any(paths.kernels_file),
                                        paths.if_any(paths.gpu_memory_file)))


def known_speeds(cache_file: Path | None, say: Callable[[str], None]) -> Speeds | None:
    """What `qmix doctor --bandwidth` measured on this machine; None where it did not, or there is no such file."""
    if cache_file is None or not cache_file.is_file():
        return None
    from qmix.hardware import bandwidth
    from qmix.offload.forecast import Speeds

    measured = bandwidth.load(cache_file, say)
    if measured is None or measured.disk_gbps is None:
        return None
    return Speeds(measured.ram_gbps, measured.disk_gbps, measured.h2d_gbps, measured.vram_gbps)

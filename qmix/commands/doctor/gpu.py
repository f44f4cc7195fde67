"""The GPU's part of the report: the cards, and, for the one that `--device auto` takes, its kernels and whether memory
can be page-locked for it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from qmix.commands.doctor.problem import Problem, Section
from qmix.config import BLOCKS, GROUPED_BITS
from qmix.device.cuda import Cuda, open_cuda
from qmix.device.pinning import PAGE, pin_pool
from qmix.errors import QmixError
from qmix.hardware.memory import anonymous_memory
from qmix.kernels.device_table import choose_device_kernels
from qmix.kernels.table import KernelTable
from qmix.sizes import MIB, MX_BLOCK

PROBE = 64 * MIB  # page-locked for a moment
FORMATS = (*((name, block) for name in GROUPED_BITS for block in BLOCKS), ("mxfp4", MX_BLOCK), ("int8", 0))


def gpu(root: Path, say: Callable[[str], None]) -> Section:
    """root: as / for what the driver shows. say: told what takes a while."""
    if not torch.cuda.is_available():
        if not (root / "proc/driver/nvidia/version").exists():
            return {"devices": []}, []
        return {"devices": []}, [Problem("an NVIDIA driver is loaded, but torch sees no GPU",
                                         "install a torch build with CUDA that suits the driver (nvidia-smi)")]
    report: dict[str, Any] = {"devices": [_about(i) for i in range(torch.cuda.device_count())]}
    try:
        device = open_cuda(0)
    except QmixError as e:
        return report, [Problem(f"the GPU cannot be used: {e.message.removeprefix('--device ')}",
                                e.cure or "use --device cpu")]
    except Exception as e:  # a driver and a torch that do not suit each other fail in many ways
        return report, [Problem(f"the GPU does not start: {line(e)}", "`nvidia-smi` should show the card; install a "
                                "torch build with CUDA that suits the driver")]
    report["prompts_compute_in"] = "bf16" if device.half == torch.bfloat16 else "fp16: the card has no bf16 products"
    report["kernels"], problems = kernels(device, say)
    report["page_locking"], more = page_locking()
    return report, problems + more


def _about(i: int) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(i)
    try:
        free: int | str = torch.cuda.mem_get_info(i)[0]
    except RuntimeError:  # a GPU that another process has for itself, or that is full
        free = "unknown"
    return {"name": about.name, "total_bytes": about.total_memory, "free_bytes": free,
            "compute_capability": f"{about.major}.{about.minor}"}


def kernels(device: Cuda, say: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[Problem]]:
    """What computes each format on the device, after the self-test of kernels.device_table."""
    if find_spec("triton") is None:
        return [], [Problem("there is a GPU, but Triton is not installed: the CPU computes", "pip install triton")]
    say("trying the GPU's kernels (up to a minute, the first time)")
    rows: list[dict[str, Any]] = []
    failed: dict[str, tuple[list[str], str]] = {}
    nothing = KernelTable(MappingProxyType({}), MappingProxyType({}))
    for name, block in FORMATS:
        try:
            found = choose_device_kernels(device.torch_device, device.half, [name], [block], nothing, True)
            kernel = found.prompts.names[name]
        except Exception as e:  # wrong numbers, or Triton's: its compiler, the assembler, the driver
            kernel = "none: it fails"
            cure = (e.cure if isinstance(e, QmixError) else None) or "use --device cpu, and please report it"
            failed.setdefault(line(e), ([], cure))[0].append(f"{name} block {block}" if block else name)
        rows.append({"format": name, "block": block or "-", "kernel": kernel})
    return rows, [Problem(f"the GPU's kernels for {', '.join(names)}: {reason}", cure)
                  for reason, (names, cure) in failed.items()]


def page_locking() -> tuple[str, list[Problem]]:
    """A small pool, page-locked for a moment as the engine does with its slots."""
    lines: list[str] = []
    try:
        pool = torch.frombuffer(anonymous_memory(PROBE), dtype=torch.uint8).view(-1, 256 * PAGE)
        pinned = pin_pool(pool, PROBE, lines.append)
        locked = pinned.nbytes
        pinned.close()
    except Exception as e:
        lines, locked = [line(e)], 0
    if locked == PROBE:
        return "works", []
    return "refused", [Problem(f"memory cannot be page-locked for the GPU: {lines[0] if lines else 'refused'}",
                               "experts are copied slower, through a buffer of the driver's: free some memory, and "
                               "under WSL update the GPU's driver")]


def line(e: Exception) -> str:
    """What went wrong, in a line."""
    text = e.message if isinstance(e, QmixError) else str(e).strip()
    return text.splitlines()[0][:200] if text else type(e).__name__

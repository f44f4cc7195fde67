"""GPU memory that is not for tensors: the driver's context, and code, graphs and libraries, which torch's allocator
does not count. A run on the GPU measures both when it has warmed up, and keeps them for the next plan in a small file
of its own, beside the file of the bandwidths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qmix import json_cache
from qmix.errors import ConfigError

FORMAT, VERSION = "qmix_gpu_memory", 1
MOST = 2**40  # bytes
LONGEST = 200  # characters of a name


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """card, torch: the GPU's name and torch's version; context: bytes of the driver's context; beside: what was gone
    besides, after warming up; measured: "YYYY-MM-DD". Checks itself (ConfigError)."""

    card: str
    torch: str
    context: int
    beside: int
    measured: str

    def __post_init__(self) -> None:
        for name in ("card", "torch"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= LONGEST:
                raise ConfigError(f"{name}: got {value!r:.40}, want a line of text")
        for name in ("context", "beside"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= MOST:
                raise ConfigError(f"{name}: got {value!r:.40}, want bytes, 0 to {MOST}")
        if not json_cache.is_date(self.measured):
            raise ConfigError(f"measured: got {self.measured!r:.40}, want YYYY-MM-DD")


def save(memory: GpuMemory, path: Path) -> None:
    """Write `path`, whole or not at all; QmixError where that fails."""
    json_cache.save(path, FORMAT, VERSION, asdict(memory))


def load(path: Path, say: Callable[[str], None]) -> GpuMemory | None:
    """What save wrote; None where there is no such file, or, said in one line, where it is not one of ours."""
    def made(values: dict[str, Any]) -> GpuMemory:
        if values.keys() != {field.name for field in fields(GpuMemory)}:
            raise ValueError("its fields are not those of this version")
        return GpuMemory(**values)

    return json_cache.load(path, FORMAT, VERSION, made, "a run on the GPU", say)

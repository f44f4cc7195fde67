"""What a run counts: per phase, how often experts were in a slot, what was read, and where the time went."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class PhaseFigures:
    """Sums over the passes of one phase. Seconds of the process's clock, bytes read from the disk.

    chosen: records that passes needed (each once per layer and pass, however many tokens share it); hits: those
    whose bytes were all there when the router spoke. seconds: whole passes; stalled_seconds: of those, waiting
    for records; read_seconds: the disk was reading, stalled or beside the computing.
    """

    tokens: int = 0
    passes: int = 0
    chosen: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    stalled_seconds: float = 0.0
    read_seconds: float = 0.0

    def report(self) -> dict[str, Any]:
        """All of it; compute_seconds is what was not stalled, overlapped_seconds what was read meanwhile."""
        return {**asdict(self), "compute_seconds": max(0.0, self.seconds - self.stalled_seconds),
                "overlapped_seconds": max(0.0, self.read_seconds - self.stalled_seconds)}

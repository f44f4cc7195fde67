"""What the server is doing at a moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Figures:
    """running, waiting: requests. engine: Engine.stats, {} before the model is loaded."""

    running: int
    waiting: int
    engine: Mapping[str, Any]

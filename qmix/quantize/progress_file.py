"""How far a sampled measurement of sensitivities got: a file that the next run of the same measurement goes on from.

A safetensors file with one tensor, the residual behind the last finished layer, and in its metadata what was measured
up to there. Floats are written so that they are read back to the last bit. The file is written under another name and
renamed, so that there is a whole one or none.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Found = TypeVar("Found")


class ProgressFile:
    """At `path`. What cannot be written or read is said, and is no error: measuring then starts over."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say = path, say

    def save(self, state: dict[str, Any], residual: Tensor) -> None:
        draft = self._path.with_suffix(".partial.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"residual": residual.contiguous()}, draft, {"state": json.dumps(state)})
            draft.replace(self._path)
        except (OSError, SafetensorError) as e:
            self._say(f"{self._path}: how far measuring got could not be kept: {e}")
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def load(self, parse: Callable[[Any, Tensor], Found]) -> Found | None:
        """parse(what was saved last); None where nothing was, or, said, where it cannot be read or `parse` raises
        ValueError, KeyError or TypeError."""
        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, "pt") as opened:
                return parse(json.loads(opened.metadata()["state"]), opened.get_tensor("residual"))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
            self._say(f"{self._path}: ignored ({type(e).__name__}: {e}); measuring starts over")
            return None

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

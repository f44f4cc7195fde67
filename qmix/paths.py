"""Where models live: a folder, an alias or a hub id, turned into a local folder.

    ./mixtral-int4                       a folder
    demo                                 an alias: a store in qmix's data folder, see `qmix list`
    mistralai/Mixtral-8x7B-v0.1@main     a hub id, downloaded (or found in the hub's cache)

A local path never contacts the hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from qmix import hub
from qmix.errors import UsageError
from qmix.settings import xdg_folder

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
HUB_FILES = hub.FILES  # the small files of a repository; these name the weights


def models_folder() -> Path:
    """Stores that have an alias."""
    return xdg_folder("data") / "models"


def state_folder() -> Path:
    """Chat history and saved conversations."""
    return xdg_folder("state")


def routing_folder() -> Path:
    """Router statistics, a file per store."""
    return state_folder() / "routing"


def evaluations_folder() -> Path:
    """Journals of evaluations, a file each."""
    return state_folder() / "eval"


def sensitivity_folder() -> Path:
    """What formats do to the experts of a checkpoint, as measured for `quantize --fit`."""
    return xdg_folder("cache") / "sensitivity"


def hardware_file() -> Path:
    """Measured bandwidths of this machine."""
    return xdg_folder("cache") / "hardware.json"


def kernels_file() -> Path:
    """Measured configurations of the GPU's kernels."""
    return xdg_folder("cache") / "kernels.json"


def local_stores() -> list[Path]:
    """The stores in the models folder, sorted by alias; a half-written one (.partial) has no manifest."""
    return sorted(p.parent for p in models_folder().glob("*/qmix.json"))


def resolve(text: str, say: Callable[[str], None], wanted: hub.Wanted = "either") -> Path:
    """The local folder of a model named on the command line; UsageError or CheckpointError otherwise. wanted: what
    is fetched where the hub has it."""
    path = Path(text).expanduser()
    if path.exists():
        return path
    alias = models_folder() / text
    if "/" not in text and alias.is_dir():
        return alias
    if HUB_ID.fullmatch(text):
        return hub.download(text, wanted, say)
    known = ", ".join(p.name for p in local_stores()) or "none yet"
    raise UsageError(f"{text}: no such folder, alias or hub id", f"aliases here: {known}; a hub id is org/name")

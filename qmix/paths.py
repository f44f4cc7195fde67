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

from qmix.errors import CheckpointError, UsageError
from qmix.settings import xdg_folder

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
# Weights other than safetensors are never fetched: qmix does not read pickle.
HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model*", "*.jinja")


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


def gpu_memory_file() -> Path:
    """What of this machine's GPU's memory goes elsewhere than to tensors, as measured."""
    return xdg_folder("cache") / "gpu-memory.json"


def kernels_file() -> Path:
    """Measured configurations of the GPU's kernels."""
    return xdg_folder("cache") / "kernels.json"


def local_stores() -> list[Path]:
    """The stores in the models folder, sorted by alias; a half-written one (.partial) has no manifest."""
    return sorted(p.parent for p in models_folder().glob("*/qmix.json"))


def resolve(text: str, say: Callable[[str], None], hub_files: tuple[str, ...] = HUB_FILES) -> Path:
    """The local folder of a model named on the command line; UsageError or CheckpointError otherwise."""
    path = Path(text).expanduser()
    if path.exists():
        return path
    alias = models_folder() / text
    if "/" not in text and alias.is_dir():
        return alias
    if HUB_ID.fullmatch(text):
        return _download(text, say, hub_files)
    known = ", ".join(p.name for p in local_stores()) or "none yet"
    raise UsageError(f"{text}: no such folder, alias or hub id", f"aliases here: {known}; a hub id is org/name")


def _download(text: str, say: Callable[[str], None], hub_files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = text.partition("@")
    say(f"{text}: not a local folder; asking the Hugging Face hub")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(hub_files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CheckpointError(f"{text}: the hub did not give it: {reason}",
                              "check the name, the network and `hf auth login`; a local folder needs no hub") from None

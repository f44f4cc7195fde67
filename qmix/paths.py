"""Where models live: a folder, an alias or a hub id, turned into a local folder.

    ./mixtral-int4                       a folder
    demo                                 an alias: a store in qmix's data folder, see `qmix list`
    mistralai/Mixtral-8x7B-v0.1@main     a hub id, downloaded (or found in the hub's cache)
    org/name:Q4_K_M                      a GGUF model in a repository of the hub

A local path never contacts the hub, nor does a file's name that ends in .gguf. A folder in the current directory has
priority over an alias of the same name if it holds a model; a folder without a model does not hide the alias. qmix says
both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qmix import hub
from qmix.errors import UsageError
from qmix.models.consolidated import is_consolidated
from qmix.settings import NoHome, own_home, xdg_folder

HUB_FILES = hub.FILES  # the small files of a repository; these name the weights


def models_folder() -> Path:
    """Stores that have an alias: in $QMIX_HOME, or in the user's data folder."""
    return (own_home() or xdg_folder("data")) / "models"


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


def rates_file() -> Path:
    """How fast this machine quantized."""
    return xdg_folder("cache") / "rates.json"


def gpu_memory_file() -> Path:
    """What of this machine's GPU's memory goes elsewhere than to tensors, as measured."""
    return xdg_folder("cache") / "gpu-memory.json"


def kernels_file() -> Path:
    """Measured configurations of the GPU's kernels."""
    return xdg_folder("cache") / "kernels.json"


def if_any(folder: Callable[[], Path]) -> Path | None:
    """folder(), None where there is no home folder: for files that a command can do without."""
    try:
        return folder()
    except NoHome:
        return None


def local_stores() -> list[Path]:
    """The stores in the models folder, sorted by alias; a half-written one (.partial) has no manifest."""
    models = if_any(models_folder)
    return [] if models is None else sorted(p.parent for p in models.glob("*/qmix.json"))


def resolve(text: str, say: Callable[[str], None], wanted: hub.Wanted = "either",
            access: hub.Access | None = None) -> Path:
    """The local folder of a model named on the command line; UsageError or CheckpointError otherwise. wanted: what
    is fetched where the hub has it; access: how."""
    found = locate(text, say)
    if isinstance(found, Path):
        if access is not None and access.revision is not None:
            raise UsageError(f"--revision {access.revision}: {text} is here, not on the hub", "drop --revision")
        return found
    return hub.download(found, wanted, say, access)


def locate(text: str, say: Callable[[str], None]) -> Path | hub.HubName:
    """As `resolve`, but nothing is fetched: what the hub is to be asked for where it is not here."""
    path = expanded(text)
    alias = _alias(text)
    if path.exists():
        if alias is None:
            if hub.HubName.parse(text) and not _holds_model(path):
                say(f"{text}: the folder {path.absolute()}, which holds no model; the hub is not searched, because a "
                    "folder has this name")
            return path
        if _holds_model(path):
            say(f"{text}: the folder {path.absolute()}, which hides the alias {text} ({alias})")
            return path
        say(f"{text}: the alias ({alias}), not the folder {path.absolute()}, which holds no model")
        return alias
    if alias is not None:
        return alias
    name = hub.HubName.parse(text)
    if path.suffix.lower() == ".gguf" and (name is None or name.file is None):  # never a repository's name
        raise UsageError(f"{text}: no such file", "check the path; of a model in several files any one is named")
    if name is not None:
        return name
    known = ", ".join(p.name for p in local_stores()) or "none yet"
    raise UsageError(f"{text}: no such folder, alias or hub id", f"aliases here: {known}; a hub id is org/name")


def expanded(text: str) -> Path:
    """A path as typed, with ~ and ~user; UsageError where there is no such user or home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        what = "there is no home folder" if text == "~" or text.startswith("~/") else "there is no such user"
        raise UsageError(f"{text}: {what}", "write the whole path, or ./~NAME for a file whose name begins "
                         "so") from None


def _alias(text: str) -> Path | None:
    """The folder of an alias; None where there is none of that name."""
    models = if_any(models_folder)
    if models is None or "/" in text or text in ("", ".", ".."):
        return None
    return models / text if (models / text).is_dir() else None


def _holds_model(path: Path) -> bool:
    """Whether a path may be meant as a model: a store, a checkpoint, or a file such as a config.json."""
    return not path.is_dir() or any((path / name).exists() for name in ("qmix.json", "config.json")) or \
        is_consolidated(path)

"""Downloads from the Hugging Face hub: the small files of a repository first, then only the weights that these name.

    config.json, tokenizer, index, qmix.json      by name, whatever else the repository holds
    a checkpoint's weights                        the files that its index names; without one, model.safetensors
    a store's weights                             the files that qmix.json names

Repositories hold the same weights in other layouts too (consolidated.safetensors, original/, onnx/, checkpoint-500/).
None of them is fetched, and pickled weights never are. The free disk space is checked before the first weight is
fetched. A checkpoint whose config.json says that it is quantized already is refused before its weights are fetched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from glob import escape
from pathlib import Path
from typing import Any, Literal

from qmix import modelfiles
from qmix.errors import CheckpointError, ConfigError, DoesNotFit, UsageError
from qmix.models import published_experts
from qmix.schemes import read_quantization
from qmix.sizes import format_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "qmix.json"
CONFIG = "config.json"
# All that a store copies from a checkpoint, what tells a layout that qmix does not read, and what names the weights.
FILES = (CONFIG, "params.json", "hf_quant_config.json", INDEX, MANIFEST, *modelfiles.FILES)
TEMPLATES = f"{modelfiles.TEMPLATES}/*.jinja"

Wanted = Literal["config", "checkpoint", "store", "either"]


def download(text: str, wanted: Wanted, say: Callable[[str], None]) -> Path:
    """The folder in the hub's cache of "org/name" or "org/name@revision", with what a `wanted` model needs; "config"
    is config.json alone. CheckpointError where the hub does not give it, DoesNotFit where the disk is too small,
    UsageError where a store is wanted and the repository holds a checkpoint."""
    repo, _, revision = text.partition("@")
    say(f"{text}: not a local folder; asking the Hugging Face hub")
    folder = _fetch(repo, revision or None, [CONFIG] if wanted == "config" else FILES,
                    [] if wanted == "config" else [TEMPLATES])
    if wanted == "config":
        return folder
    is_store = (folder / MANIFEST).is_file()
    if wanted == "store" and not is_store and (folder / CONFIG).is_file():
        raise UsageError(f"{text}: a checkpoint that is not quantized yet",
                         f"quantize it first: qmix quantize {text} {repo.partition('/')[2]}-int4")
    if (is_store and wanted == "checkpoint") or (not is_store and _is_quantized(folder / CONFIG)):
        return folder  # opening it as a checkpoint is refused, by its name or by its config.json
    names = _named(folder / MANIFEST, _store_files) if is_store else _named(folder / INDEX, _shards) or [SINGLE]
    # The commit of the small files, so that an upload in between cannot mix two versions.
    commit = folder.name if folder.parent.name == "snapshots" else revision or None
    _fetch_weights(repo, commit, folder, names, say)
    if not is_store and not all((folder / name).exists() for name in names):
        _fetch_weights(repo, commit, folder, [SINGLE], say)  # the index is stale
    return folder


def _fetch(repo: str, revision: str | None, names: Iterable[str], patterns: Iterable[str] = ()) -> Path:
    """The folder, with those of the files that the repository has."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*map(escape, names), *patterns]))
    except Exception as e:  # its own, and those of whichever HTTP library its version uses
        if isinstance(e, RuntimeError) and "home directory" in str(e):
            raise CheckpointError(f"{repo}: no home folder for the hub's cache: HOME is not set, and this user has no "
                                  "entry in the system's list", "set HF_HOME to a folder that can be written") from None
        at = f"{repo}@{revision}" if revision else repo
        raise CheckpointError(f"{at}: the hub did not deliver it: {_reason(e)}",
                              "check the name, the network and `hf auth login`; a local folder needs no hub") from None


def _fetch_weights(repo: str, revision: str | None, folder: Path, names: list[str], say: Callable[[str], None]) -> None:
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        _check_disk(repo, revision, folder, absent, say)
        _fetch(repo, revision, names)


def _check_disk(repo: str, revision: str | None, folder: Path, names: list[str], say: Callable[[str], None]) -> None:
    """DoesNotFit where the files, less what a broken download left of them, are more than the disk has free."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    needed = 0
    for name in names:
        try:
            found = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
        except EntryNotFoundError:
            continue  # an index may name what is not there
        except Exception as e:  # as above
            say(f"{repo}: the hub does not say how large {name} is ({_reason(e)}): free space is not checked")
            return
        begun = folder.parent.parent / "blobs" / f"{found.etag}.incomplete"
        needed += max(0, (found.size or 0) - (begun.stat().st_size if begun.is_file() else 0))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DoesNotFit(f"{repo}: its weights need {format_bytes(needed)} in {folder.parent.parent}: "
                         f"{format_bytes(free)} free, short of {format_bytes(needed - free)}",
                         "make room, or set HF_HOME to a folder on another disk")


def _reason(e: Exception) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def _named(path: Path, read: Callable[[Any], Iterable[Any]]) -> list[str]:
    """Plain file names that a JSON file names; [] where it names none, for whoever opens the folder says it better."""
    try:
        found = {*read(json.loads(path.read_bytes()))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return sorted(name for name in found if isinstance(name, str) and name and not {*"/\\\0"} & {*name})


def _is_quantized(config: Path) -> bool:
    """Whether config.json says that the weights are in a format that qmix does not take from checkpoints."""
    try:
        raw = json.loads(config.read_bytes())
        if isinstance(raw, dict) and raw.get("quantization_config") is not None and published_experts(raw) is None:
            read_quantization(raw["quantization_config"])
        return False
    except ConfigError:  # a method that qmix does not read, or a key of it
        return True
    except (OSError, ValueError, RecursionError):  # said when the folder is opened
        return False


def _shards(index: Any) -> Iterable[Any]:
    return index["weight_map"].values()


def _store_files(manifest: Any) -> Iterable[Any]:
    return [*(entry["file"] for entry in (*manifest["records"], *manifest["dense"])),
            *(entry["name"] for entry in manifest["files"])]

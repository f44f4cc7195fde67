"""What the small files of a repository say of its weights. They are a stranger's."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qmix.bounded import parse_json, read_file
from qmix.errors import CheckpointError, ConfigError, QmixError
from qmix.models import published_experts
from qmix.models.consolidated import consolidated_config
from qmix.schemes import MODELOPT, modelopt_config, read_quantization

PARAMS = "params.json"
OWN_FILES = ("tokenizer.model.v?", "tekken.json", "consolidated*.json")  # of Mistral's own layout, beside its weights
MAX_JSON = 256 * 2**20  # bytes of an index or a qmix.json


def named_files(path: Path, read: Callable[[Any], Iterable[Any]]) -> list[str]:
    """Plain file names that a JSON file names; [] where it names none, for whoever opens the folder says it better."""
    try:
        found = {*read(parse_json(read_file(path, MAX_JSON)))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, QmixError):
        return []
    return sorted(name for name in found if isinstance(name, str) and name and not {*"/\\\0"} & {*name})


def is_quantized(config: Path) -> bool:
    """Whether config.json, or modelopt's file beside it, says that the weights are in a format that qmix does not take
    from checkpoints."""
    try:
        raw = parse_json(read_file(config, MAX_JSON))
        if not isinstance(raw, dict):
            return False
        found = raw.get("quantization_config")
        if found is None and (config.parent / MODELOPT).is_file():
            beside = parse_json(read_file(config.parent / MODELOPT, MAX_JSON))
            found = modelopt_config(beside) if isinstance(beside, dict) else None
        if found is not None and published_experts(raw) is None:
            read_quantization(found)
        return False
    except ConfigError:  # a method that qmix does not read, or a key of it
        return True
    except (OSError, ValueError, RecursionError, QmixError):  # said when the folder is opened
        return False


def own_layout(files: Iterable[str]) -> tuple[str, ...]:
    """The weights of a repository that is in Mistral's own layout alone; () of any other."""
    files = {*files}
    if PARAMS not in files or fnmatch.filter(files, "model*.safetensors"):
        return ()
    return tuple(sorted(name for name in fnmatch.filter(files, "consolidated*.safetensors") if "/" not in name))


def check_params(name: str, params: Path) -> None:
    """CheckpointError, before its weights are fetched, where qmix does not read the model of a params.json; what is
    no JSON object is said when the folder is opened."""
    try:
        raw = parse_json(read_file(params, MAX_JSON))
        if isinstance(raw, dict):
            consolidated_config(raw)
    except ConfigError as e:
        raise CheckpointError(f"{name}: {params.name}: {e.message}", e.cure or "give the model in Hugging Face "
                              "layout") from None
    except (OSError, ValueError, RecursionError, QmixError):
        return


def shards(index: Any) -> Iterable[Any]:
    return index["weight_map"].values()


def store_files(manifest: Any) -> Iterable[Any]:
    return [*(entry["file"] for entry in (*manifest["records"], *manifest["dense"])),
            *(entry["name"] for entry in manifest["files"])]

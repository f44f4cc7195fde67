"""What the small files of a repository say of its weights. They are a stranger's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qmix.bounded import parse_json, read_file
from qmix.errors import ConfigError, QmixError
from qmix.models import published_experts
from qmix.schemes import read_quantization

MAX_JSON = 256 * 2**20  # bytes of an index or a qmix.json


def named_files(path: Path, read: Callable[[Any], Iterable[Any]]) -> list[str]:
    """Plain file names that a JSON file names; [] where it names none, for whoever opens the folder says it better."""
    try:
        found = {*read(parse_json(read_file(path, MAX_JSON)))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, QmixError):
        return []
    return sorted(name for name in found if isinstance(name, str) and name and not {*"/\\\0"} & {*name})


def is_quantized(config: Path) -> bool:
    """Whether config.json says that the weights are in a format that qmix does not take from checkpoints."""
    try:
        raw = parse_json(read_file(config, MAX_JSON))
        if isinstance(raw, dict) and raw.get("quantization_config") is not None and published_experts(raw) is None:
            read_quantization(raw["quantization_config"])
        return False
    except ConfigError:  # a method that qmix does not read, or a key of it
        return True
    except (OSError, ValueError, RecursionError, QmixError):  # said when the folder is opened
        return False


def shards(index: Any) -> Iterable[Any]:
    return index["weight_map"].values()


def store_files(manifest: Any) -> Iterable[Any]:
    return [*(entry["file"] for entry in (*manifest["records"], *manifest["dense"])),
            *(entry["name"] for entry in manifest["files"])]

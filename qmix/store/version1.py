"""Stores of version 1, which qmix 0.1 wrote: a Mixtral, described by the config.json beside the manifest.

Their dense tensors have the names of a published checkpoint, in the manifest and in dense.safetensors; records are as
today.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qmix.models import layouts, read_model
from qmix.spec import Model
from qmix.store.manifest import Manifest


def read_config(raw: Mapping[str, Any], manifest: Manifest) -> Model:
    """The model, with the dtype that its weights really had; ConfigError names the key at fault."""
    return read_model({**raw, "dtype": manifest.dtype}, strict=False)


def labels(model: Model) -> dict[str, str]:
    """The dense tensors' names, by canonical name."""
    published = layouts(model)[0]
    return {tensor.name: published[tensor.name].name for tensor in model.tensors()}


def canonical(manifest: Manifest, names: Mapping[str, str]) -> Manifest:
    """The manifest with today's names of dense tensors; what is not among `names` keeps its own. names: of `labels`."""
    ours = {label: name for name, label in names.items()}
    entries = [replace(entry, name=ours.get(entry.name, entry.name)) for entry in manifest.dense.values()]
    return replace(manifest, dense={entry.name: entry for entry in entries})

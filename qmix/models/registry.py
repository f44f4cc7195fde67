"""The architectures that qmix reads, by the model_type of config.json: each file of this package with MODEL_TYPES."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any, Protocol, cast

from qmix.errors import ConfigError
from qmix.models.keys import Keys
from qmix.models.mtp import PREFIX, has_mtp_head
from qmix.models.source import Layout
from qmix.spec import Model


class Architecture(Protocol):
    """A file of this package. MODEL_TYPES: what config.json calls it, the Model's architecture first; SKIPPED: names of
    tensors that a checkpoint may carry and the model does not need. For tests, TINY: a config.json; VARIANTS: keys that
    make other ones of it (of its text_config where it has one), so that every branch of `read` is reached."""

    @property
    def MODEL_TYPES(self) -> Sequence[str]: ...

    @property
    def SKIPPED(self) -> re.Pattern[str]: ...

    @property
    def TINY(self) -> Mapping[str, Any]: ...

    @property
    def VARIANTS(self) -> Sequence[Mapping[str, Any]]: ...

    def read(self, keys: Keys) -> Model:
        """The model that a config.json describes; ConfigError names the key at fault."""

    def layouts(self, model: Model) -> tuple[Layout, ...]:
        """The layouts in which checkpoints of the model occur, the published one first: each has a source for every
        tensor of `model.tensors()` and of its experts. A file may also have `mxfp4_layout`, for checkpoints whose
        experts are quantized already, and `mtp_head` and `mtp_layouts` (mtp.py), where it has a
        multi-token-prediction head: `layouts` are then without it."""


def _find() -> dict[str, Architecture]:
    """{model_type: its file}, by name."""
    folder = Path(__file__).parent
    files = [import_module(f"{__package__}.{found.name}") for found in iter_modules([str(folder)])
             if found.name != Path(__file__).stem]
    return {kind: cast(Architecture, file) for file in files for kind in getattr(file, "MODEL_TYPES", ())}


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(_find())


def read_model(raw: Mapping[str, Any], strict: bool = True) -> Model:
    """The model that a config.json describes, with its multi-token-prediction head where that has one layer.
    ConfigError names the key at fault; where strict, also one that no reader knows. A store is read without: its
    weights were taken in when it was written."""
    kind = raw.get("model_type")
    architecture = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        raise ConfigError(f"model_type: got {kind!r:.40}, want {' or '.join(map(repr, ARCHITECTURES))}",
                          "qmix reads no other architectures yet")
    keys = Keys(raw)
    model = architecture.read(keys)
    if strict:
        keys.finish()
    return _with_head(model) if model.mtp == 1 else model


def _with_head(model: Model) -> Model:
    make = getattr(ARCHITECTURES[model.architecture], "mtp_head", None)
    return model if make is None else replace(model, mtp_head=make(model))


def with_mtp_head_of(model: Model, there: Collection[str]) -> Model:
    """The model of a checkpoint with tensors of the names `there`: with a multi-token-prediction head where these have
    one that qmix knows, whatever config.json says, and without where they have none."""
    found = _with_head(model)
    return found if found.mtp_head is not None and has_mtp_head(found, there) else model.trunk


def layouts(model: Model) -> tuple[Layout, ...]:
    """Those of the model's architecture, the published one first, without a multi-token-prediction head."""
    return ARCHITECTURES[model.architecture].layouts(model.trunk)


def mtp_layouts(model: Model) -> tuple[Layout, ...]:
    """Those of its multi-token-prediction head; none without."""
    if model.mtp_head is None:
        return ()
    return cast("tuple[Layout, ...]", ARCHITECTURES[model.architecture].mtp_layouts(model))  # type: ignore[attr-defined]


def mxfp4_layout(model: Model) -> Layout | None:
    """The layout in which the model is published with its experts in MXFP4; None where it is not."""
    make = getattr(ARCHITECTURES[model.architecture], "mxfp4_layout", None)
    return None if make is None else cast(Layout, make(model))


def published_experts(raw: Mapping[str, Any]) -> str | None:
    """The format that the experts of a checkpoint with this config.json have already, and keep: "mxfp4", or None.
    ConfigError for a key beside that which qmix does not know."""
    found, kind = raw.get("quantization_config"), raw.get("model_type")
    if not isinstance(found, Mapping) or found.get("quant_method") != "mxfp4" or not isinstance(kind, str) \
            or not hasattr(ARCHITECTURES.get(kind), "mxfp4_layout"):
        return None
    apart = found.get("modules_to_not_convert") or []
    if not isinstance(apart, list) or not all(isinstance(name, str) for name in apart):
        raise ConfigError(f"quantization_config: modules_to_not_convert: got {apart!r:.60}, want a list of names")
    if unknown := sorted(found.keys() - {"quant_method", "modules_to_not_convert"}):
        raise ConfigError(f"quantization_config: {unknown[0]}: a key that qmix does not know")
    return None if any("experts" in name.split(".") for name in apart) else "mxfp4"


def skipped(model: Model, there: Collection[str]) -> set[str]:
    """Those of the names `there` that the model does not need: what its architecture says, and a multi-token-prediction
    head that lies behind the last layer as more of them. Such a layer has a projection that no other has (eh_proj);
    without that it is a layer that config.json does not count."""
    pattern = ARCHITECTURES[model.architecture].SKIPPED
    if model.mtp_head is not None:
        there = [name for name in there if not name.startswith(PREFIX)]
    behind = [f"model.layers.{len(model.layers) + i}." for i in range(model.mtp)]
    names = set(there)
    heads = tuple(prefix for prefix in behind if f"{prefix}eh_proj.weight" in names)
    return {name for name in names if pattern.fullmatch(name) or name.startswith(heads)}


def choose_layout(known: tuple[Layout, ...], there: Collection[str]) -> Layout:
    """The one of which most tensors are among the names `there`; the published one in doubt."""
    names = set(there)
    return max(known, key=lambda layout: len({name for source in layout.values() for name in source.names} & names))

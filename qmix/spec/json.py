"""A Model as plain data for JSON, and back: what a store keeps, so that loading it needs no architecture file.

A record is an object of its fields, without those that have their default; one that stands for a choice of records
names its class in "type". Equal layers are written once: "kinds" has each, "layers" which one each layer is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from qmix.errors import ConfigError
from qmix.spec import layers as layer_records
from qmix.spec import rope as rope_records
from qmix.spec import tensors as tensor_records
from qmix.spec.layers import Layer
from qmix.spec.model import LAYERS, Model

VERSION = 1  # of what stands here; a field that is added with a default does not change it
NAMESPACE = {**vars(tensor_records), **vars(rope_records), **vars(layer_records)}


def to_json(model: Model) -> dict[str, Any]:
    """Plain data of which `from_json` makes the same Model."""
    kinds = list(dict.fromkeys(model.layers))
    found = _plain(model, skip=("layers",))
    return {"version": VERSION, **found, "kinds": [_plain(kind) for kind in kinds],
            "layers": [kinds.index(layer) for layer in model.layers]}


def from_json(raw: Any) -> Model:
    """ConfigError names the field that is missing, unknown or wrong."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"model: got {raw!r:.80}, want an object")
    values = dict(raw)
    if (version := values.pop("version", None)) != VERSION:
        raise ConfigError(f"model.version: got {version!r:.40}, want {VERSION}")
    listed, chosen = values.pop("kinds", None), values.pop("layers", None)
    if not isinstance(listed, list) or not 0 < len(listed) <= LAYERS:
        raise ConfigError(f"model.kinds: got {listed!r:.80}, want a list of layers")
    kinds = [_record(Layer, kind, f"model.kinds[{i}]") for i, kind in enumerate(listed)]
    if not isinstance(chosen, list) or not 0 < len(chosen) <= LAYERS or not all(
            type(i) is int and 0 <= i < len(kinds) for i in chosen):
        raise ConfigError(f"model.layers: got {chosen!r:.80}, want a list of numbers below {len(kinds)}")
    return _record(Model, values, "model", layers=tuple(kinds[i] for i in chosen))


def _plain(value: Any, skip: tuple[str, ...] = ()) -> Any:
    if is_dataclass(value):
        hints = _hints(type(value))
        found: dict[str, Any] = {}
        for field in fields(value):
            got = getattr(value, field.name)
            if field.name not in skip and got != _default(field):
                found[field.name] = _plain(got)
                if is_dataclass(got) and len(_records(hints[field.name])) > 1:
                    found[field.name] = {"type": type(got).__name__, **found[field.name]}
        return found
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _record(kind: type, raw: Any, where: str, **given: Any) -> Any:
    """A record of class `kind`, which checks itself; given: fields that are not in `raw`."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: got {raw!r:.80}, want an object")
    hints, known = _hints(kind), {field.name: field for field in fields(kind)}
    for name in raw:
        if name not in known or name in given:
            raise ConfigError(f"{where}.{name}: not known", "install a newer qmix, or quantize again with this one")
    values = dict(given)
    for name, field in known.items():
        if name in raw:
            values[name] = _value(hints[name], raw[name], f"{where}.{name}")
        elif name not in given and _default(field) is MISSING:
            raise ConfigError(f"{where}.{name}: missing")
    try:
        return kind(**values)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e.message}") from None


def _value(hint: Any, raw: Any, where: str) -> Any:
    """`raw` as the type `hint` wants it."""
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if raw is None and NoneType in choices:
        return None
    records = _records(hint)
    if records:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: got {raw!r:.80}, want an object")
        named = {record.__name__: record for record in records}
        values = dict(raw)
        name = values.pop("type", None) if len(records) > 1 else records[0].__name__
        if not isinstance(name, str) or name not in named:
            raise ConfigError(f"{where}.type: got {name!r:.40}, want {' or '.join(named)}")
        return _record(named[name], values, where)
    for choice in choices:
        if get_origin(choice) is tuple and isinstance(raw, list):
            inside = get_args(choice)
            kinds = inside[:1] * len(raw) if inside[-1] is Ellipsis else inside
            if len(kinds) == len(raw):
                return tuple(_value(one, item, f"{where}[{i}]") for i, (one, item) in enumerate(
                    zip(kinds, raw, strict=True)))
        if (choice is float and type(raw) in (int, float)) or choice is type(raw):
            return raw
    raise ConfigError(f"{where}: got {raw!r:.80}, want {getattr(hint, '__name__', hint)}")


def _records(hint: Any) -> list[type]:
    """The classes of records that a field may hold."""
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [choice for choice in choices if is_dataclass(choice) and isinstance(choice, type)]


def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, NAMESPACE)


def _default(field: Field[Any]) -> Any:
    return field.default

"""Settings: the only reader of the environment and of qmix.toml.

A value comes from the first of: the flag, the environment (QMIX_<COMMAND>_<FLAG>, as in
QMIX_CHAT_TEMP), the file, the built-in default. The file is $XDG_CONFIG_HOME/qmix/qmix.toml:

    threads = 8             # for every command that has the flag
    [chat]
    model = "mixtral-int4"
    temp = 0.3

Keys are the long flags without dashes in front, with _ or - inside. A key no command knows is an
error that names it, so that a misspelt setting is never silently ignored.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from qmix.errors import ConfigError
from qmix.textfile import decode

ENV_PREFIX = "QMIX"
NATIVE = "QMIX_NATIVE"


def xdg_folder(kind: str, environ: Mapping[str, str] = os.environ) -> Path:
    """qmix's own folder of a kind ("config", "data", "state", "cache") per the XDG base directory spec.

    Relative values are ignored, as the specification asks.
    """
    fallback = {"config": ".config", "data": ".local/share", "state": ".local/state", "cache": ".cache"}[kind]
    base = environ.get(f"XDG_{kind.upper()}_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / fallback
    return root / "qmix"


Kinds = Mapping[str, Mapping[str, Any]]  # {command: {parameter: its annotated type}}


def read_file(path: Path, commands: Kinds) -> dict[str, dict[str, Any]]:
    """qmix.toml as {command: {parameter: value}}, top-level keys spread over every command that has
    them; {} where the file does not exist. ConfigError names file and key.

    commands: {"chat": {"model": str | None, "temp": float, ...}, ...}, what each command accepts.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}", "repair the file or remove it") from None
    try:
        raw = tomllib.loads(decode(data, str(path), ConfigError))
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}: {e}", "repair the file or remove it") from None
    found: dict[str, dict[str, Any]] = {name: {} for name in commands}
    for key, value in raw.items():
        if key in commands:
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {key}: got {value!r:.80}, want a table", f"write [{key}] above its keys")
            for inner, setting in value.items():
                name = inner.replace("-", "_")
                if name not in commands[key]:
                    raise ConfigError(f"{path}: [{key}] {inner}: no such flag of qmix {key}",
                                      f"see qmix {key} --help")
                found[key][name] = _typed(f"{path}: [{key}] {inner}", setting, commands[key][name])
            continue
        name = key.replace("-", "_")
        takers = [c for c, kinds in commands.items() if name in kinds]
        if not takers:
            what = f"[{key}]: no such command" if isinstance(value, dict) else f"{key}: no command has this flag"
            raise ConfigError(f"{path}: {what}", f"commands: {', '.join(commands)}; see qmix --help")
        for command in takers:
            found[command].setdefault(name, _typed(f"{path}: {key}", value, commands[command][name]))
    return found


def check_environment(commands: Kinds, environ: Mapping[str, str] = os.environ) -> None:
    """ConfigError for a QMIX_<COMMAND>_ variable that no flag answers to: a misspelt one would be ignored."""
    for command, kinds in commands.items():
        prefix = f"{ENV_PREFIX}_{command.upper()}_"
        for name in environ:
            if name.startswith(prefix) and name.removeprefix(prefix).lower() not in kinds:
                raise ConfigError(f"{name}: no such flag of qmix {command}", f"unset it, or see qmix {command} --help")


def native_level(environ: Mapping[str, str] = os.environ) -> str:
    """$QMIX_NATIVE: the instruction set that the native kernels are to use, "off" for none of them, "" for the best."""
    return environ.get(NATIVE, "")


def _typed(where: str, value: Any, annotation: Any) -> Any:
    """`value` where it suits the parameter's type; a single text also stands for a list of texts."""
    kinds = [k for k in (get_args(annotation) or (annotation,)) if k is not type(None)]
    if get_origin(annotation) is list or any(get_origin(k) is list for k in kinds):
        values = value if isinstance(value, list) else [value]
        if all(isinstance(v, str) for v in values):
            return values
        raise ConfigError(f"{where}: got {value!r:.80}, want text or a list of texts")
    for kind, accepted, want in ((bool, bool, "true or false"), (int, int, "an integer"),
                                 (float, (int, float), "a number"), (object, str, "text")):
        if kind in kinds or kind is object:
            if isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):
                return value
            raise ConfigError(f"{where}: got {value!r:.80}, want {want}")
    raise AssertionError("unreachable")

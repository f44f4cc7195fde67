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

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from qmix.errors import ConfigError, QmixError
from qmix.textfile import decode

ENV_PREFIX = "QMIX"
NATIVE = "QMIX_NATIVE"
HOME = "QMIX_HOME"


class NoHome(QmixError):
    """There is no folder for files of qmix's own."""


def xdg_folder(kind: str, environ: Mapping[str, str] = os.environ) -> Path:
    """qmix's own folder of a kind ("config", "data", "state", "cache") per the XDG base directory spec.

    Relative values are ignored, as the specification asks. NoHome where neither a variable nor the system names one.
    """
    fallback = {"config": ".config", "data": ".local/share", "state": ".local/state", "cache": ".cache"}[kind]
    variable = f"XDG_{kind.upper()}_HOME"
    base = environ.get(variable, "")
    if base.startswith("/"):
        return Path(base) / "qmix"
    try:
        return Path.home() / fallback / "qmix"
    except RuntimeError:  # HOME is not set, and the system does not know the user: a container under any uid
        raise NoHome(f"no home folder for qmix's {kind} files: HOME is not set, and this user has no entry in "
                     "the system's list", f"set HOME or {variable} to a folder that can be written") from None


def own_home(environ: Mapping[str, str] = os.environ) -> Path | None:
    """$QMIX_HOME, where stores are kept; None where it is not set. ConfigError unless it is a whole path."""
    text = environ.get(HOME, "")
    if text and not text.startswith("/"):
        raise ConfigError(f"{HOME}: got {text!r:.80}, want a path that begins with /", "write the whole path")
    return Path(text) if text else None


def config_file() -> Path | None:
    """qmix.toml; None where there is no folder that could hold it."""
    try:
        return xdg_folder("config") / "qmix.toml"
    except NoHome:
        return None


Kinds = Mapping[str, Mapping[str, Any]]  # {command: {parameter: its annotated type}}


def read_file(path: Path | None, commands: Kinds) -> dict[str, dict[str, Any]]:
    """qmix.toml as {command: {parameter: value}}, top-level keys spread over every command that has
    them; {} where the file does not exist, or path is None. ConfigError names file and key.

    commands: {"chat": {"model": str | None, "temp": float, ...}, ...}, what each command accepts.
    """
    if path is None:
        return {}
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}", "repair the file or remove it") from None
    try:
        raw = tomllib.loads(decode(data, str(path), ConfigError))
    except (tomllib.TOMLDecodeError, RecursionError) as e:
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


def is_list(annotation: Any) -> bool:
    """Whether a parameter takes several values: list[str], list[Path] | None, ..."""
    return get_origin(annotation) is list or any(get_origin(kind) is list for kind in get_args(annotation))


def environment_lists(commands: Kinds, environ: Mapping[str, str] = os.environ) -> dict[str, dict[str, list[str]]]:
    """{command: {parameter: values}} of the QMIX_<COMMAND>_<FLAG> variables of flags that may be repeated. A variable
    is one value, spaces and all, or a JSON list of strings, which is several. An empty one is none, as for all flags.

        QMIX_CHAT_STOP='### a'        one stop string, as --stop '### a'
        QMIX_CHAT_STOP='["a", "\\n"]'  two
    """
    found: dict[str, dict[str, list[str]]] = {}
    for command, kinds in commands.items():
        for parameter, annotation in kinds.items():
            text = environ.get(f"{ENV_PREFIX}_{command.upper()}_{parameter.upper()}", "")
            if text and is_list(annotation):
                found.setdefault(command, {})[parameter] = _several(text)
    return found


def _several(text: str) -> list[str]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    several = isinstance(values, list) and values and all(isinstance(value, str) for value in values)
    return values if several else [text]


def native_level(environ: Mapping[str, str] = os.environ) -> str:
    """$QMIX_NATIVE: the instruction set that the native kernels are to use, "off" for none of them, "" for the best."""
    return environ.get(NATIVE, "")


def _typed(where: str, value: Any, annotation: Any) -> Any:
    """`value` where it suits the parameter's type; a single text also stands for a list of texts."""
    kinds = [k for k in (get_args(annotation) or (annotation,)) if k is not type(None)]
    if is_list(annotation):
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

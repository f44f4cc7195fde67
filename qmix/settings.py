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
from typing import Any

from qmix.errors import ConfigError

ENV_PREFIX = "QMIX"


def xdg_folder(kind: str, environ: Mapping[str, str] = os.environ) -> Path:
    """qmix's own folder of a kind ("config", "data", "state", "cache") per the XDG base directory spec.

    Relative values are ignored, as the specification asks.
    """
    fallback = {"config": ".config", "data": ".local/share", "state": ".local/state", "cache": ".cache"}[kind]
    base = environ.get(f"XDG_{kind.upper()}_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / fallback
    return root / "qmix"


def read_file(path: Path, commands: Mapping[str, set[str]]) -> dict[str, dict[str, Any]]:
    """qmix.toml as {command: {parameter: value}}, top-level keys spread over every command that has
    them; {} where the file does not exist. ConfigError names file and key.

    commands: {"chat": {"model", "temp", ...}, ...}, the parameters each command accepts.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"{path}: {e}", "repair the file or remove it") from None
    found: dict[str, dict[str, Any]] = {name: {} for name in commands}
    for key, value in raw.items():
        if isinstance(value, dict):
            if key not in commands:
                raise ConfigError(f"{path}: [{key}]: no such command", f"one of: {', '.join(commands)}")
            for inner, setting in value.items():
                name = inner.replace("-", "_")
                if name not in commands[key]:
                    raise ConfigError(f"{path}: [{key}] {inner}: no such flag of qmix {key}",
                                      f"see qmix {key} --help")
                found[key][name] = setting
            continue
        name = key.replace("-", "_")
        takers = [c for c, flags in commands.items() if name in flags]
        if not takers:
            raise ConfigError(f"{path}: {key}: no command has this flag", "see qmix --help")
        for command in takers:
            found[command].setdefault(name, value)
    return found

"""Small JSON files in which qmix keeps what it measured on this machine. They are written whole or not at all, and
checked when they are read, since anything may have replaced them. A file begins with its format's name and version."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from qmix.errors import ConfigError, QmixError
from qmix.sizes import format_bytes

MAX_FILE = 64 * 1024  # bytes of a file of ours are far fewer: what is larger is not read
Record = TypeVar("Record")


def save(path: Path, format: str, version: int, values: Mapping[str, Any]) -> None:
    """Write `path`; QmixError where that fails, which leaves what was there."""
    try:
        write_whole(path, json.dumps({format: version, **values}, indent=2) + "\n")
    except OSError as e:
        raise QmixError(f"{path}: cannot be written: {e.strerror}",
                        "check the folder's permissions and space") from None


def write_whole(path: Path, text: str) -> None:
    """Make or replace a file, whole or not at all, and its folder; OSError as the system gives it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(fd, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def load(path: Path, format: str, version: int, make: Callable[[dict[str, Any]], Record], writer: str,
         say: Callable[[str], None]) -> Record | None:
    """make(what save wrote); None where there is no such file, or, said in one line, where it is not one of ours or
    `make` raises ValueError or ConfigError. writer: the command that writes it."""
    try:
        values = json.loads(_read_small(path))
        if type(values) is not dict or values.pop(format, None) != version:
            raise ValueError(f"not a file of {format}, version {version}")
        return make(values)
    except FileNotFoundError:
        return None
    except ConfigError as e:
        reason = e.message
    except OSError as e:
        reason = e.strerror or "cannot be read"
    except json.JSONDecodeError:
        reason = "not JSON"
    except UnicodeDecodeError:
        reason = "not text"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as e:
        reason = str(e).splitlines()[0]
    say(f"{path}: ignored ({reason}); `{writer}` writes a new one")
    return None


def is_date(text: object) -> bool:
    """Whether it is "YYYY-MM-DD"."""
    try:
        return isinstance(text, str) and date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _read_small(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))  # a pipe in its place must not hang
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("not a regular file")
        raw = file.read(MAX_FILE + 1)
    if len(raw) > MAX_FILE:
        raise ValueError(f"larger than {format_bytes(MAX_FILE)}")
    return raw.decode("utf-8-sig")

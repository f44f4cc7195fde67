"""The compiled library: found beside this file, opened once, asked what it can do here.

It is built when qmix is installed, if there is a C compiler. setup.py leaves a file beside it where that failed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from qmix import settings
from qmix.errors import UsageError

ABI = 15  # native.h's QMIX_ABI
FAILURE = "build-error.txt"  # setup.FAILURE: its first line is the reason, the end of the compiler's output follows
LONGEST = 300  # characters of a reason
HERE = Path(__file__).parent


def library() -> ctypes.CDLL | None:
    """None where there is none that can be used: `trouble` says why."""
    return _found()[0]


def trouble() -> str:
    """Why there is no library, or why the one in use is older than its sources, in one line; "" where all is well."""
    return _found()[1]


def build_report() -> Path | None:
    """The file with the end of the compiler's output, where the last build failed."""
    return found if (found := HERE / FAILURE).is_file() else None


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    return open_library(HERE)


def open_library(folder: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library in `folder`, or None; and what is wrong, "" for nothing."""
    failure = _failure(folder / FAILURE)
    found = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").exists()]
    if not found:
        return None, failure or ("they were not built for this Python" if list(folder.glob("_native*.so")) else
                                 "they were not built: this qmix was not installed, or without its setup.py")
    try:
        opened = ctypes.CDLL(str(found[0]))
        opened.qmix_level_name.restype = ctypes.c_char_p
        opened.qmix_peak.restype = ctypes.c_int64
        abi = opened.qmix_abi()
    except OSError as e:
        return None, f"the library cannot be opened: {_line(str(e))}"
    except AttributeError as e:
        return None, f"{found[0].name} belongs to another version of qmix: {_line(str(e))}"
    if abi != ABI:
        return None, f"{found[0].name} belongs to another version of qmix: it has version {abi}, this needs {ABI}" + (
            f" ({failure})" if failure else "")
    number = ctypes.c_int32
    opened.qmix_sequence.argtypes = [number, number, ctypes.c_void_p, number, number]
    return opened, f"an earlier build is in use, the last one failed: {failure}" if failure else ""


def _failure(file: Path) -> str:
    """The reason that setup.py noted."""
    try:
        with file.open("rb") as opened:
            return _line(opened.read(4 * LONGEST).decode("utf-8", "replace"))
    except FileNotFoundError:
        return ""
    except OSError as e:
        return f"{file.name}: {e.strerror}"


def _line(text: str) -> str:
    first = (text.strip().splitlines() or ["no reason given"])[0]
    return "".join(c for c in first if c.isprintable())[:LONGEST]


def levels() -> dict[str, int]:
    """{name: number} of the instruction sets that the library has kernels for and this processor has, the best
    first; empty without a library."""
    opened, names, number = library(), {}, 0
    while opened is not None and (name := opened.qmix_level_name(number)) is not None:
        if opened.qmix_level_supported(number):
            names[name.decode()] = number
        number += 1
    return names


def wanted_levels() -> list[str]:
    """The levels to try: the one that QMIX_NATIVE names, or none with "off"; else all of this processor, the best
    first. UsageError where it names one that is not here."""
    here, asked = list(levels()), settings.native_level()
    if asked == "off":
        return []
    if asked and asked not in here:
        raise UsageError(f"{settings.NATIVE}={asked}: want " + " or ".join(["off", *here]),
                         "unset it" if here else f"unset it: there are no native kernels here ({trouble()})")
    return [asked] if asked else here

"""The compiled library: found beside this file, opened once, asked what it can do here.

It is built when qmix is installed, if there is a C compiler (setup.py).
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from qmix import settings
from qmix.errors import UsageError

ABI = 4  # native.h's QMIX_ABI


@cache
def library() -> ctypes.CDLL | None:
    """None where it was not built, cannot be opened, or is an older qmix's."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(f"_native{suffix}")).exists()]
    if not found:
        return None
    try:
        opened = ctypes.CDLL(str(found[0]))
        opened.qmix_level_name.restype = ctypes.c_char_p
        opened.qmix_peak.restype = ctypes.c_int64
        return opened if opened.qmix_abi() == ABI else None
    except (OSError, AttributeError):
        return None


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
                         "unset it" if here else "unset it: the native kernels were not built here")
    return [asked] if asked else here

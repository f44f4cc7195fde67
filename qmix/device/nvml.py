"""How much of a card's memory is in use, asked of the driver's management library (NVML). NVML needs no CUDA context,
so it can be asked before there is one; the difference afterwards is what the context takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

LIBRARY = "libnvidia-ml.so.1"
SUCCESS = 0


class _Memory(ctypes.Structure):
    """nvmlMemory_t. used: with what the driver keeps for itself."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def used_bytes(uuid: str, open_library: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> int | None:
    """Bytes in use by all programs together, of the card with this UUID ("GPU-5f2b..."); None where the library is not
    there, or does not know the card (a part of a card, as MIG makes them, has a UUID of another kind)."""
    try:
        nvml = open_library(LIBRARY)
        if nvml.nvmlInit_v2() != SUCCESS:
            return None
        try:
            card, found = ctypes.c_void_p(), _Memory()
            if nvml.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(uuid.encode()), ctypes.byref(card)) != SUCCESS:
                return None
            if nvml.nvmlDeviceGetMemoryInfo(card, ctypes.byref(found)) != SUCCESS:
                return None
            return int(found.used)
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no such library, or an older one
        return None

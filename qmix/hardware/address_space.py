"""Address space: what `ulimit -v` leaves to a model. Beyond the limit no memory can be mapped and no thread started, so
everything that a plan adds must fit below it."""

from __future__ import annotations

import re
from pathlib import Path

from qmix.hardware.memory import read_text
from qmix.process import address_space_limit
from qmix.sizes import MIB

THREADS = 256 * MIB  # for the stacks of the threads that are started after planning, and the allocator's slack


def address_space_left(root: Path = Path("/")) -> int | None:
    """Bytes that can still be mapped for a model: the limit without what is mapped now, and without THREADS. None
    where there is no limit, or no way to know what is mapped."""
    limit = address_space_limit()
    found = re.search(r"^VmSize:\s*(\d+) kB$", read_text(root / "proc/self/status"), re.MULTILINE)
    return None if limit is None or found is None else max(0, limit - 1024 * int(found[1]) - THREADS)

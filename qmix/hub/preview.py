"""The headers of a GGUF model that is not here yet, as files that have nothing else: enough to plan it.

Each file has its size and no data behind its header, so the disk gives it no room; whoever reads a tensor finds zeros.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qmix.errors import CheckpointError, one_line
from qmix.gguf.header import open_header
from qmix.hub import blobs

PREFIX = "qmix-headers-"
FIRST, MOST = 2**20, 2**28  # bytes of a file that are asked for at first, and in all


def headers_of(sources: Sequence[tuple[str, str, int]]) -> Path:
    """The first of the files [(name, url, bytes)], in a folder that goes when the process does. CheckpointError where
    one has no header."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    paths = [folder / name.rpartition("/")[2] for name, _, _ in sources]
    for path, (name, url, size) in zip(paths, sources, strict=True):
        _fetch_header(path, name, url, size)
    return paths[0]


def is_preview(path: Path) -> bool:
    """Whether a file has its header alone."""
    return path.parent.name.startswith(PREFIX)


def _fetch_header(path: Path, name: str, url: str, size: int) -> None:
    have, want = 0, FIRST
    with open(path, "wb") as file:
        file.truncate(size)
        while True:
            file.seek(have)
            came = blobs.fetch_range(url, have, min(want, size) - have, file.write,
                                     "download the file, and give its path")
            file.flush()
            have += came
            try:
                if open_header(path).file.data_start <= have:
                    return
                error = "its header has no end"
            except CheckpointError as e:
                error = e.message.replace(str(path), name)
            if have >= min(size, MOST) or not came:
                raise CheckpointError(one_line(error), "the file on the hub is no GGUF file that qmix reads")
            want *= 4

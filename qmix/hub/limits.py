"""How large the small files of a repository may be. They are a stranger's, and fetched before anything is known of the
model: without a bound they would fill the disk. The bounds are those within which they are read afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

from qmix.bounded import MAX_TEXT
from qmix.errors import CheckpointError
from qmix.hub.contents import MAX_JSON
from qmix.sizes import format_bytes

WEIGHTS = (".safetensors", ".gguf")  # whose bytes are compared with the free disk
TEMPLATE = ".jinja"
MAX_TOGETHER = 2 * MAX_JSON  # real ones have some 50 MB together
ANSWER = 30.0  # seconds that a hub has to say what a repository holds
CURE = "no real model has as much: the repository is damaged or hostile; take the model from another one"


def check_small_files(where: str, repo: str, revision: str | None, patterns: Sequence[str]) -> None:
    """Ask the hub how large the files are that match `patterns`. CheckpointError names one that is too large; raises
    what the hub's client raises where it does not say. where: the repository as an error names it."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=ANSWER)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    small = {name: size for name, size in sizes.items() if not name.endswith(WEIGHTS)
             and any(fnmatch(name, pattern) for pattern in patterns)}  # as the client matches them
    check_sizes(where, small)


def check_sizes(where: str, sizes: Mapping[str, int]) -> None:
    """CheckpointError unless files of these names may have so many bytes."""
    for name, size in sizes.items():
        most = MAX_TEXT if name.endswith(TEMPLATE) else MAX_JSON
        if size > most:
            raise CheckpointError(f"{where}: {name!r:.200}: {format_bytes(size)}, want at most {format_bytes(most)}",
                                  CURE)
    together = sum(sizes.values())
    if together > MAX_TOGETHER:
        largest = max(sizes, key=lambda name: sizes[name])
        raise CheckpointError(f"{where}: {len(sizes)} files beside the weights, {largest!r:.200} the largest: "
                              f"{format_bytes(together)}, want at most {format_bytes(MAX_TOGETHER)}", CURE)

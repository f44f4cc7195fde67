"""What is quantized: a local path, or a model of the hub, fetched now; with --discard-source into a folder of qmix's
own that is emptied meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qmix import hub, paths, render
from qmix.errors import UsageError
from qmix.sizes import format_bytes

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint
    from qmix.quantize.discard import Discard


@dataclass(slots=True)
class Source:
    """path: what is opened; found: of the hub; owned: the folder whose files may be freed."""

    path: Path
    found: hub.Found | None = None
    owned: Path | None = None
    discarded: Discard | None = None
    is_done: bool = False

    def discard(self, checkpoint: Checkpoint) -> Discard | None:
        """What frees the source while it is quantized, where that was asked for and something is qmix's own."""
        if self.owned is None or self.found is None:
            return None
        from qmix.quantize.discard import Discard

        self.discarded = found = Discard(
            checkpoint, self.owned, self.found.folder,
            partial(hub.refetch, self.found.name.repo, self.found.commit, self.found.access.offline), render.say)
        if not found.freeable:
            render.say("--discard-source: nothing is left to free: the files were in the hub's cache before, or are "
                       "discarded already")
        return found

    def done(self) -> None:
        """The store is whole."""
        self.is_done = True


@contextmanager
def fetched_source(text: str, access: hub.Access, discard: bool,
                   check: Callable[[], None] = lambda: None) -> Iterator[Source]:
    """Of SRC on the command line. check: raises where a model must not be fetched. Raises as paths.resolve."""
    found = paths.locate(text, render.say)
    if isinstance(found, Path):
        if discard:
            raise UsageError(f"--discard-source: {text} is here, and qmix did not download it",
                             "drop --discard-source, and delete it yourself")
        yield Source(paths.resolve(text, lambda line: None, "checkpoint", access))
    else:
        try:
            check()
        except UsageError:  # such as of an OUT that is a store already
            if discard:
                say_left(found)
            raise
        with fetched_name(found, access, discard) as source:
            yield source


@contextmanager
def fetched_name(name: hub.HubName, access: hub.Access, discard: bool) -> Iterator[Source]:
    """Of a model of the hub."""
    if not discard:
        yield fetch(hub.find(name, "checkpoint", render.say, access))
        return
    if hub.is_offline(access) and hub.private_folder(name.repo) is None:
        source = fetch(hub.find(name, "checkpoint", render.say, access))
        render.say("--discard-source: nothing is freed: offline the files are those in the hub's cache")
        yield source
        return
    with hub.claimed(name.repo) as folder:
        access = replace(access, cache=hub.private_cache())
        found = hub.find(name, "checkpoint", render.say, access)
        source = fetch(found)
        source.owned = folder
        try:
            yield source
        except UsageError:  # such as of an OUT that is a store already
            say_left(name)
            raise
        if source.is_done:
            if source.discarded is not None:
                render.say(source.discarded.line())
            freed, is_gone = hub.drop_weights(name.repo, found.folder, found.names)
            what = folder if is_gone else f"what no other run needs of {folder}"
            render.say(f"deleted {what}: {format_bytes(freed)} freed")
            if not is_gone:
                say_left(name)


def say_left(name: hub.HubName) -> None:
    """Where a run with --discard-source, perhaps one that was killed when its store was made, left something."""
    if (folder := hub.private_folder(name.repo)) is not None:
        render.say(f"{folder} has what a run with --discard-source fetched: where its store is made already, delete "
                   "that folder (qmix rm --source deletes both)")


def fetch(found: hub.Found) -> Source:
    """Everything, after the free space was compared."""
    found.check_room(render.say)
    found.fetch(render.say)
    return Source(found.path, found)

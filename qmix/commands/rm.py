"""`qmix rm`: delete a store of the models folder, and what qmix fetched to make it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmix import hub, paths, render
from qmix.commands.list import folder_bytes
from qmix.commands.options import Yes, agreed
from qmix.commands.run import library
from qmix.errors import ModelFileError, UsageError
from qmix.sizes import format_bytes


def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Stores, as `qmix list` names them.")],
    source: Annotated[bool, typer.Option("--source", help="Also delete what qmix downloaded from the hub to make "
                                         "them.")] = False,
    yes: Yes = False,
) -> None:
    """Delete stores that `qmix list` names."""
    from qmix.quantize.target import check_removable, remove_store

    found = [_folders(name) for name in dict.fromkeys(names)]
    for folders in found:
        for folder in folders:
            check_removable(folder)
    repos = {name: repo for name in names if source and (repo := _repo(name)) is not None}
    for name, folders in zip(dict.fromkeys(names), found, strict=True):
        size = format_bytes(sum(folder_bytes(folder) for folder in folders))
        what = f", and what qmix downloaded of {repos[name]}" if name in repos else ""
        render.say(f"{name}: {size} in {', '.join(map(str, folders))}{what}")
        if source and name not in repos:
            render.say(f"{name}: not known to be made of a model of the hub: there is no download to delete")
    if not yes:
        agreed("delete?")
    for name, folders in zip(dict.fromkeys(names), found, strict=True):
        # The download first: where it is in use nothing is lost, and without the store nobody would know of it.
        freed = hub.free_source(repos[name]) if name in repos else 0
        freed += sum(remove_store(folder) for folder in folders)
        library.forget(name)
        render.say(f"deleted {name}: {format_bytes(freed)} freed")


def _folders(name: str) -> list[Path]:
    """The store of that name and what an unfinished run left of one; UsageError where there is neither."""
    models = paths.models_folder()
    if not name or "/" in name or name in (".", "..") or "\0" in name:
        raise UsageError(f"{name!r:.200}: not a name of `qmix list`", "a folder elsewhere is yours to delete")
    found = [path for path in (models / name, models / f"{name}.partial") if path.is_symlink() or path.exists()]
    if not found:
        known = ", ".join(p.name for p in paths.local_stores()) or "none"
        raise UsageError(f"{name}: no such store in {models}", f"stores there: {known}")
    return found


def _repo(name: str) -> str | None:
    """The hub's repository that a store was made of."""
    from qmix.store import Manifest

    entry = library.load(name, render.say)
    if entry is not None:
        return entry.repo
    try:
        manifest = Manifest.read(paths.models_folder() / name / "qmix.json")
    except ModelFileError:
        return None
    parsed = hub.HubName.parse(manifest.source)
    return parsed.repo if parsed is not None and manifest.revision is not None else None

"""`qmix list`: the stores that have an alias."""

from __future__ import annotations

from pathlib import Path

from qmix import paths, render
from qmix.commands.options import Json
from qmix.sizes import format_bytes


def list_models(json: Json = False) -> None:
    """List the stores that have an alias."""
    rows = [{"alias": p.name, "size": _folder_bytes(p) if json else format_bytes(_folder_bytes(p)),
             "folder": str(p)} for p in paths.local_stores()]
    if not rows and not json:
        render.say(f"no stores in {paths.models_folder()}; a store is found there by its folder's name")
    else:
        print(render.table(rows, "json" if json else "table"))


def _folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file())

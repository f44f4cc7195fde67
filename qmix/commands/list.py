"""`qmix list`: the stores that have an alias."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from qmix import paths, render
from qmix.commands.options import Json
from qmix.errors import ModelFileError
from qmix.sizes import format_bytes

DAY = 10  # characters of a time that are its date


def list_models(json: Json = False) -> None:
    """List the stores that have an alias: how large, in which format, made of what, when last used."""
    rows = [_row(folder) for folder in paths.local_stores()]
    models = paths.if_any(paths.models_folder)
    begun = [] if models is None else sorted(path.parent for path in models.glob("*.partial/journal.jsonl"))
    rows += [_row(folder) | {"format": "unfinished"} for folder in begun]
    if not rows and not json:
        render.say(f"no stores in {paths.models_folder()}; a store is found there by its folder's name")
        return
    if not json:
        rows = [row | {"size": format_bytes(row["size"]), "used": (row["used"] or "never")[:DAY],
                       "source": render.clean(row["source"] or "?")} for row in rows]
    print(render.table(rows, "json" if json else "table"))


def _row(folder: Path) -> dict[str, Any]:
    """size in bytes; used: when a model was last loaded from it, local time, None where none was."""
    from qmix.commands.run import library
    from qmix.store import Manifest

    name = folder.name.removesuffix(".partial")
    entry = library.load(name, render.say)
    try:
        manifest = Manifest.read(folder / "qmix.json")
    except ModelFileError:
        manifest = None
    kind = "" if manifest is None else manifest.quant.experts if not manifest.quant.kinds else \
        "mixed: " + ", ".join(sorted({str(pair[0]) for pair in manifest.quant.kinds}))
    revision = "" if manifest is None or manifest.revision is None else f"@{manifest.revision[:7]}"
    source = entry.source.partition("@")[0] if entry is not None and entry.hub else \
        entry.source if entry is not None else None if manifest is None else manifest.source
    return {"alias": name, "size": folder_bytes(folder), "format": kind,
            "source": None if source is None else source + revision,
            "used": None if manifest is None else _used(manifest.digest), "folder": str(folder)}


def _used(digest: str) -> str | None:
    """When the router statistics of a store, which each run adds to, were written last."""
    from qmix.offload.router_stats import stats_file

    folder = paths.if_any(paths.routing_folder)
    try:
        seconds = None if folder is None else stats_file(folder, digest).stat().st_mtime
    except OSError:
        return None
    return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def folder_bytes(folder: Path) -> int:
    """Of the files that a store's folder holds."""
    try:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder)
                   if entry.is_file(follow_symlinks=False))
    except OSError:
        return 0

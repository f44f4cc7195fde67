"""peers.py's comparison of quantizing: seconds for a gigabyte of source, qmix beside llama.cpp."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quantize
import synthetic_gguf
from offload_peers import disk_bandwidth, drop_page_cache, files_of
from peers_report import GB, cell, table
from peers_run import Runner, now
from sides import say
from synthetic_recipe import Recipe

CHECKPOINT = Path(__file__).with_name("synthetic_checkpoint.py")


def quantizing(runner: Runner, names: Sequence[str], work: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """A bf16 checkpoint of one layer by each way, "rtn" and "hqq" of qmix or a type of llama.cpp; {"name", "seconds",
    "source_gb"} or {"name", "error"}. The page cache is emptied before each, and each ends on the disk."""
    source, gguf, out = work / "source", work / "source.gguf", work / "quantized"
    if not source.exists():
        say(f"writing {source}")
        shutil.rmtree(draft := work / "source.partial", ignore_errors=True)
        subprocess.run([sys.executable, str(CHECKPOINT), str(draft), "--layers", "1", "--hidden", str(recipe.hidden),
                        "--inner", str(recipe.inner)], check=True, stdout=sys.stderr)
        draft.rename(source)
    if not gguf.exists() and any(name.startswith("Q") for name in names):
        synthetic_gguf.write_gguf(Recipe(1, hidden=recipe.hidden, inner=recipe.inner), gguf, checkpoint=source)
    found = []
    for name in names:
        say(f"quantizing: {name}")
        mine = not name.startswith("Q")
        files = files_of(source if mine else gguf)
        drop_page_cache(files)
        size = sum(path.stat().st_size for path in files) / GB
        row: dict[str, Any] = {"name": name, "source_gb": size, "started": now()}
        if mine:
            try:
                done = quantize.measure(source, out, name, runner.threads)
                found.append({**row, "seconds": done["seconds"], "details": done})
            except SystemExit as e:
                found.append({**row, "error": str(e).strip().splitlines()[-1]})
        else:
            disk, ram = disk_bandwidth(files, 1.0), runner.ram()
            drop_page_cache(files)
            done, _ = runner.run("llama", {"do": "quantize", "model": str(gguf), "out": str(out), "type": name}, {})
            out.unlink(missing_ok=True)
            found.append({**row, **done, "details": {"memory GB/s": round(ram, 1), "disk GB/s": round(disk / GB, 2)}})
    return found


def quantize_table(found: Sequence[dict[str, Any]]) -> str:
    """Seconds for a GB of source, and how many times faster than each of llama.cpp's."""
    speeds = {row["name"]: row["seconds"] / row["source_gb"] for row in found if "seconds" in row}
    peers = [name for name in speeds if name.startswith("Q")]
    rows = []
    for row in found:
        name, side = row["name"], "llama.cpp" if row["name"].startswith("Q") else "qmix"
        each = speeds.get(name)
        rows.append([f"{side} {name}", row.get("error") or f"{row['seconds']:.1f}", f"{row['source_gb']:.2f}",
                     cell([each] if each else []), *(cell([speeds[p] / each] if each else []) for p in peers),
                     *(str(row.get("details", {}).get(key, "–")) for key in ("memory GB/s", "disk GB/s"))])
    return table(["quantizing", "s", "source GB", "s per GB", *(f"times as fast as {p}" for p in peers),
                  "RAM read GB/s", "disk GB/s"], rows)

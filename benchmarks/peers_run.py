"""peers.py's runs: a side is a process of its own, which is timed while memory and disk are measured around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf_blocks
import synthetic
import synthetic_gguf
from offload_peers import disk_bandwidth, drop_page_cache, files_of
from peers_machine import now
from peers_report import Run
from sides import say
from synthetic_recipe import Recipe

from qmix.hardware.bandwidth import measure_ram

SIDE = Path(__file__).with_name("peers_side.py")


@dataclass(frozen=True, slots=True)
class Side:
    """kind: "qmix" | "llama"; types: of the dense part, or of the GGUF; env: set for the process."""

    name: str
    kind: str
    types: str
    model: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in files_of(self.model))

    def token_bytes(self, recipe: Recipe) -> int:
        return (synthetic if self.kind == "qmix" else synthetic_gguf).bytes_per_token(recipe, self.types)

    def make(self, recipe: Recipe) -> None:
        if self.model.exists():
            return
        say(f"writing {self.model}")
        if self.kind == "qmix":
            synthetic.write_store(recipe, self.model, self.types)
        else:
            synthetic_gguf.write_gguf(recipe, self.model, self.types)

    def planned_bytes(self, recipe: Recipe) -> int:
        if self.kind == "qmix":
            return synthetic.layout_of(recipe, self.types)[2].nbytes
        return sum(gguf_blocks.tensor_bytes(kind, shape) for _, kind, shape, _ in
                   synthetic_gguf.drafts(recipe, self.types))


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs sides as processes and answers their probes."""

    peer: str
    threads: int
    timeout: float

    def run(self, side: str, task: dict[str, Any],
            env: dict[str, str]) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """(what the side printed last, {probe: GB/s of the RAM}); {"error": ...} where it failed."""
        probes: dict[str, list[float]] = {}
        found: dict[str, Any] = {}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file, tempfile.TemporaryFile("w+") as errors:
            file.write(json.dumps({**task, "threads": self.threads, "started": time.time()}))
            file.flush()
            command = [sys.executable if side == "qmix" else self.peer, str(SIDE), side, file.name]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                  env={**os.environ, **env}) as process:
                timer = threading.Timer(self.timeout, process.kill)
                timer.start()
                try:
                    for line in process.stdout or ():
                        message = json.loads(line) if line.startswith("{") else {}
                        if "probe" in message:
                            probes.setdefault(message["probe"], []).append(self.ram())
                            process.stdin.write("\n")  # type: ignore[union-attr]
                            process.stdin.flush()  # type: ignore[union-attr]
                        elif message:
                            found = message
                except (OSError, ValueError) as e:
                    process.kill()
                    found = {"error": str(e)}
                finally:
                    late = not timer.is_alive()
                    timer.cancel()
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1]
        if process.returncode or not found:
            why = f"killed after {self.timeout:.0f} s" if late else f"exit {process.returncode}"
            return {"error": f"{why}: {last}" if last else why}, probes
        return found, probes

    def ram(self) -> float:
        return measure_ram(self.threads, seconds=0.6, say=lambda line: None)

    def speed(self, side: Side, task: dict[str, Any], recipe: Recipe) -> Run:
        files = files_of(side.model)
        drop_page_cache(files)
        before = disk_bandwidth(files, 1.0)
        drop_page_cache(files)
        found, probes = self.run(side.kind, {**task, "do": "speed", "model": str(side.model)}, side.env)
        return {"side": side.name, "started": now(), "nbytes": side.nbytes, "token_bytes": side.token_bytes(recipe),
                "disk_bandwidth": (before + disk_bandwidth(files, 1.0)) / 2, "probes": probes,
                "bandwidth": {name: sum(values) / len(values) for name, values in probes.items()}, **found}

"""A section of gpu.py, as a process of its own: `python benchmarks/gpu_side.py SECTION TASK.json`; prints JSON lines.

Each section imports what it needs when it runs: what one lacks does not stop the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_sections import emit

Task = dict[str, Any]
HOST_SLOTS = 12  # records that the CPU's speed is measured over: many times any cache


def machine(task: Task) -> None:
    """Where and with what. Only a missing card ends it: nothing else that cannot be found out does."""
    import torch
    from gpu_device import open_device

    device = open_device(task["stand_in"])
    free, total = device.memory()
    emit(card=device.name, vram_total=total, vram_free=free, torch=torch.__version__, cuda=torch.version.cuda,
         packages={name: _version(name) for name in ("triton", "transformers", "accelerate", "bitsandbytes", "numpy")})
    try:
        import peers

        emit(**peers.machine(""))
    except Exception as e:
        emit(note=f"{type(e).__name__}: {e}")
    if task["commit"]:
        emit(commit=task["commit"])
    if not task["stand_in"]:
        emit(capability=list(device.capability), nvidia_smi=_driver())


def _driver() -> dict[str, str] | str:
    """What torch does not say."""
    query = "driver_version,pcie.link.gen.current,pcie.link.width.current,power.limit,clocks.max.memory"
    try:
        said = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as e:
        return str(e)
    return dict(zip(query.split(","), said.strip().split(", "), strict=False))


def check(task: Task) -> None:
    import gpu_check

    gpu_check.run(task)


def bandwidth(task: Task) -> None:
    """VRAM, bus, RAM, and the CPU computing experts out of RAM."""
    import torch
    from cuda_kernels import random_slab
    from gpu_device import bus_bandwidth, memory_bandwidth, open_device

    from qmix.engine.kernels import select_kernels
    from qmix.hardware import check_threads, physical_cores
    from qmix.hardware.bandwidth import measure_ram
    from qmix.store import Store

    threads = check_threads(task["threads"]) if task["threads"] else physical_cores()
    device, small = open_device(task["stand_in"]), task["stand_in"]
    emit(vram=memory_bandwidth(device, 2**24 if small else 2**32))
    emit(pcie=bus_bandwidth(device, 2**22 if small else 2**28))
    emit(ram=measure_ram(threads, nbytes=2**26 if small else None, seconds=0.3 if small else 2.0,
                         say=lambda line: emit(note=line)))
    with Store.open(Path(task["store"])) as store:
        record, hidden = store.layout.kinds[0], store.config.hidden_size
        kernels = select_kernels(store.config, store.quant, lambda line: emit(note=line), "auto")
        slab = random_slab(record, 2 if small else HOST_SLOTS, torch.device("cpu"))
        views = [store.expert_views(0, slot) for slot in slab]
    torch.set_num_threads(threads)
    x, rounds = torch.randn(1, hidden), 2
    kernels.expert(x, *views[0])
    start = time.perf_counter()
    for _ in range(rounds):
        for pair in views:
            kernels.expert(x, *pair)
    seconds = time.perf_counter() - start
    emit(cpu=rounds * len(views) * record.nbytes / 1e9 / seconds, threads=threads, cpu_kernels=dict(kernels.names))


def store(task: Task) -> None:
    """The random model's weights, written here."""
    import synthetic
    from synthetic_recipe import Recipe

    from qmix.demo import CHECKPOINT

    recipe = Recipe(task["layers"], hidden=task["hidden"], inner=task["inner"], seed=task["seed"])
    start = time.perf_counter()
    # Any tokenizer does: tokens are given by number.
    nbytes = synthetic.write_store(recipe, Path(task["store"]), workers=task["workers"],
                                   tokenizer=CHECKPOINT / "tokenizer.model")
    seconds = time.perf_counter() - start
    emit(bytes=nbytes, write_seconds=seconds, gbps=nbytes / 1e9 / seconds, workers=task["workers"])


def run(task: Task) -> None:
    import gpu_run

    gpu_run.run(task)


def kernels(task: Task) -> None:
    import gpu_kernels

    gpu_kernels.run(task)


def formats(task: Task) -> None:
    """cuda_kernels.py: the expert kernels of every format, and of prompts."""
    import tempfile

    script = Path(__file__).with_name("cuda_kernels.py")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        done = subprocess.run([sys.executable, str(script), "--json", str(file), *task["options"]],
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            if "differs from the reference" in said:
                emit(wrong=said)
                return
            raise SystemExit(said)
        figures = json.loads(file.read_text())
    emit(copy=figures["copy GB/s"])
    for row in figures["rows"]:
        emit(row={"what": "format", **row})


def peer(task: Task) -> None:
    import gpu_peers

    gpu_peers.RUN[task["peer"]](task)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


RUN: dict[str, Callable[[Task], None]] = {
    "machine": machine, "check": check, "bandwidth": bandwidth, "store": store, "run": run, "kernels": kernels,
    "formats": formats, "peer": peer}


def main() -> None:
    section, task = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    try:
        RUN[section](task)
    except Exception as e:  # its last line is the reason that the report gives
        import traceback

        traceback.print_exc()
        print(f"{type(e).__name__}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1)
    sys.stdout.flush()
    os._exit(0)  # threads of the stand-in, of readers and of libraries may be about still


if __name__ == "__main__":
    main()

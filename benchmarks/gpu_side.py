"""The process that runs gpu.py's sections, one after another (gpu_worker.py says how it is asked); prints JSON lines.

Each section imports what it needs when it runs: what one lacks does not stop the others.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_sections import emit, emit_failure, short

Task = dict[str, Any]
STACKS = 4.0  # seconds before a section's end at which the stacks of its threads are written down
# Bytes more than before a section from which it left something behind that the next would be measured with.
LEFT = {"VRAM": 64 * 2**20, "RAM": 2 * 2**30}
SPARE = int(16e9)  # bytes of RAM beside the store and a second copy of it, for the store to lie in shared memory
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
        import machines

        emit(**machines.machine(""))
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
        record, hidden = store.layout.kinds[0], store.model.hidden
        kernels = select_kernels(store.model, store.quant, lambda line: emit(note=line), "auto")
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
    """The random model's weights, written here. task: folders, the first in shared memory; name, of the store; fit: the
    share of the bytes of int4 experts that mixed ones take, 0 for int4. given: a store that is there already."""
    if task.get("given"):
        emit(path=task["given"], given=True)
        return
    import synthetic
    from synthetic_models import RECIPES

    from qmix.demo import CHECKPOINT

    recipe = RECIPES[task["model"]](task["layers"], hidden=task["hidden"], inner=task["inner"], seed=task["seed"])
    _, quant, layout = synthetic.layout_of(recipe)
    size = 0
    if task["fit"]:
        size = layout.nbytes - int((1 - task["fit"]) * sum(region.nbytes for region in layout.records.values()))
        _, quant, layout = synthetic.layout_of(recipe, size=size)
    folder, available = roomy([Path(folder) for folder in task["folders"]], layout.nbytes)
    experts, weights = sum(region.nbytes for region in layout.records.values()), 3 * task["hidden"] * task["inner"]
    emit(folder=str(folder.parent), available=available, kinds=[list(kind) for kind in quant.kinds],
         block=quant.block, bits=8 * experts / weights / len(layout.records))
    start = time.perf_counter()
    # Any tokenizer does: tokens are given by number.
    nbytes = synthetic.write_store(recipe, folder / task["name"], workers=task["workers"], size=size,
                                   tokenizer=CHECKPOINT / "tokenizer.model")
    seconds = time.perf_counter() - start
    emit(path=str(folder / task["name"]), bytes=nbytes, write_seconds=seconds, gbps=nbytes / 1e9 / seconds,
         workers=task["workers"])


def roomy(folders: list[Path], nbytes: int) -> tuple[Path, int]:
    """(the first folder with room for a store of so many bytes, bytes of RAM that are free): the first is in shared
    memory, where what is loaded of the store must fit beside it. Asked late: a virtual machine's memory may grow."""
    from sides import number

    available = 1024 * number("/proc/meminfo", r"MemAvailable:\s+(\d+)")
    for folder in folders[:-1]:
        spare = SPARE if nbytes > SPARE else nbytes
        if shutil.disk_usage(folder).free > 1.05 * nbytes and available > 2 * nbytes + spare:
            return folder, available
    return folders[-1], available


def run(task: Task) -> None:
    import gpu_run

    gpu_run.run(task)


def kernels(task: Task) -> None:
    import gpu_kernels

    gpu_kernels.run(task)


def formats(task: Task) -> None:
    """cuda_kernels.py: the expert kernels of every format, and of prompts."""
    import cuda_kernels
    import torch
    from synthetic import layout_of
    from synthetic_recipe import Recipe

    from qmix.hardware import physical_cores

    small = task["stand_in"]
    torch.set_num_threads(physical_cores())  # for the reference; a section before may have wanted fewer
    device = torch.device("cpu" if small else "cuda")
    block = layout_of(Recipe(1))[1].block  # the store's
    emit(copy=cuda_kernels.copy_bandwidth(20, device), block=block)
    shape = cuda_kernels.TINY if small else cuda_kernels.MIXTRAL
    for name in ("int4",) if small else cuda_kernels.FORMATS:
        try:
            for row in cuda_kernels.Case(name, shape, device, block=block, repeat=20).measure():
                emit(row={"what": "format", **row})
        except cuda_kernels.Differs as e:
            emit(wrong=str(e))
        except Exception as e:
            emit_failure(name, e)


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


def held() -> dict[str, int]:
    """Bytes that this process has: on the card by torch's count, and in RAM without what it shares."""
    import psutil

    memory = psutil.Process().memory_info()
    found = {"RAM": memory.rss - memory.shared, "VRAM": 0}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)  # an engine limits it to its budget
        found["VRAM"] = torch.cuda.memory_allocated()
    return found


def left_behind(before: dict[str, int], first: bool) -> str | None:
    """What a section did not give back, as text, where it is so much that the next one would be measured wrongly. Of
    the first, RAM does not count: libraries stay."""
    gc.collect()
    after = held()
    if first:
        before = {**before, "RAM": after["RAM"]}
    more = [f"{(after[name] - before[name]) / 2**20:.0f} MiB of {name}" for name, limit in LEFT.items()
            if after[name] - before[name] > limit]
    return f"did not give back {' and '.join(more)}" if more else None


def one(do: str, task: Task, first: bool) -> dict[str, Any]:
    """Run a section; its last message. first: in this process, whose libraries are not loaded yet."""
    before = held()
    # A stall shows where it was before its process is ended; twice, since the parent's SIGTERM tells it again.
    faulthandler.dump_traceback_later(max(0.5 * task["seconds"], task["seconds"] - STACKS), file=sys.stderr)
    try:
        RUN[do](task)
        return {"reason": None, "traceback": None, "left": left_behind(before, first)}
    except (Exception, SystemExit) as e:  # a library's exit is the section's, too
        text = traceback.format_exc()
        sys.stderr.write(text)
        reason = str(e) if isinstance(e, SystemExit) else short(e)
        return {"reason": reason or "ended without a reason", "traceback": text, "left": None}
    finally:
        faulthandler.cancel_dump_traceback_later()


def serve() -> None:
    """Sections named on stdin, a line each, until it ends or one fails. Messages have a pipe of their own: what a
    library prints goes to stderr, and what a child process reads is empty."""
    commands, sys.stdout = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
    first = True
    for line in commands:
        asked = json.loads(line)
        found = one(asked["do"], asked["task"], first)
        emit(end=found)
        if found["reason"] or found["left"]:
            break
        first = False
    os._exit(0)  # threads of the stand-in, of readers and of libraries may be about still


if __name__ == "__main__":
    serve()

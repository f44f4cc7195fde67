"""What qmix finds on this machine, and what of it is a problem.

Each section is a function that returns its part of the report and the problems it saw, each with a cure. A section
that cannot look says so in its place; it never cuts the report short.

Sizes are bytes, bandwidths decimal GB/s.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from qmix import hardware
from qmix.commands.doctor.gpu import gpu
from qmix.commands.doctor.problem import Problem, Section
from qmix.commands.doctor.speeds import Speeds
from qmix.config import BLOCKS, GROUPED_BITS
from qmix.errors import QmixError, UsageError
from qmix.hardware import bandwidth as bandwidths
from qmix.hardware.cores import cpu_instructions, cpu_model, cpu_quota
from qmix.hardware.disk import DiskEffort, DiskReport, direct_refusal, filesystem, measure_disk, scratch_file
from qmix.hardware.memory import hugepages, memlock_limit, read_text
from qmix.kernels import native, reference
from qmix.kernels.table import select
from qmix.render import Progress
from qmix.sizes import GIB, MIB, MX_BLOCK, format_bytes

LIBRARIES = ("torch", "bitsandbytes", "safetensors", "sentencepiece", "tokenizers")
OPTIONAL = ("triton",)
TINY = 8 * GIB  # of memory: Mixtral 8x7B's experts are 24 GiB, so that most of them stay on the disk
LOW = 4 * GIB  # of available memory
WORTH_READING = 256 * MIB  # bytes of expert files below which a test file measures the disk better
IN_MEMORY = ("tmpfs", "ramfs")
FOREIGN = ("9p", "drvfs", "v9fs", "nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs")
NOT_MEASURED = "not measured: run qmix doctor --bandwidth"


def run(folder: Path | None, *, bandwidth: bool, cache_file: Path | None, say: Callable[[str], None],
        progress: Progress | None = None, effort: DiskEffort | None = None, scratch_bytes: int = GIB,
        ram_bytes: int | None = None, today: date | None = None, root: Path = Path("/"),
        speeds: Callable[[], Speeds] | None = Speeds) -> dict[str, Any]:
    """The report, nested plain data for render.document; "problems" is its last key, a row each.

    folder: a store, or where one would be, whose disk is examined; UsageError where it is none.
    bandwidth: measure RAM, GPU and, with a folder, its disk, and keep the figures in cache_file; otherwise
    they are what cache_file holds. The disk is measured by the store's expert files, or by a test file of
    scratch_bytes in the folder. effort bounds the disk's measurement, ram_bytes the buffer of the RAM's.
    speeds: makes what measures the kernels, for two seconds; None: they are only named.
    say: a line for what is ignored or measured otherwise. root stands for / in tests.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: not a folder", "name a store, or the folder that will hold one")
    report: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, section in (("machine", lambda: machine(root)), ("libraries", libraries),
                          ("kernels", lambda: kernels(speeds() if speeds else None)), ("gpu", lambda: gpu(root, say))):
        report[name], found = section()
        problems += found
    disk, measured, found = examine_disk(folder, bandwidth, effort or DiskEffort(), scratch_bytes, say, progress)
    report["disk"] = disk
    problems += found
    report["bandwidths"], found = examine_bandwidths(measured, bandwidth, cache_file, ram_bytes,
                                                     today or date.today(), say)
    problems += found
    report["problems"] = [problem._asdict() for problem in problems]
    return report


def machine(root: Path) -> Section:
    """Processor, memory, system, and what the system allows."""
    memory, cores, quota = hardware.memory(), hardware.physical_cores(root), cpu_quota(root)
    system, problems = _system(root)
    pages, memlock = hugepages(root), memlock_limit()
    if memory.total < TINY:
        problems.append(Problem(f"memory: {format_bytes(memory.total)} may be used",
                                "Mixtral 8x7B reads most experts from disk here: lift the container's or .wslconfig's "
                                "limit, or choose a smaller model"))
    elif memory.available < LOW:
        problems.append(Problem(f"memory: {format_bytes(memory.available)} of {format_bytes(memory.total)} available",
                                "close other programs: experts can use their memory"))
    if quota is not None and quota < cores:
        problems.append(Problem(f"cores: {cores}, but a cgroup grants the time of {quota:g}",
                                "raise the container's CPU limit: by default no more threads compute than it "
                                "has time for"))
    if pages == "never":
        problems.append(Problem("transparent huge pages are off",
                                "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "system": system, "cpu": cpu_model(root), "physical_cores": cores,
        "compute_threads": hardware.compute_cores(root),
        "cpu_quota": "none" if quota is None else quota,
        "instructions": cpu_instructions(root), "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory": {"installed_bytes": psutil.virtual_memory().total, "usable_bytes": memory.total,
                   "available_bytes": memory.available},
        "transparent_hugepages": pages,
        "memlock_limit": "none" if memlock is None else format_bytes(memlock),
    }, problems


def _system(root: Path) -> tuple[str, list[Problem]]:
    release = read_text(root / "proc/sys/kernel/osrelease").strip() or platform.release()
    name = f"{platform.system()} {release}"
    if platform.system() != "Linux":
        return f"{name}, untested", [Problem(f"{platform.system()}: qmix is tested on Linux and WSL2 only",
                                             "expect buffered disk reads and rough edges; please report them")]
    return (f"{name}, WSL (its memory is what .wslconfig grants)" if "microsoft" in release.lower() else name), []


def libraries() -> Section:
    """Versions, read from the packages' metadata: nothing is imported for it."""
    found: dict[str, Any] = {"python": platform.python_version(), "qmix": _version("qmix")}
    found |= {name: _version(name) for name in (*LIBRARIES, *OPTIONAL)}
    return found, [Problem(f"{name} is not installed", f"pip install {name}")
                   for name in LIBRARIES if found[name] == "not installed"]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def kernels(speeds: Speeds | None = None) -> Section:
    """Which kernel runs for each packed format on this CPU, and what does the rest of a layer while decoding, after the
    self-tests of kernels.table and kernels.layer, and the lines that these say; how fast they are beside the memory."""
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    slow: list[str] = []
    for name, block in (*((name, block) for name in GROUPED_BITS for block in BLOCKS), ("mxfp4", MX_BLOCK),
                        ("int8", 0)):
        table = select([name], [block], say=lines.append, activations="auto")
        measured = {} if speeds is None else speeds.kernel(table, name, block)
        rows.append({"format": name, "block": block or "-", **measured, "kernel": table.names[name]})
        if table.kernels[name, block] is reference.packed_linear and name not in slow:
            slow.append(name)
    levels = ", ".join(native.levels()) or f"none: {native.trouble()}"
    beside = {} if speeds is None else {"memory_read_gbps": speeds.memory()}
    return {"native_levels": levels, "norm_router_rotary": table.layer.name, "table": rows, **beside,
            "notes": [{"note": line} for line in dict.fromkeys(lines)]}, _native_problems() + [
        Problem(f"{name} runs on the slow reference kernel", "install the torch that qmix is tested with "
                "(constraints.txt), on a CPU with AVX2 or AVX-512") for name in slow]


def _native_problems() -> list[Problem]:
    if not (trouble := native.trouble()):
        return []
    report = native.build_report()
    again = ("install a C compiler (gcc), then install qmix again (pip install --force-reinstall --no-deps), or in its "
             "source folder: python setup.py build_ext --inplace")
    return [Problem(f"native kernels: {trouble}", again if report is None else
                    f"{again}; the end of the compiler's output is in {report}")]


def examine_disk(folder: Path | None, measure: bool, effort: DiskEffort, scratch_bytes: int,
                 say: Callable[[str], None],
                 progress: Progress | None) -> tuple[dict[str, Any], DiskReport | None, list[Problem]]:
    """The disk that holds `folder`, measured where asked."""
    if folder is None:
        return {"folder": "none named: the disk was not examined"}, None, []
    kind, usage = filesystem(folder), psutil.disk_usage(str(folder))
    problems = _filesystem_problems(kind)
    report: dict[str, Any] = {"folder": str(folder), "filesystem": kind, "free_bytes": usage.free}
    files = sorted(path for path in folder.glob("experts-*.safetensors") if path.is_file())
    try:
        refusal = direct_refusal(files[0] if files else folder)
        report["direct_reads"] = "accepted" if refusal is None else f"refused: {refusal}"
    except QmixError as e:
        refusal, report["direct_reads"] = None, f"not tried: {e.message}"
    found = None
    if measure and kind not in IN_MEMORY:
        try:
            found = _measure(folder, files, effort, scratch_bytes, say, progress)
        except QmixError as e:
            problems.append(Problem(f"the disk was not measured: {e.message}", e.cure or "name another folder"))
    if found:
        report["reads"] = [{"threads": row.depth, "chunk": format_bytes(row.chunk),
                            "gbps": float(f"{row.gbps:.3g}")} for row in found.rows]
    if refusal or (found and not found.direct):
        problems.append(Problem(f"{kind} refuses O_DIRECT: reads are buffered, take page cache, and are mostly slower",
                                "keep the store on a local disk with ext4, xfs or btrfs"))
    return report, found, problems


def _filesystem_problems(kind: str) -> list[Problem]:
    if kind in IN_MEMORY:
        return [Problem(f"the folder is on {kind}, that is, in memory: no disk to measure",
                        "keep the store on a disk: here it takes the memory that experts need")]
    if kind in FOREIGN:
        return [Problem(f"the folder is on {kind}: experts would be read over a network or out of Windows",
                        "keep the store on a local disk; under WSL inside the Linux file system, not /mnt/c")]
    return []


def _measure(folder: Path, files: list[Path], effort: DiskEffort, scratch_bytes: int, say: Callable[[str], None],
             progress: Progress | None) -> DiskReport:
    if sum(path.stat().st_size for path in files) >= WORTH_READING:
        return measure_disk(files, effort, say=say, progress=progress)
    say(f"measuring the disk with a test file of {format_bytes(scratch_bytes)} in {folder}, removed afterwards")
    with scratch_file(folder, scratch_bytes) as path:
        return measure_disk([path], effort, say=say, progress=progress)


def examine_bandwidths(disk: DiskReport | None, measure: bool, cache_file: Path | None, ram_bytes: int | None,
                       today: date, say: Callable[[str], None]) -> Section:
    """What was measured, now or earlier; what is measured now is kept in cache_file (None where there is no home)."""
    if not measure:
        known = None if cache_file is None else bandwidths.load(cache_file, say)
        return ({"source": NOT_MEASURED}, []) if known is None else ({"source": str(cache_file), **asdict(known)}, [])
    try:
        found = bandwidths.measure(disk, today=today, ram_bytes=ram_bytes, say=say)
    except QmixError as e:
        return {"source": "not measured"}, [Problem(f"bandwidths: {e.message}", e.cure or "try again")]
    problems = []
    try:
        if cache_file is None:
            raise QmixError("no home folder", "set HOME or XDG_CACHE_HOME to a folder that can be written")
        bandwidths.save(found, cache_file)
    except QmixError as e:
        problems.append(Problem(f"the figures were not kept: {e.message}", e.cure or "try again"))
    if disk is None:
        say("no disk was measured, and the saved figures have none: name a store or a folder to measure its disk")
    return {"source": "measured now", **asdict(found)}, problems

"""First contact with a GPU: all that can be learned in one call of at most ten minutes. first_contact.sh starts it.

Prints what machine this is, builds the C library in place, imports torch once so that later imports are fast, and then
runs, the cheap and telling first, each within a share of the time and none stopping the next:

    tests           the test files of kernels and copies, which take the card when there is one
    prompt_check    the products and the attention of prompts, every row against fp32: with the assembler (ptxas) that
                    Triton brings, without WGMMA (DISABLE_MMA_V3=1), and with another ptxas, where TRITON_PTXAS_PATH
                    names one or one is found
    gpu.py          check, kernels, stores, decoding, prompts, peers

No network, no pip. What a missing package prevents is "unavailable". One table ends the output, before it the worst
failures, together within 11,000 characters. In --out lie at most six files: first-contact.json, .md and .log (all that
was printed), prompt-check.json, gpu.py's DATE-gpu-CARD.json and .md.

Exit code 0 whatever failed, was late or unavailable; 1 where results are wrong or tests failed; 2 without a card.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import FrameType
from typing import Any

import first_contact_report as report
from gpu_sections import Section, allot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NATIVE = ROOT / "qmix/kernels/native"
REHEARSAL = HERE / "rehearsal"
TESTS = ("test_cuda.py", "test_cuda_ops.py", "test_cuda_experts.py", "test_cuda_rooms.py", "test_cuda_fused.py",
         "test_cuda_layer.py", "test_cuda_router.py", "test_cuda_kv_int8.py", "test_cuda_prompt.py",
         "test_prompt_experts.py", "test_attend*.py", "test_device_table.py", "test_copies*.py", "test_configs.py")
ENGINE = "tests/test_architectures_device.py::test_tritons_kernels_in_the_engine"
SECONDS = 560.0  # a call of 600 keeps a margin for the start
CLOSING = 6.0  # seconds kept for the report
GRACE = 8.0  # seconds for what was asked to end: pytest tells its failures then
MARGIN = 4.0  # seconds between a step's own end and its being asked to end
KEPT = 2**20  # bytes of a step's output at its beginning and its end
PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "bitsandbytes", "llama-cpp-python",
            "prompt_toolkit", "wcwidth", "xxhash", "safetensors", "sentencepiece", "tokenizers", "typer", "rich",
            "psutil", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "setuptools")
WARM = """
import time; start = time.perf_counter()
import torch, triton
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}, imported in "
      f"{time.perf_counter() - start:.1f} s")
if torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    print(f"card: {about.name}, compute capability {about.major}.{about.minor}, {about.total_memory / 2**30:.1f} GiB, "
          f"{about.multi_processor_count} multiprocessors; free {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB")
else:
    print("card: none")
"""
# setup.py, with its files compiled at once: one after another they take a minute, longer than importing torch.
BUILD = """
import runpy, sys
from concurrent.futures import ThreadPoolExecutor
import setuptools
try:
    from distutils.ccompiler import CCompiler
    one_by_one = CCompiler.compile
    def compile(self, sources, *args, **kwargs):
        with ThreadPoolExecutor() as pool:
            return sum(pool.map(lambda source: one_by_one(self, [source], *args, **kwargs), sources), [])
    CCompiler.compile = compile
except ImportError as e:
    print(f"compiled one by one: {e}")
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
LEVELS = """
from qmix.kernels.native import loader
print("native kernels: " + (", ".join(loader.levels()) or "none"))
"""


@dataclass(frozen=True, slots=True)
class Step:
    """command, in `env`; least, most: shares of the time that the steps have together. unless: why it cannot run here.
    stop: the signal that asks it to end."""

    name: str
    command: Sequence[str]
    least: float
    most: float
    env: Mapping[str, str] = field(default_factory=dict)
    unless: str | None = None
    stop: signal.Signals = signal.SIGTERM


@dataclass(frozen=True, slots=True)
class Folders:
    """Of results and of scratch; and the log of all output."""

    out: Path | None
    scratch: Path
    log: Callable[[str], None]


class Terminated(BaseException):
    """SIGTERM."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", nargs="?", type=float, default=SECONDS, help="for everything (560)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--stand-in", action="store_true", help="the CPU as device, small models and shapes")
    parser.add_argument("--commit", help="to be recorded, where the code is a copy that git does not know")
    parser.add_argument("--without", default="", metavar="NAMES", help="hide these packages, by comma, to rehearse")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="other test files than those of kernels and copies")
    parser.add_argument("--sections", metavar="NAMES", help="of gpu.py, by semicolon: its --only")
    args = parser.parse_args()
    if args.seconds < 30:
        parser.error(f"SECONDS: got {args.seconds:g}, want 30 or more")
    return args


def environment(args: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """For all that runs: the code of this folder, the assembler that Triton brings, caches of their own."""
    env = {name: value for name, value in os.environ.items() if name not in (
        "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "DISABLE_MMA_V3")}
    paths = [str(ROOT), *([str(REHEARSAL)] if args.without else [])]
    return env | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "QMIX_REHEARSE_WITHOUT": args.without,
                  "TRITON_CACHE_DIR": str(scratch / "triton"), "XDG_CACHE_HOME": str(scratch / "cache"),
                  "XDG_CONFIG_HOME": str(scratch / "config")}


def have(name: str, args: argparse.Namespace) -> bool:
    return name not in args.without.split(",") and importlib.util.find_spec(name) is not None


def facts(args: argparse.Namespace, env: Mapping[str, str], folders: Folders) -> None:
    """What machine this is; each question has a few seconds."""
    shell = {"nvidia-smi": "nvidia-smi", "cores": "nproc; grep -m1 'model name' /proc/cpuinfo",
             "memory": "free -g; cat /sys/fs/cgroup/memory.max 2>/dev/null", "space": "df -h /dev/shm /tmp",
             "tools": "gcc --version | head -1; nvcc --version | tail -2; uname -sr"}
    for name, command in shell.items():
        folders.log(f"== {name}\n{asked(['bash', '-c', command], env)}")
    code = ("import importlib.metadata as m, sys\ndef v(p):\n try: return m.version(p)\n except Exception: return "
            f"'missing'\nprint(sys.version.split()[0], *(p + ' ' + v(p) for p in {PACKAGES!r}), sep=', ')")
    folders.log(f"== Python {sys.executable}\n{asked([sys.executable, '-c', code], env)}")


def asked(command: Sequence[str], env: Mapping[str, str], seconds: float = 15.0) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=dict(env), cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{type(e).__name__}: {e}"
    return (done.stdout + done.stderr).strip()


def other_ptxas() -> Path | None:
    """Another assembler than Triton's own: the named one, or the CUDA toolkit's."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("TRITON_PTXAS_PATH"), shutil.which("ptxas"),
             nvcc and Path(nvcc).resolve().with_name("ptxas"), "/usr/local/cuda/bin/ptxas"]
    return next((Path(path) for path in named if path and Path(path).is_file()), None)


def steps(args: argparse.Namespace, env: Mapping[str, str], folders: Folders, cores: int) -> list[Step]:
    """In order: what is cheap and tells most comes first; gpu.py has more than half of the time."""
    small = ["--stand-in"] if args.stand_in else []
    files = args.tests or [*sorted(str(path.relative_to(ROOT)) for name in TESTS
                                   for path in (ROOT / "tests").glob(name)), ENGINE]
    spread = ["-n", str(min(12, cores))] if len(files) > 1 and have("xdist", args) else []
    lacking = [name for name in ("pytest", "hypothesis") if not have(name, args)]
    pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-rfE", "--tb=short", "-o", "addopts=",
              "-o", "faulthandler_timeout=45", *spread,
              *([] if have("bitsandbytes", args) else ["-k", "not nf4 and not fp4"]), *files]
    found = [Step("tests", pytest, 0.08, 0.2, env, f"{lacking[0]} is not installed" if lacking else None,
                  signal.SIGINT)]
    ptxas = other_ptxas()
    variants = {"bundled ptxas": {}, "no WGMMA": {"DISABLE_MMA_V3": "1"},
                f"{ptxas}": {"TRITON_PTXAS_PATH": str(ptxas), "TRITON_PTXAS_BLACKWELL_PATH": str(ptxas)}}
    for i, (name, more) in enumerate(variants.items()):
        share, file = (0.10, 0.07, 0.07)[i], folders.scratch / f"prompt-{i}.json"
        check = [sys.executable, str(HERE / "prompt_check.py"), *small, "--json", str(file), "--seconds", "{seconds}",
                 "--repeat", "3" if small else "20", *(["--cases", "2"] if small and i else [])]
        missing = "no other ptxas was found: TRITON_PTXAS_PATH names one" if i == 2 and ptxas is None else None
        found.append(Step(f"prompt_check, {'another ptxas' if missing else name}", check, share / 2, share,
                          {**env, **more, "TRITON_CACHE_DIR": str(folders.scratch / f"triton-{i}")}, missing))
    out = ["--out", str(folders.out or folders.scratch / "gpu")]
    gpu = [sys.executable, str(HERE / "gpu.py"), *small, *out, "--seconds", "{seconds}",
           *(["--commit", args.commit] if args.commit else []), *(["--only", args.sections] if args.sections else []),
           *(["--layers", "2", "--threads", "1"] if small else [])]
    return [*found, Step("gpu.py", gpu, 0.4, 1.0, env)]


def _heeds_interrupts() -> None:
    """In a child: a shell starts what runs in the background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(step: Step, seconds: float, folders: Folders) -> dict[str, Any]:
    """Run a step: {"state", "seconds", "limit", "code", "output"}; state "done", "failed" (by its exit code) or "late".
    output: the end of what it printed; all of it goes to the log."""
    start, late, patience = time.monotonic(), False, max(2.0, seconds - GRACE)
    # What knows its time ends by itself, a little before it is asked to.
    command = [word.replace("{seconds}", f"{max(1.0, patience - MARGIN):.0f}") for word in step.command]
    with tempfile.TemporaryFile(dir=folders.scratch) as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                   env=dict(step.env), cwd=ROOT, start_new_session=True, preexec_fn=_heeds_interrupts)
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
            late = process.poll() is None
        finally:
            stop(process, step.stop)
        size = output.seek(0, os.SEEK_END)
        output.seek(0)
        text = output.read(KEPT).decode(errors="replace")
        if size > KEPT:
            output.seek(max(KEPT, size - KEPT))
            text += f"\n... {max(0, size - 2 * KEPT)} bytes ...\n" + output.read().decode(errors="replace")
    if folders.out:
        with (folders.out / "first-contact.log").open("a", encoding="utf-8") as log:
            log.write(f"\n===== {step.name}: {' '.join(command)}\n{text}\n")
    state = "late" if late else "failed" if process.returncode else "done"
    return {"state": state, "seconds": round(time.monotonic() - start, 1), "limit": round(seconds, 1),
            "code": process.returncode, "output": text[-200_000:]}


def stop(process: subprocess.Popen[bytes], asking: signal.Signals) -> None:
    """End it and all that it started; asked first, so that it tells what it knows. Its group may outlive it."""
    for sent, patience in ((asking, GRACE), (signal.SIGKILL, 2.0)):
        if process.poll() is None:
            # pytest alone gets SIGINT: its workers would each report an interrupt of their own
            with suppress(ProcessLookupError):
                process.send_signal(sent) if sent == signal.SIGINT else os.killpg(process.pid, sent)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def prepare(env: Mapping[str, str], folders: Folders, seconds: float) -> dict[str, Any]:
    """Build the C library, unless a prebuilt one is here, and import torch, both at once: {name: result}."""
    built = [path for suffix in EXTENSION_SUFFIXES if (path := NATIVE / f"_native{suffix}").exists()]
    build = Step("build", [sys.executable, "-c", BUILD], 0, 0, env)
    warm = Step("import torch", [sys.executable, "-c", WARM], 0, 0, env)
    with ThreadPoolExecutor(2) as pool:
        building = None if built else pool.submit(run, build, seconds, folders)
        warmed = pool.submit(run, warm, seconds, folders).result()
        made = building.result() if building else {"state": "done", "seconds": 0.0, "output": ""}
    levels = asked([sys.executable, "-c", LEVELS], env, max(60.0, seconds))
    if built and "native kernels: none" in levels:  # of another qmix
        made = run(build, seconds, folders)
        levels = asked([sys.executable, "-c", LEVELS], env, max(60.0, seconds))
    made["text"] = levels[-300:] + (f" ({built[0].name} was there)" if built else "")
    if "native kernels" not in levels or "none" in levels:
        state = "late" if made["state"] == "late" else "failed"
        made |= {"state": state, "reason": "the CPU computes through torch; " + made["output"][-300:]}
    warmed["text"] = "; ".join(warmed["output"].strip().splitlines()[-2:])
    return {"build": made, "import torch": warmed}


def perform(args: argparse.Namespace, archive: dict[str, Any], folders: Folders, ends: float) -> None:
    """Everything, into archive["steps"]."""
    env = environment(args, folders.scratch)
    done = archive["steps"]
    facts(args, env, folders)
    done |= prepare(env, folders, 0.3 * (ends - time.monotonic()))
    for name, result in done.items():
        folders.log(f"== {name}: {result['state']}, {result['seconds']} s; {result['text']}")
    if "card: none" in done["import torch"]["output"] and not args.stand_in:
        archive["ended"] = "torch sees no card here; --stand-in rehearses without one"
        return
    waiting, total = steps(args, env, folders, os.cpu_count() or 1), ends - time.monotonic()
    while waiting:
        step, left = waiting[0], ends - time.monotonic()
        rest = [Section(s.name, "", s.least * total, s.most * total) for s in waiting if not s.unless]
        seconds, dropped = allot(rest, left)
        if step.unless:
            done[step.name] = {"state": "unavailable", "reason": step.unless, "seconds": 0.0}
        elif rest[0] in dropped:
            done[step.name] = {"state": "skipped", "reason": "no time was left", "seconds": 0.0}
        else:
            folders.log(f"== {step.name}: up to {seconds:.0f} s")
            done[step.name] = {"state": "running", "seconds": 0.0}
            done[step.name] = run(step, seconds, folders)
        report.read(step.name, done[step.name], archive, folders.out or folders.scratch / "gpu", folders.scratch)
        folders.log(f"== {step.name}: {done[step.name]['state']}, {done[step.name]['seconds']} s; "
                  f"{done[step.name].get('text') or done[step.name].get('reason', '')}")
        save(archive, folders.out)
        waiting.pop(0)
    folders.log(f"== memory at the end\n{asked(['free', '-g'], env)}")


def save(archive: Mapping[str, Any], out: Path | None) -> None:
    """What is known so far, whole at any time."""
    if out is None:
        return
    slim = {name: {**step, "output": step.get("output", "")[-20_000:]} for name, step in archive["steps"].items()}
    files = {"first-contact.json": json.dumps({**archive, "steps": slim, "gpu": None, "prompts": None}, indent=1),
             "first-contact.md": report.markdown(archive),
             "prompt-check.json": json.dumps(archive.get("prompts", {}), indent=1)}
    for name, text in files.items():
        draft = out / (name + ".partial")
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(out / name)


def main() -> None:
    start, args = time.monotonic(), arguments()
    if args.out:
        args.out = args.out.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "first-contact.log").write_text("")
    archive: dict[str, Any] = {"command": sys.argv, "seconds": args.seconds, "stand_in": args.stand_in,
                               "commit": args.commit, "steps": {}}

    def log(text: str) -> None:
        print(text, flush=True)
        if args.out:
            with (args.out / "first-contact.log").open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def terminated(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, terminated)
    code = 0
    with tempfile.TemporaryDirectory(prefix="qmix-contact-", ignore_cleanup_errors=True) as scratch:
        try:
            perform(args, archive, Folders(args.out, Path(scratch), log), start + args.seconds - CLOSING)
        except (Terminated, KeyboardInterrupt) as e:
            archive["ended"], code = "by a signal", 143 if isinstance(e, Terminated) else 130
        archive["took"] = round(time.monotonic() - start, 1)
        save(archive, args.out)
    print("\n" + report.markdown(archive), flush=True)
    sys.exit(code or report.exit_code(archive))


if __name__ == "__main__":
    main()

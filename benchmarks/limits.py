"""Run a command inside a memory-limited cgroup of its own, and say what it took.

    python benchmarks/limits.py --memory 8G -- qmix generate STORE -p Hello
    python benchmarks/limits.py --memory 8G --timeout 60 --json - -- cmd ...

The cgroup is new, beside all others, and is removed afterwards; cgroup v1 with the memory controller mounted, or
v2. The limit holds for everything that the command starts, kernel memory and page cache included: pages of
files that it reads count too, though the kernel drops those before it kills anything. So `peak` of a process that
maps its model is the limit itself, and VmHWM, the resident size of the command alone, says more.
On a timeout the cgroup's own processes are killed, and no others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

POLL = 0.05  # seconds between looks at the command
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The shell enters the cgroup first, so that all of the command is counted.
ENTER = 'echo $$ > "$1" && shift && exec "$@"'


@dataclass(frozen=True, slots=True)
class Outcome:
    """returncode as subprocess gives it (negative: the signal); sizes in bytes. limit_hits: how often the limit
    was met, which page cache alone brings about (v1's failcnt, which recent kernels leave at 0); killed: processes
    that died of it. hwm_bytes: VmHWM of the command, as last seen. timed_out: it was killed by `timeout`."""

    returncode: int
    seconds: float
    peak_bytes: int
    limit_hits: int
    killed: int
    hwm_bytes: int
    timed_out: bool
    stdout: str | None = None


class Cgroup:
    """A new cgroup with a memory limit; a context manager that removes it."""

    def __init__(self, memory: int, mount: Path = Path("/sys/fs/cgroup")):
        self._v2 = (mount / "cgroup.controllers").exists()
        base = mount if self._v2 else mount / "memory"
        self.folder = base / f"qmix-{os.getpid()}-{time.monotonic_ns():x}"
        if not self._v2 and not (base / "memory.limit_in_bytes").exists():
            raise SystemExit(f"{base}: no memory controller of cgroup v1, and {mount} is no cgroup v2")
        try:
            if self._v2 and "memory" not in (base / "cgroup.subtree_control").read_text().split():
                (base / "cgroup.subtree_control").write_text("+memory")
            self.folder.mkdir()
        except OSError as e:
            raise SystemExit(f"{base}: cannot make a cgroup ({e.strerror}): run as root, with cgroups mounted "
                             "writable") from None
        try:
            self._limit(memory)
        except OSError as e:
            self.folder.rmdir()
            raise SystemExit(f"{self.folder}: cannot set a limit of {memory} bytes ({e.strerror})") from None

    def _limit(self, memory: int) -> None:
        """The limit, and no swap beyond it where the kernel counts swap."""
        if self._v2:
            (self.folder / "memory.max").write_text(str(memory))
            with suppress(OSError):
                (self.folder / "memory.swap.max").write_text("0")
            return
        (self.folder / "memory.limit_in_bytes").write_text(str(memory))
        with suppress(OSError):
            (self.folder / "memory.memsw.limit_in_bytes").write_text(str(memory))

    @property
    def entrance(self) -> Path:
        return self.folder / "cgroup.procs"

    @property
    def peak(self) -> int:
        return self._number("memory.peak" if self._v2 else "memory.max_usage_in_bytes")

    @property
    def limit_hits(self) -> int:
        if self._v2:
            return self._counter("memory.events", "max")
        return self._number("memory.failcnt") + self._number("memory.memsw.failcnt")  # with or without swap

    @property
    def killed(self) -> int:
        return self._counter("memory.events" if self._v2 else "memory.oom_control", "oom_kill")

    def _number(self, name: str) -> int:
        try:
            return int((self.folder / name).read_text())
        except (OSError, ValueError):  # memory.peak came with Linux 5.19
            return 0

    def _counter(self, name: str, key: str) -> int:
        with suppress(OSError):
            found = dict(line.split() for line in (self.folder / name).read_text().splitlines())
            return int(found.get(key, 0))
        return 0

    def kill(self) -> None:
        """Kill what is left in here, all of it started by the command."""
        for pid in self.entrance.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def __enter__(self) -> Cgroup:
        return self

    def __exit__(self, *_: object) -> None:
        for _attempt in range(100):
            self.kill()
            if not self._v2:
                with suppress(OSError):  # drop the page cache that is charged here
                    (self.folder / "memory.force_empty").write_text("0")
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(POLL)
        print(f"{self.folder}: could not be removed", file=sys.stderr)


def run(command: Sequence[str], memory: int, *, timeout: float | None = None, capture: bool = False,
        env: Mapping[str, str] | None = None) -> Outcome:
    """Run `command` with at most `memory` bytes; stderr goes where ours goes, stdout too unless `capture`.

    SystemExit where cgroups cannot be written, before the command starts.
    """
    with Cgroup(memory) as group, tempfile.TemporaryFile() as out:
        start = time.monotonic()
        process = subprocess.Popen(["/bin/sh", "-c", ENTER, "limits.py", str(group.entrance), *command],
                                   stdin=subprocess.DEVNULL, stdout=out if capture else None, env=env)
        hwm, timed_out = 0, False
        try:
            while process.poll() is None:
                hwm = max(hwm, high_water(process.pid))
                if timeout is not None and not timed_out and time.monotonic() - start > timeout:
                    timed_out = True
                    group.kill()
                time.sleep(POLL)
        finally:
            if process.poll() is None:
                group.kill()
                process.wait()
        seconds = time.monotonic() - start
        out.seek(0)
        text = out.read().decode(errors="replace") if capture else None
        return Outcome(process.returncode, seconds, group.peak, group.limit_hits, group.killed, hwm, timed_out, text)


def high_water(pid: int | str = "self") -> int:
    """VmHWM of a process in bytes, 0 where it has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def parse_bytes(text: str) -> int:
    """"8G" -> 8 * 2**30, also 512M, 1.5G, 8GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}, want a size such as 8G or 512M")
    return int(float(found[1]) * UNITS[found[2].upper()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=parse_bytes, required=True)
    parser.add_argument("--timeout", type=float, help="seconds")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as one line (- is stderr)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command given")
    done = run(command, args.memory, timeout=args.timeout)
    line = json.dumps(asdict(done))
    if args.json and args.json != "-":
        Path(args.json).write_text(line + "\n")
    elif args.json:
        print(line, file=sys.stderr)
    else:
        peak, limit, hwm = (n / 2**30 for n in (done.peak_bytes, args.memory, done.hwm_bytes))
        print(f"exit {done.returncode}, {done.seconds:.1f} s, peak {peak:.2f} of {limit:.2f} GiB (page cache included)"
              f", VmHWM {hwm:.2f} GiB, limit met {done.limit_hits} times, {done.killed} killed"
              f"{', timed out' if done.timed_out else ''}", file=sys.stderr)
    sys.exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)


if __name__ == "__main__":
    main()

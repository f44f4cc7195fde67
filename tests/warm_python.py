"""Programs in processes of their own that find torch imported: importing it takes longer than most of them run.

A process that has imported torch and nothing of qmix forks for each. A program has its own arguments, environment,
working folder, streams, session and exit, and imports all else itself. What Python reads when it starts, and what a
library reads when it is loaded, is that of the tests: a program whose threads or memory are measured is started anew.

    test -- socket: what to run, its streams --> server -- fork --> parent -- fork --> program
         <------------------ pipe: the program's pid, then its exit code --------'
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

SERVER = """
import fcntl, json, os, runpy, signal, socket, sys, termios
import numpy, torch

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that wait for programs leave nothing

def begin(asked, streams):
    if asked["terminal"]:
        os.setsid()
        fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 256)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = open(number, mode, encoding="utf-8", errors="backslashreplace" if number == 2 else "strict",
                      buffering=1 if number == 2 or os.isatty(number) else -1, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    program = asked["program"]
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path.insert(0, asked["cwd"])
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, os.path.dirname(os.path.abspath(program[0])))
        runpy.run_path(program[0], run_name="__main__")

asking = socket.socket(fileno=int(sys.argv[1]))
while True:
    text, found, _, _ = socket.recv_fds(asking, 2**20, 4)
    if not text:
        break
    if not os.fork():  # the program's parent, which waits for it
        asking.close()
        *streams, said = found
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if not child:
            os.close(said)
            begin(json.loads(text), streams)
            sys.exit(0)
        os.write(said, b"%d\\n" % child)
        os.closerange(0, said)
        os.write(said, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    for one in found:
        os.close(one)
"""


@cache
def _server() -> socket.socket:
    """This process' own, ended with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                               stdin=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


class Warm:
    """A running program: ["script.py", ...] or ["-m", "module", ...]. streams: three file descriptors; terminal: the
    first is that of its controlling terminal, in a session of its own."""

    def __init__(self, program: Sequence[str], env: Mapping[str, str], cwd: Path, streams: Sequence[int],
                 terminal: bool = False):
        asked = {"program": list(program), "env": dict(env), "cwd": str(cwd), "terminal": terminal}
        self._said, theirs = os.pipe()
        socket.send_fds(_server(), [json.dumps(asked).encode()], [*streams, theirs])
        os.close(theirs)
        self._text = b""
        self.returncode: int | None = None
        self.pid = self._number(None)

    def wait(self, seconds: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._number(seconds)
            os.close(self._said)
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None and (b"\n" in self._text or select.select([self._said], [], [], 0)[0]):
            self.wait()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def _number(self, seconds: float | None) -> int:
        while b"\n" not in self._text:
            if not select.select([self._said], [], [], seconds)[0]:
                raise TimeoutError(f"process {self.pid} still runs after {seconds:g} s")
            self._text += (more := os.read(self._said, 64))
            assert more, "the server of warm processes has ended"
        line, _, self._text = self._text.partition(b"\n")
        return int(line)

"""Python programs in processes of their own, without starting Python and importing torch anew for each: a process that
has imported torch and qmix forks for every program. Importing them takes seconds of a processor's time, forking
milliseconds.

    with WarmPython() as python:
        done = python.run("-m", "qmix", "show", store)
        process = python.start("-c", CODE, stdout=PIPE)

A program has its own environment, working folder, streams and exit code; it begins with one thread, and nothing has
been computed in its process. What Python itself reads at its start, such as sitecustomize.py or the size of the address
space, is the server's: a program about these is started as usual, and so is one whose memory is measured or whose
imports are.

The file itself is the server. Messages are JSON, with a program's streams as file descriptors beside them:
{"args", "env", "cwd", "streams", "terminal"} is answered by the pid, {"reap": pid} by the exit code. A program that has
ended keeps its pid until it is reaped, so a signal never reaches another's process.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import types
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

CLOSED = -9  # beside PIPE (-1) and DEVNULL (-3) of subprocess: the program begins without this stream
MESSAGE = 2**20


class Process:
    """A program that was started; what tests use of subprocess.Popen."""

    def __init__(self, server: socket.socket, args: list[str], pid: int, pipes: list[IO[str] | None]):
        self.args, self.pid, self.returncode = args, pid, None
        self.stdin, self.stdout, self.stderr = pipes
        self._server, self._ended = server, os.pidfd_open(pid)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: Any) -> None:
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()
        self.wait()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._server.send(json.dumps({"reap": self.pid}).encode())
            self.returncode = int(self._server.recv(MESSAGE))
            os.close(self._ended)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """All of stdout and stderr, as text, until both are closed and the program has ended."""
        with ThreadPoolExecutor(2) as pool:
            read = [pool.submit(pipe.read) if pipe is not None else None for pipe in (self.stdout, self.stderr)]
            if self.stdin is not None:
                self.stdin.write(input or "")
                self.stdin.close()
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.send_signal(signal.SIGKILL)
                raise
        with self:
            return tuple(text.result() if text is not None else "" for text in read)  # type: ignore[return-value]


class WarmPython:
    """The server; one caller at a time. preload: modules that programs need beside torch and qmix."""

    def __init__(self, *preload: str):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        self._process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno()), *preload], env=clean,
                                         pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, *error: Any) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, *args: object, stdin: int | IO[Any] | None = None, stdout: int | IO[Any] | None = None,
              stderr: int | IO[Any] | None = None, env: Mapping[str, str] | None = None, cwd: Path | None = None,
              terminal: bool = False, encoding: str = "utf-8", errors: str = "strict") -> Process:
        """args: as of `python`, beginning with -m, -c or a file. A stream is None (/dev/null), CLOSED, PIPE, a file or
        its number. terminal: stdin is a terminal that becomes the controlling one of a session of the program's own."""
        pipes: list[IO[str] | None] = []
        given, opened = [], []
        for number, stream in enumerate((stdin, stdout, stderr)):
            pipe = None
            if stream == PIPE:
                ends = os.pipe()
                stream, ours = ends if number == 0 else reversed(ends)
                opened.append(stream)
                pipe = os.fdopen(ours, "r" if number else "w", encoding=encoding, errors=errors, newline="")
            elif stream is None:
                opened.append(stream := os.open(os.devnull, os.O_RDWR))
            pipes.append(pipe)
            given.append(stream if isinstance(stream, int) else stream.fileno())
        words = [os.fsdecode(arg) if isinstance(arg, (bytes, os.PathLike)) else str(arg) for arg in args]
        asked = {"args": words, "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd()),
                 "streams": [fd != CLOSED for fd in given], "terminal": terminal}
        socket.send_fds(self._socket, [json.dumps(asked).encode()], [fd for fd in given if fd != CLOSED])
        for fd in opened:
            os.close(fd)
        return Process(self._socket, words, int(self._socket.recv(MESSAGE)), pipes)

    def run(self, *args: object, input: str | None = None, timeout: float = 300, **how: Any
            ) -> subprocess.CompletedProcess[str]:
        """Start a program and wait for it; its stdout and stderr as text. how: of start()."""
        streams = {"stdin": None if input is None else PIPE, "stdout": PIPE, "stderr": PIPE}
        process = self.start(*args, **(streams | how))
        out, errors = process.communicate(input, timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def become(asked: dict[str, Any], fds: list[int]) -> None:
    """This process, forked a moment ago, runs the program that was asked for."""
    names = ("stdin", "stdout", "stderr")
    for number, is_open in enumerate(asked["streams"]):
        if is_open:
            os.dup2(fd := fds.pop(0), number)
            os.close(fd)
        else:
            os.close(number)
        by_line = number == 2 or (is_open and os.isatty(number))
        stream = os.fdopen(number, "w" if number else "r", 1 if by_line else -1, closefd=False,
                           encoding=asked["env"].get("PYTHONIOENCODING", "utf-8"),
                           errors="backslashreplace" if number == 2 else "strict") if is_open else None
        setattr(sys, names[number], stream)
        setattr(sys, f"__{names[number]}__", stream)
    if asked["terminal"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background is deaf to Ctrl-C
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    kind, *rest = asked["args"]
    by_path = kind not in ("-m", "-c")
    sys.argv = asked["args"] if by_path else ["-c" if kind == "-c" else "", *rest[1:]]
    sys.path[:1] = [str(Path(kind).parent) if by_path else str(Path.cwd()),
                    *filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep))]
    if kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif by_path:
        runpy.run_path(kind, run_name="__main__")
    else:
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)


def end(program: Callable[[], None]) -> None:
    """Run a program to its end as Python does, but leave its memory to the system: to free torch's would copy it."""
    code = 0
    try:
        program()
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120  # Python's own
    os._exit(code & 255)


def serve(number: int, preload: list[str]) -> None:
    for name in ["torch", "qmix.cli", "qmix.engine", "qmix.quantize", "huggingface_hub.hf_api",
                 "huggingface_hub._snapshot_download", *preload]:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module("typer._adapters")  # what typer imports with the first command
    sys.modules["qmix.cli"].parser()
    # It reads its environment when it is imported, so each program imports it, but not all else that it needs.
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # a collection in a program would touch, and so copy, all of this
    server = socket.socket(fileno=number)
    while True:
        message, fds, *_ = socket.recv_fds(server, MESSAGE, 3)
        if not message:
            return
        asked = json.loads(message)
        if "reap" in asked:
            server.send(str(os.waitstatus_to_exitcode(os.waitpid(asked["reap"], 0)[1])).encode())
            continue
        pid = os.fork()
        if not pid:
            server.close()
            end(partial(become, asked, fds))
        server.send(str(pid).encode())
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2:])

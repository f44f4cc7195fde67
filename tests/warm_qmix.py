"""`qmix` in a process of its own, without starting Python and torch anew for each: a process that has imported them
forks for every command.

    with WarmQmix() as qmix:
        done = qmix.run("plan", "org/name", env=..., cwd=...)

A command has its own environment, working folder, streams and exit code. What Python reads at its start, such as
sitecustomize.py, is not its own: such a command is started as usual, and so is one whose memory is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys
import torch, qmix.cli, qmix.engine, qmix.quantize
import huggingface_hub.hf_api, huggingface_hub._snapshot_download

# It reads its environment when it is imported, so each command imports it, but not all else that it needs.
for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
    del sys.modules[name]

def command(asked):
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    for number, path in ((1, asked["out"]), (2, asked["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["qmix", *asked["args"]]
    qmix.cli.main()

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    child = os.fork()
    if not child:
        answers = None
        command(json.loads(line))
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


class WarmQmix:
    """A process that waits for commands; see above. One at a time."""

    def __init__(self, folder: Path):
        """folder: for what commands write to their streams."""
        self._out, self._err = folder / "stdout", folder / "stderr"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        self._process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env=clean, cwd=Path(__file__).parents[1])

    def __enter__(self) -> WarmQmix:
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.communicate()

    def run(self, *args: object, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
        words = [str(arg) for arg in args]
        asked = {"args": words, "env": env, "cwd": str(cwd), "out": str(self._out), "err": str(self._err)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, code, self._out.read_text(), self._err.read_text())

"""Records a chat with the bundled model as a picture: README's docs/chat.svg.

    python benchmarks/record_chat.py docs/chat.svg

A real `qmix demo` runs in a pseudo terminal, and the questions below are typed into it. What it prints becomes the
lines
of an SVG with no font or script from elsewhere.
"""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.sax.saxutils import escape

PROMPT = ">>> "
QUESTIONS = ("What is a Mixture-of-Experts model?", "Tell me a story about a fox and a lantern.", "/stats")
COLUMNS, LINE, CHARACTER, MARGIN = 92, 19, 8.43, 16  # characters, then pixels
QUIET, MOST = 3.0, 120.0  # seconds without output that end an answer; seconds for everything
STYLE = ('text { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d7dae0 } '
         ".typed { fill: #8ec07c; font-weight: bold }")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x07")


def record(command: list[str]) -> str:
    """What the command prints, with the questions as a terminal echoes them."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "COLUMNS": str(COLUMNS), "LINES": "40"}
    child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True)
    os.close(slave)
    printed, ends = "", time.monotonic() + MOST

    def read() -> None:
        nonlocal printed
        while time.monotonic() < ends and select.select([master], [], [], QUIET)[0]:
            try:
                printed += os.read(master, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                return

    while PROMPT not in printed and time.monotonic() < ends:
        read()
    for question in QUESTIONS:
        os.write(master, f"{question}\n".encode())
        read()
    os.write(master, b"/exit\n")
    read()
    child.kill()  # where it does not know the command
    child.wait()
    return printed


def lines_of(printed: str) -> list[str]:
    """Plain lines of at most COLUMNS characters, broken at words; of a line that is rewritten, the last version."""
    found = []
    for line in ESCAPES.sub("", printed).replace("\r\n", "\n").split("\n"):
        text = line.rstrip("\r").rsplit("\r", 1)[-1].rstrip()
        found += textwrap.wrap(text, COLUMNS, break_on_hyphens=False) if len(text) > COLUMNS else [text]
    return found


def svg(lines: list[str]) -> str:
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), LINE * len(lines) + 2 * MARGIN
    rows = []
    for i, line in enumerate(lines):
        kind = ' class="typed"' if line.startswith(">") else ""
        rows.append(
            f'<text x="{MARGIN}" y="{MARGIN + LINE * (i + 0.75):g}"{kind} xml:space="preserve">{escape(line)}</text>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" aria-label="A chat with the '
        'bundled model">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#1d2026"/>', *rows, "</svg>", ""])


def main() -> None:
    out = Path(sys.argv[1])
    printed = record([str(Path(sys.executable).with_name("qmix")), "demo", "--temp", "0", "-t", "1"])
    lines = lines_of(printed)
    lines = lines[:lines.index(">>> /exit")]
    out.write_text(svg(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

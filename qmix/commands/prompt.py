"""The text that a command is given: -p TEXT, -f FILE or stdin."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from qmix import streams
from qmix.errors import UsageError
from qmix.render import say
from qmix.textfile import UTF16_MARKS, decode, read_text, with_plain_line_ends, without_mark


def read_prompt(prompt: str | None, file: Path | None, stdin: TextIO) -> str:
    """The prompt from the one place that was named: -p TEXT, -f FILE, or stdin (also -p -)."""
    if prompt is not None and file is not None:
        raise UsageError("-p and -f: both given", "name one source of the prompt")
    if file is not None:
        text = with_plain_line_ends(read_text(file, f"-f {file}"))
    elif prompt in (None, "-"):
        if stdin.isatty():
            raise UsageError("no prompt: stdin is a terminal", 'give -p "..." or -f FILE, or talk with qmix chat')
        text = without_mark(_piped(stdin))
    else:
        text = prompt or ""
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def _piped(stdin: TextIO) -> str:
    """All of stdin, as UTF-8 whatever the locale is. UsageError for UTF-16, of which nothing readable would be left."""
    if not hasattr(stdin, "buffer"):
        return stdin.read()
    data = stdin.buffer.read()
    if data.startswith(UTF16_MARKS):
        decode(data, "stdin")
    text, problem = streams.decoded(data)
    if problem:
        say(problem)
    return with_plain_line_ends(text)

"""The three standard streams, made safe before a command runs.

Closed streams (`2>&-`, daemons): the system gives a closed stream's number to the next file that is opened, and
whatever a library then prints would be written into a model's file. So closed streams are opened on /dev/null first:
stdin is at its end, stderr takes everything, and stdout refuses to be written, since an answer must not vanish in
silence.

Encodings: a character that stdout's encoding lacks becomes "?", and is counted. A byte of a file name that is not UTF-8
is written as it is.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from qmix.errors import QmixError

ERRORS = "qmix-replace"


class Replaced:
    """How many characters were replaced in stdout. It is the error handler of its encoder."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, error: UnicodeError) -> tuple[str | bytes, int]:
        """See codecs.register_error: what to write for the first character that cannot be encoded, and where to go
        on."""
        if not isinstance(error, UnicodeEncodeError):
            raise error
        code = ord(error.object[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as os.fsdecode gives it
            return bytes([code - 0xDC00]), error.start + 1
        self.count += 1
        return "?", error.start + 1

    def line(self) -> str:
        """What to tell the user; "" where nothing was replaced."""
        if not self.count:
            return ""
        return (f"{self.count} character{'s' if self.count > 1 else ''} became ?: stdout's encoding, "
                f"{sys.stdout.encoding}, lacks them (PYTHONIOENCODING=utf-8 or a UTF-8 locale keeps them)")


def prepare() -> Replaced:
    """Open what is closed, and let no character be an error. The counter of replaced characters."""
    streams = {"stdin": (0, os.O_RDONLY), "stdout": (1, os.O_RDONLY), "stderr": (2, os.O_WRONLY)}
    for name, (fd, flags) in streams.items():
        _open_missing(name, fd, flags)
    replaced = Replaced()
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error(ERRORS, replaced)
        sys.stdout.reconfigure(errors=ERRORS)
    return replaced


def _open_missing(name: str, fd: int, flags: int) -> None:
    with suppress(OSError):
        os.fstat(fd)
        if getattr(sys, name) is not None:
            return
        fd = -1  # closed when Python started; its number has another file by now
    found = os.open(os.devnull, flags)
    if fd < 0:
        fd = found
    elif found != fd:
        os.dup2(found, fd)
        os.close(found)
    os.set_inheritable(fd, True)
    setattr(sys, name, os.fdopen(fd, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))


def check_stdout() -> None:
    """QmixError where stdout cannot be written: said before the work whose result would be lost."""
    try:
        os.write(sys.stdout.fileno(), b"")
    except (AttributeError, io.UnsupportedOperation):  # a stream that is no file
        return
    except (OSError, ValueError) as e:
        raise QmixError(f"stdout: {getattr(e, 'strerror', None) or e}: the result would be lost",
                        "leave stdout open; >/dev/null drops the result on purpose") from None


def is_writable(stream: TextIO | None) -> bool:
    """Whether a line can be tried on it at all."""
    return stream is not None and not stream.closed


def abandon(stream: Any) -> None:
    """Send what a broken stream still holds, and all that follows, nowhere: flushing it at exit is no error then."""
    with suppress(OSError, ValueError, AttributeError):
        fd = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fd)
        os.close(nowhere)


def decoded(data: bytes) -> tuple[str, str]:
    """(the text of what a pipe brought, what to tell the user or ""). Bytes that are not UTF-8 become U+FFFD: whoever
    pipes another program's output can seldom change it, as in `git diff | qmix generate`."""
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError as e:
        text = data.decode("utf-8", "replace")
        count = text.count("\ufffd") - data.count("\ufffd".encode())
        return text, (f"stdin: {count} piece{'s' if count > 1 else ''} that {'are' if count > 1 else 'is'} not UTF-8, "
                      f"the first at byte {e.start} (0x{data[e.start]:02x}), became U+FFFD; convert the text first "
                      "(iconv -f LATIN1 -t UTF-8)")

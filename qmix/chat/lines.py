"""Lines typed on a terminal that cannot move its cursor, read key by key.

The terminal's own line editing (canonical mode) ends a line at 4,095 bytes and drops the rest without a word. So it is
switched off, and its few keys are handled here: erase, erase word, erase line, end of input, with the codes that the
terminal names for them. Text that is typed or pasted beyond a line waits for the next line.
"""

from __future__ import annotations

import codecs
import os
import termios
from collections.abc import Callable
from typing import Any

from prompt_toolkit.utils import get_cwidth

from qmix.chat.keyboard import CHARACTERS

CHUNK = 65536  # bytes read at a time


class Lines:
    """Lines from the terminal `fd`. echo: shows what is typed. Unfinished input survives from call to call, but not
    an exception in the middle of a line (Ctrl-C), which drops it as the terminal itself does."""

    def __init__(self, fd: int, echo: Callable[[str], None]):
        self._fd = fd
        self._echo = echo
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._ahead = ""  # decoded and not used
        self._after_return = False

    def read(self) -> str | None:
        """The next line without its end; None where the input ended. OSError: the terminal is gone."""
        keys = _Keys(termios.tcgetattr(self._fd)[CHARACTERS])
        line: list[str] = []
        try:
            while True:
                text, self._ahead = self._ahead, ""
                for at, key in enumerate(text):
                    after_return, self._after_return = self._after_return, key == "\r"
                    if key == "\n" and after_return:  # one line end, in two characters
                        continue
                    if key in "\r\n":
                        self._echo("\n")
                        self._ahead = text[at + 1:]
                        return "".join(line)
                    if key in keys.end:
                        if not line:
                            self._ahead = text[at + 1:]
                            return None
                        continue
                    self._echo(_typed(line, key, keys))
                data = os.read(self._fd, CHUNK)
                if not data:
                    return "".join(line) if line else None
                self._ahead = self._decoder.decode(data)
        except BaseException:
            self._ahead = ""
            self._decoder.reset()
            raise


class _Keys:
    """Which characters edit, as the terminal's attributes say; a code of 0 is a key that is switched off."""

    def __init__(self, characters: list[Any]):
        def key(*names: int) -> str:
            codes = b"".join(code for name in names if isinstance(code := characters[name], bytes) and code != b"\0")
            return codes.decode("latin-1")

        self.erase = key(termios.VERASE) + "\x7f\b"
        self.word, self.line, self.end = key(termios.VWERASE), key(termios.VKILL), key(termios.VEOF)


def _typed(line: list[str], key: str, keys: _Keys) -> str:
    """Change `line` by one key; what to show for it."""
    if key in keys.erase:
        count = 1
    elif key in keys.line:
        count = len(line)
    elif key in keys.word:
        text = "".join(line)
        count = len(text) - len(text.rstrip().rpartition(" ")[0] + " " * (" " in text.rstrip()))
    else:
        line.append(key)
        return _shown(key)
    width = sum(get_cwidth(_shown(gone)) for gone in line[len(line) - min(count, len(line)):])
    del line[len(line) - min(count, len(line)):]
    return "\b \b" * width


def _shown(key: str) -> str:
    """A key on the screen: control characters as ^A, a byte that is no text as "?"."""
    if key == "\t":
        return " "
    if key < " ":
        return f"^{chr(ord(key) + 64)}"
    return "?" if "\udc80" <= key <= "\udcff" or "\x7f" <= key < "\xa0" else key

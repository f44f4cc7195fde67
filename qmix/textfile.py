"""Text that people and other programs wrote: always UTF-8, always read by the functions here.

Editors on Windows write a byte order mark, U+FEFF (EF BB BF in UTF-8), in front of a text. The mark is no part of the
text: it would become tokens of a prompt, and JSON and TOML parsers refuse it. So one leading mark is skipped. A U+FEFF
anywhere else is a character of the text. Bytes that are not UTF-8 are an error that names the file, the offset and the
cure; they are never replaced.
"""

from __future__ import annotations

from pathlib import Path

from qmix.errors import QmixError, UsageError

MARK = "\ufeff"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
CURE = "convert it, as with `iconv -f LATIN1 -t UTF-8`"
UTF16_CURE = "convert it, as with `iconv -f UTF-16 -t UTF-8`"


def read_text(path: Path, where: str | None = None, error: type[QmixError] = UsageError,
              cure: str = "name a readable UTF-8 text file") -> str:
    """The text of the file, without a byte order mark and with its line ends as they are.

    where: what errors call the file, the path by default. `error` with `cure` where the file cannot be read,
    and as of `decode` where it is not UTF-8. FileNotFoundError is an `error` too.
    """
    where = str(path) if where is None else where
    try:
        data = path.read_bytes()
    except OSError as e:
        raise error(f"{where}: {e.strerror or e}", cure) from None
    return decode(data, where, error)


def decode(data: bytes, where: str, error: type[QmixError] = UsageError, *, cut: bool = False) -> str:
    """The text of `data`, without a byte order mark. cut: the data may end inside a character, which is left out.

    `error` names `where`, the offset of the first byte that is not UTF-8 (0-based, the mark counted), and the cure.
    """
    if data.startswith(UTF16_MARKS):
        raise error(f"{where}: the text is UTF-16, want UTF-8", UTF16_CURE)
    try:
        return without_mark(data.decode("utf-8"))
    except UnicodeDecodeError as e:
        if cut and e.reason == "unexpected end of data" and e.end == len(data):
            return without_mark(data[:e.start].decode("utf-8"))
        raise error(f"{where}: not UTF-8 at byte {e.start} (0x{data[e.start]:02x})", CURE) from None


def without_mark(text: str) -> str:
    """`text` without one leading byte order mark."""
    return text.removeprefix(MARK)


def with_plain_line_ends(text: str) -> str:
    """`text` with "\\n" for each "\\r\\n" and "\\r", as Python's text files give it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")

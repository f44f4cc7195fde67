"""A trace: every routing decision of a run in one file, for `qmix replay`. No torch.

    {"qmix_trace": 1, "layers": 32, "experts": 8, "top_k": 2, "ahead": 2, "store": "9f..", "source": "mixtral"}\\n
    record, record, ...                     one per completed pass, all numbers little-endian

A record is a head, HEAD, of 24 bytes

    phase b"p" | b"d", 0, runs u16, tokens T u32, bytes of the body u64, crc32 of the body u32, crc32 of the
    20 bytes before u32

and a body: for each run of tokens of one session (sequence u64, tokens u32), and then for each layer

    ids      T x K   uint8, uint16 where there are more than 256 experts, best choice first
    weights  T x K   uint8, round(255 * weight)
    guessed  uint8   1 where the next line follows, else 0
    ahead    T x A   like ids: what the next layer's router was expected to choose

A pass is written at once, when its last layer is done. So a run that is killed leaves whole passes and at most one torn
record, which readers skip. A decoded token of Mixtral takes 258 bytes with guesses.

T tokens of a pass, K experts chosen per token, A experts guessed.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import struct
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

from qmix.errors import ConfigError, QmixError, UsageError

FORMAT, VERSION = "qmix_trace", 1
MAX_HEADER = 16 << 10  # bytes of the first line; ours has about 200
LARGEST = 1 << 22  # transitions that are counted of a run; Mixtral has 2,048
HEAD = struct.Struct("<cxHIQI")
SEAL = struct.Struct("<I")  # the crc32 of a HEAD, after it
RUN = struct.Struct("<QI")
PHASES: dict[bytes, Literal["prefill", "decode"]] = {b"p": "prefill", b"d": "decode"}

Ids = Sequence[int]  # bytes, or array("H") where there are more than 256 experts


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What the run was. top_k, ahead: experts chosen and guessed per token; store: its fingerprint, source: a name
    for people. ConfigError names the field that is out of range."""

    layers: int
    experts: int
    top_k: int
    ahead: int
    store: str
    source: str

    def __post_init__(self) -> None:
        for name, least, most in (("layers", 1, 4096), ("experts", 1, 4096), ("top_k", 1, self.experts),
                                  ("ahead", 0, self.experts)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"{name}: got {value!r:.40}, want {least} to {most}")
        if self.layers * self.experts**2 > LARGEST:
            raise ConfigError(f"experts: got {self.layers} x {self.experts}^2 transitions, want <= {LARGEST}")
        for name in ("store", "source"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: got {getattr(self, name)!r:.40}, want a text")

    @property
    def wide(self) -> bool:
        """Whether an id takes two bytes."""
        return self.experts > 256


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass, by layer. ids [T * K] and ahead [T * A] or None, token after token; weights [T * K] in 255ths;
    runs ((sequence, tokens), ...)."""

    phase: Literal["prefill", "decode"]
    runs: tuple[tuple[int, int], ...]
    ids: tuple[Ids, ...]
    weights: tuple[bytes, ...]
    ahead: tuple[Ids | None, ...]

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.runs)

    def choices(self, layer: int) -> list[Ids]:
        """What each token chose in `layer`, best first: T times K ids."""
        flat, tokens = self.ids[layer], self.tokens
        k = len(flat) // tokens
        return [flat[start:start + k] for start in range(0, len(flat), k)]


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace that was read."""

    path: Path
    header: TraceHeader
    passes: list[Pass]


class TraceWriter:
    """Collects the layers of a pass and appends it to the file when it is complete. Close it, or use it as a context
    manager.

    UsageError where the file exists, unless `append` and it is a trace of the same store; QmixError where it cannot be
    written. An append cuts off what an earlier run has left torn.
    """

    guess_prompts = False  # a replay judges guesses where they are used, in decode

    def __init__(self, path: Path, header: TraceHeader, append: bool = False):
        self.path = path
        self.header = header
        self._layers: list[bytes] = []
        self._tokens = 0
        self._empty = not (append and path.exists())
        self._file = _create(path, header, append)

    def add(self, layer: int, ids: Sequence[Sequence[int]], topk_weights: Sequence[Sequence[float]],
            ahead: Sequence[Sequence[int]] | None) -> None:
        """The choices of `layer`, which comes after the one added before: ids, topk_weights [T][K]; ahead [T][A]."""
        if layer != len(self._layers):
            raise ValueError(f"layer {layer} after {len(self._layers)} layers of the pass")
        self._tokens = len(ids)
        parts = [self._pack(ids, self.header.top_k),
                 bytes(max(0, min(255, round(255 * w))) for w in chain.from_iterable(topk_weights)),
                 bytes([ahead is not None])]
        if len(parts[1]) != self._tokens * self.header.top_k:
            raise ValueError(f"{len(parts[1])} weights for {self._tokens} x {self.header.top_k} choices")
        if ahead is not None:
            parts.append(self._pack(ahead, self.header.ahead))
        self._layers.append(b"".join(parts))

    def _pack(self, rows: Sequence[Sequence[int]], width: int) -> bytes:
        if len(rows) != self._tokens or any(len(row) != width for row in rows):
            raise ValueError(f"want {self._tokens} rows of {width} experts")
        flat = list(chain.from_iterable(rows))
        return _little(array("H", flat)).tobytes() if self.header.wide else bytes(flat)

    def end_pass(self, phase: str, sequence: Sequence[int]) -> None:
        """The pass is complete: write it. sequence: the session of each token. QmixError where that fails; the file
        then ends with the pass before."""
        if len(self._layers) != self.header.layers or len(sequence) != self._tokens:
            raise ValueError(f"{len(self._layers)} layers, {len(sequence)} sequence numbers for {self._tokens} tokens")
        runs = [(number, len(list(run))) for number, run in groupby(sequence)]
        body = b"".join([*(RUN.pack(*run) for run in runs), *self._layers])
        head = HEAD.pack(phase[:1].encode(), len(runs), self._tokens, len(body), zlib.crc32(body))
        self.drop_pass()
        self._empty = False
        _write(self._file, self.path, head + SEAL.pack(zlib.crc32(head)) + body)

    def drop_pass(self) -> None:
        """Forget the layers added since the last pass: it was cancelled."""
        self._layers.clear()

    def close(self) -> None:
        """A trace without a pass is removed: a run that failed before its first one may be started again."""
        self._file.close()
        if self._empty:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _create(path: Path, header: TraceHeader, append: bool) -> FileIO:
    """The file, unbuffered, at the end of its whole records."""
    if append and path.exists():
        return _open_again(path, header)
    try:
        file = FileIO(path, "xb")
    except FileExistsError:
        raise UsageError(f"{path}: exists", "name a new file for the trace, or remove this one") from None
    except (OSError, ValueError) as e:  # ValueError: a name with a NUL byte
        raise QmixError(f"{path}: cannot be written: {_reason(e)}") from None
    try:
        _write(file, path, json.dumps({FORMAT: VERSION, **asdict(header)}).encode() + b"\n")
    except BaseException:
        file.close()
        path.unlink(missing_ok=True)
        raise
    return file


def _open_again(path: Path, header: TraceHeader) -> FileIO:
    """An existing trace, locked against a second writer, cut after its last whole record."""
    file = _open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = _read_header(file, path)
        if found != header:
            raise UsageError(f"{path}: a trace of another run: {found}", "name a new file for the trace")
        for _ in _records(file, path, found, lambda line: None):
            pass
        file.truncate(file.tell())
        return file
    except OSError as e:
        file.close()
        raise QmixError(f"{path}: cannot be appended to: {_reason(e)}") from None
    except BaseException:
        file.close()
        raise


def _write(file: FileIO, path: Path, data: bytes) -> None:
    """All of it, or nothing and a QmixError."""
    start = file.tell()
    try:
        view = memoryview(data)
        while view:
            view = view[file.write(view):]
    except OSError as e:
        try:
            file.truncate(start)
            file.seek(start)
        except OSError:
            pass  # readers leave a torn record out
        raise QmixError(f"{path}: the trace cannot be written: {_reason(e)}",
                        "free some space, or run without --trace") from None


def read_trace(path: Path, say: Callable[[str], None] = lambda line: None) -> Trace:
    """A whole trace. A torn last record is left out and said. UsageError where the file is missing, no trace or
    damaged; it names the file and what is wrong with it."""
    with _open(path, os.O_RDONLY) as file:
        try:
            header = _read_header(file, path)
            return Trace(path, header, list(_records(file, path, header, say)))
        except OSError as e:
            raise UsageError(f"{path}: cannot be read: {_reason(e)}") from None


def _open(path: Path, flags: int) -> FileIO:
    try:
        # Non-blocking, since opening a pipe that stands in a file's place would wait for its other end.
        file = FileIO(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK), "r+b" if flags & os.O_RDWR else "rb")
    except (OSError, ValueError) as e:
        raise UsageError(f"{path}: cannot be opened: {_reason(e)}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UsageError(f"{path}: not a regular file")
    return file


def _read_header(file: FileIO, path: Path) -> TraceHeader:
    start = file.read(MAX_HEADER)
    line, newline, _ = start.partition(b"\n")
    try:
        values = json.loads(line) if newline else None
        if type(values) is not dict or FORMAT not in values:
            raise UsageError(f"{path}: not a trace of qmix", "record one with --trace FILE")
        if values.pop(FORMAT) != VERSION:
            raise UsageError(f"{path}: a trace of another version, this qmix reads {VERSION}", "record it anew")
        header = TraceHeader(**values)
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: not a trace of qmix", "record one with --trace FILE") from None
    except TypeError:  # fields that are missing or not known
        raise UsageError(f"{path}: its first line does not have the keys of a trace") from None
    except ConfigError as e:
        raise UsageError(f"{path}: {e.message}") from None
    file.seek(len(line) + 1)
    return header


def _records(file: FileIO, path: Path, header: TraceHeader, say: Callable[[str], None]) -> Iterator[Pass]:
    """The passes from here on; leaves the file at the end of the last whole one."""
    size = os.fstat(file.fileno()).st_size
    while (start := file.tell()) < size:
        head = _read(file, HEAD.size + SEAL.size)
        left = size - start - len(head)
        whole = len(head) == HEAD.size + SEAL.size
        if whole and zlib.crc32(head[:HEAD.size]) != SEAL.unpack(head[HEAD.size:])[0]:
            raise _damaged(path, start)
        nbytes = HEAD.unpack(head[:HEAD.size])[3] if whole else 0
        body = _read(file, nbytes) if whole and nbytes <= left else b""
        if not whole or len(body) < nbytes:
            file.seek(start)
            say(f"{path}: its last {size - start} bytes are a pass that was not written to the end; left out")
            return
        yield _parse(path, start, header, head, body)


def _read(file: FileIO, nbytes: int) -> bytes:
    """Up to the end of the file; one read gives at most 2 GiB."""
    parts, left = [], nbytes
    while left and (part := file.read(min(left, 1 << 30))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _parse(path: Path, start: int, header: TraceHeader, head: bytes, body: bytes) -> Pass:
    kind, run_count, tokens, _, crc = HEAD.unpack(head[:HEAD.size])
    if zlib.crc32(body) != crc or kind not in PHASES or tokens == 0:
        raise _damaged(path, start)
    at = RUN.size * run_count
    runs = tuple(RUN.iter_unpack(body[:at])) if len(body) >= at else ()
    if sum(count for _, count in runs) != tokens:
        raise _damaged(path, start)
    ids: list[Ids] = []
    topk_weights: list[bytes] = []
    ahead: list[Ids | None] = []
    pairs, width = tokens * header.top_k, 2 if header.wide else 1
    for _ in range(header.layers):
        ids.append(_ids(body[at:at + width * pairs], header))
        at += width * pairs
        topk_weights.append(body[at:at + pairs])
        at += pairs + 1
        guessed = body[at - 1:at] == b"\1"
        ahead.append(_ids(body[at:at + width * tokens * header.ahead], header) if guessed else None)
        at += width * tokens * header.ahead * guessed
        if at > len(body) or max(chain(ids[-1], ahead[-1] or ())) >= header.experts:
            raise _damaged(path, start)
    if at != len(body):
        raise _damaged(path, start)
    return Pass(PHASES[kind], runs, tuple(ids), tuple(topk_weights), tuple(ahead))


def _ids(raw: bytes, header: TraceHeader) -> Ids:
    return _little(array("H", raw[:len(raw) // 2 * 2])) if header.wide else raw


def _little(values: array[int]) -> array[int]:
    """To or from the file's byte order."""
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _damaged(path: Path, start: int) -> UsageError:
    return UsageError(f"{path}: damaged: the record at byte {start} is not what was written",
                      "record the trace again, or copy it again")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

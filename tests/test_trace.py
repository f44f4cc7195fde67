"""Traces: what is written is read, byte for byte as documented; torn, damaged and hostile files."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from warm_python import WarmPython

from qmix.errors import ConfigError, QmixError, UsageError
from qmix.offload.trace import Trace, TraceHeader, TraceWriter, read_trace

HEADER = TraceHeader(layers=2, experts=4, top_k=2, ahead=1, store="9f" * 16, source="tiny")


def write_one(writer: TraceWriter, phase: str = "decode", tokens: int = 1, ahead: bool = True) -> None:
    k, experts = writer.header.top_k, writer.header.experts
    for layer in range(writer.header.layers):
        ids = [[(token + layer + i) % experts for i in range(k)] for token in range(tokens)]
        guesses = [[token % experts] * writer.header.ahead for token in range(tokens)]
        writer.add(layer, ids, [[1 / k] * k] * tokens, guesses if ahead and layer + 1 < writer.header.layers else None)
    writer.end_pass(phase, [7] * tokens)


def sample(path: Path, passes: int = 3) -> bytes:
    with TraceWriter(path, HEADER) as writer:
        for _ in range(passes):
            write_one(writer)
    return path.read_bytes()


def body_start(raw: bytes) -> int:
    return raw.index(b"\n") + 1


def test_the_bytes_are_those_that_are_documented(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", HEADER) as writer:
        writer.add(0, [[3, 1], [0, 2], [2, 3]], [[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], [[1], [2], [3]])
        writer.add(1, [[0, 1], [1, 2], [2, 3]], [[0.6, 0.4]] * 3, None)
        writer.end_pass("decode", [4, 9, 9])
    body = (struct.pack("<QIQI", 4, 1, 9, 2)
            + bytes([3, 1, 0, 2, 2, 3]) + bytes([191, 64, 128, 128, 255, 0]) + b"\1" + bytes([1, 2, 3])
            + bytes([0, 1, 1, 2, 2, 3]) + bytes([153, 102] * 3) + b"\0")
    head = b"d\0" + struct.pack("<HIQI", 2, 3, len(body), zlib.crc32(body))
    line, _, rest = (tmp_path / "t").read_bytes().partition(b"\n")
    assert rest == head + struct.pack("<I", zlib.crc32(head)) + body
    assert json.loads(line) == {"qmix_trace": 1, "layers": 2, "experts": 4, "top_k": 2, "ahead": 1,
                                "store": "9f" * 16, "source": "tiny"}


@st.composite
def runs(draw: st.DrawFn) -> tuple[TraceHeader, list[tuple]]:
    experts = draw(st.sampled_from([1, 3, 8, 256, 257, 1000]))
    header = TraceHeader(draw(st.integers(1, 3)), experts, draw(st.integers(1, min(3, experts))),
                         draw(st.integers(0, min(2, experts))), "s", "näme\n")
    expert, weight = st.integers(0, experts - 1), st.floats(0, 1, width=32)
    passes = []
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(st.integers(1, 3))

        def matrix(of: st.SearchStrategy, columns: int, tokens: int = tokens) -> st.SearchStrategy:
            return st.lists(st.lists(of, min_size=columns, max_size=columns), min_size=tokens, max_size=tokens)

        layers = [(draw(matrix(expert, header.top_k)), draw(matrix(weight, header.top_k)),
                   draw(st.none() | matrix(expert, header.ahead))) for _ in range(header.layers)]
        sequence = draw(st.lists(st.integers(0, 2**64 - 1), min_size=tokens, max_size=tokens))
        passes.append((draw(st.sampled_from(["prefill", "decode"])), sequence, layers))
    return header, passes


@settings(max_examples=150, deadline=None)
@given(run=runs())
def test_what_is_written_is_read(run: tuple[TraceHeader, list[tuple]],
                                 tmp_path_factory: pytest.TempPathFactory) -> None:
    header, passes = run
    path = tmp_path_factory.mktemp("trace") / "t"
    with TraceWriter(path, header) as writer:
        for phase, sequence, layers in passes:
            for layer, (ids, weights, ahead) in enumerate(layers):
                writer.add(layer, ids, weights, ahead)
            writer.end_pass(phase, sequence)
    if not passes:
        assert not path.exists(), "a run that failed before its first pass may be started again"
        return
    trace = read_trace(path, pytest.fail)
    assert trace.header == header and len(trace.passes) == len(passes)
    for one, (phase, sequence, layers) in zip(trace.passes, passes, strict=True):
        assert one.phase == phase and one.tokens == len(sequence)
        assert [number for number, count in one.runs for _ in range(count)] == sequence
        for layer, (ids, weights, ahead) in enumerate(layers):
            assert [list(row) for row in one.choices(layer)] == ids
            flat = [w for row in weights for w in row]
            assert [w / 255 for w in one.weights[layer]] == pytest.approx(flat, abs=0.002)
            guessed = one.ahead[layer]
            assert (None if guessed is None else list(guessed)) == (
                None if ahead is None else [e for row in ahead for e in row])


def test_a_decoded_token_of_mixtral_is_as_small_as_promised(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", TraceHeader(32, 8, 2, 2, "s", "mixtral")) as writer:
        before = (tmp_path / "t").stat().st_size
        write_one(writer)
    assert (tmp_path / "t").stat().st_size - before == 24 + 12 + 32 * 5 + 31 * 2


def test_a_cancelled_pass_leaves_nothing(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", HEADER) as writer:
        writer.add(0, [[0, 1]], [[0.5, 0.5]], None)
        writer.drop_pass()
        write_one(writer)
    assert (tmp_path / "t").read_bytes() == sample(tmp_path / "other", 1)


@pytest.mark.parametrize(("layer", "ids", "weights", "ahead"), [
    (1, [[0, 1]], [[0.5, 0.5]], None), (0, [[0]], [[0.5, 0.5]], None), (0, [[0, 1]], [[1.0]], None),
    (0, [[0, 1]], [[0.5, 0.5]], [[1, 2]]), (0, [[0, 1]], [[0.5, 0.5]], []),
])
def test_a_caller_that_mixes_up_shapes_is_told(tmp_path: Path, layer: int, ids: list, weights: list,
                                               ahead: list | None) -> None:
    with TraceWriter(tmp_path / "t", HEADER) as writer:
        with pytest.raises(ValueError):
            writer.add(layer, ids, weights, ahead)
        with pytest.raises(ValueError):
            writer.end_pass("decode", [0])


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_every_torn_end_leaves_the_whole_passes(tmp_path: Path, passes: int) -> None:
    raw = sample(tmp_path / "t", passes + 1)
    start = body_start(raw)
    each = (len(raw) - start) // (passes + 1)
    for end in range(start + passes * each, len(raw)):
        (tmp_path / "torn").write_bytes(raw[:end])
        said: list[str] = []
        assert len(read_trace(tmp_path / "torn", said.append).passes) == passes
        assert len(said) == (end > start + passes * each) and all(str(tmp_path / "torn") in line for line in said)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    raw = sample(tmp_path / "t", 2)
    for at in range(body_start(raw), len(raw)):
        (tmp_path / "bad").write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1:])
        with pytest.raises(UsageError, match=r"bad: damaged: the record at byte \d+") as caught:
            read_trace(tmp_path / "bad")
        assert caught.value.cure


def forged(body: bytes, phase: bytes = b"d", run_count: int = 1, tokens: int = 1, nbytes: int | None = None) -> bytes:
    """A record whose checksums are right, whatever it says."""
    head = struct.pack("<cxHIQI", phase, run_count, tokens, len(body) if nbytes is None else nbytes, zlib.crc32(body))
    return head + struct.pack("<I", zlib.crc32(head)) + body


RUN = struct.pack("<QI", 0, 1)
LAYER = bytes([0, 1, 128, 127, 0])


@pytest.mark.parametrize("record", [
    forged(RUN + LAYER * 2, phase=b"x"), forged(RUN + LAYER * 2, tokens=0), forged(RUN + LAYER * 2, tokens=2**32 - 1),
    forged(struct.pack("<QI", 0, 2**32 - 1) + LAYER * 2, tokens=2**32 - 1), forged(RUN + LAYER * 2, run_count=65535),
    forged(RUN + LAYER * 2, run_count=0), forged(b"", run_count=0, tokens=0), forged(RUN + LAYER),
    forged(RUN + LAYER * 3), forged(RUN + bytes([0, 4, 128, 127, 0]) + LAYER),
    forged(RUN + LAYER + bytes([0, 1, 1, 1, 1, 9])), forged(RUN + LAYER + bytes([0, 1, 1, 1, 1])),
    bytes(24), bytes(4096),
])
def test_a_forged_record_is_damaged(tmp_path: Path, record: bytes) -> None:
    raw = sample(tmp_path / "t", 1)
    (tmp_path / "bad").write_bytes(raw + record)
    with pytest.raises(UsageError, match=f"damaged: the record at byte {len(raw)}"):
        read_trace(tmp_path / "bad")


def test_a_record_longer_than_the_file_takes_no_memory(tmp_path: Path) -> None:
    raw = sample(tmp_path / "t", 1)
    (tmp_path / "t").write_bytes(raw + forged(RUN, nbytes=2**63))
    said: list[str] = []
    assert len(read_trace(tmp_path / "t", said.append).passes) == 1
    assert "its last 36 bytes are a pass that was not written to the end" in said[0]


@pytest.mark.parametrize(("first", "what"), [
    (b"", "not a trace of qmix"), (b"{}\n", "not a trace of qmix"), (b"\n", "not a trace of qmix"),
    (b"[1]\n", "not a trace"),
    (b"\xff\xfe\n", "not a trace of qmix"), (b"[" * 9000 + b"\n", "not a trace"), (b"x" * 100_000, "not a trace"),
    (b'{"qmix_trace": 2}\n', "another version"), (b'{"qmix_trace": 1}\n', "the keys of a trace"),
    (b'{"qmix_trace": ' + b"9" * 5000 + b"}\n", "not a trace"),
    (b'{"qmix_trace": 1, "layers": 1000000000, "experts": 8, "top_k": 2, "ahead": 0, "store": "", "source": ""}\n',
     "layers: got 1000000000, want 1 to 4096"),
    (b'{"qmix_trace": 1, "layers": 1, "experts": 8, "top_k": 9, "ahead": 0, "store": "", "source": ""}\n',
     "top_k: got 9"),
    (b'{"qmix_trace": 1, "layers": 1, "experts": "8", "top_k": 2, "ahead": 0, "store": "", "source": ""}\n',
     "experts: got '8'"),
    (b'{"qmix_trace": 1, "layers": 1, "experts": 8, "top_k": 2, "ahead": true, "store": "", "source": ""}\n',
     "ahead: got True"),
    (b'{"qmix_trace": 1, "layers": 1, "experts": 8, "top_k": 2, "ahead": 0, "store": 3, "source": ""}\n',
     "store: got 3"),
    (b'{"qmix_trace": 1, "layers": 1, "experts": 8, "top_k": 2, "ahead": 0, "store": "", "source": "", "x": 1}\n',
     "the keys of a trace"),
])
def test_a_foreign_first_line_is_an_error_that_names_the_file(tmp_path: Path, first: bytes, what: str) -> None:
    (tmp_path / "foreign").write_bytes(first)
    with pytest.raises(UsageError, match="foreign: ") as caught:
        read_trace(tmp_path / "foreign")
    assert what in caught.value.message


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", tmp_path / "a\0b"):
        with pytest.raises(UsageError, match=r"cannot be opened|not a regular file"):
            read_trace(path)


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("mine")
    for append in (False, True):
        with pytest.raises(UsageError) as caught:
            TraceWriter(tmp_path / "t", HEADER, append)
        assert str(tmp_path / "t") in caught.value.message and caught.value.cure
    assert (tmp_path / "t").read_text() == "mine"


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_appending_goes_on_after_the_last_whole_pass(tmp_path: Path, torn: int) -> None:
    raw = sample(tmp_path / "t", 3)
    (tmp_path / "t").write_bytes(raw[:len(raw) - torn])
    with TraceWriter(tmp_path / "t", HEADER, append=True) as writer:
        write_one(writer, "prefill", 2)
    passes = read_trace(tmp_path / "t", pytest.fail).passes
    assert [one.phase for one in passes] == ["decode"] * (3 - bool(torn)) + ["prefill"]
    with TraceWriter(tmp_path / "new", HEADER, append=True) as writer:
        write_one(writer)
    assert len(read_trace(tmp_path / "new").passes) == 1


def test_only_a_trace_of_the_same_store_is_appended_to(tmp_path: Path) -> None:
    raw = sample(tmp_path / "t")
    other = TraceHeader(2, 4, 2, 1, "another", "tiny")
    with pytest.raises(UsageError, match="a trace of another run"):
        TraceWriter(tmp_path / "t", other, append=True)
    with TraceWriter(tmp_path / "t", HEADER, append=True), pytest.raises(QmixError, match="cannot be appended to"):
        TraceWriter(tmp_path / "t", HEADER, append=True)
    assert (tmp_path / "t").read_bytes() == raw


def test_an_unwritable_place_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "t", tmp_path / "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(QmixError, match="cannot be written"):
            TraceWriter(path, HEADER)


def test_a_full_disk_is_an_error_and_leaves_whole_passes(tmp_path: Path, warm_python: WarmPython) -> None:
    """RLIMIT_FSIZE stands in for a full disk: a write beyond it comes out short, the next one fails."""
    script = """
import resource, signal, sys
from pathlib import Path
from test_trace import HEADER, sample, write_one
from qmix.errors import QmixError
from qmix.offload.trace import TraceWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
with TraceWriter(path, HEADER) as writer:
    write_one(writer)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, resource.RLIM_INFINITY))
    try:
        write_one(writer)
    except QmixError as e:
        assert e.message == f"{path}: the trace cannot be written: File too large", e
        print("told")
"""
    done = warm_python.run("-c", script, tmp_path / "t", cwd=Path(__file__).parent)
    assert done.stdout == "told\n", done.stderr
    assert len(read_trace(tmp_path / "t", pytest.fail).passes) == 1


def test_headers_check_themselves() -> None:
    for values in ((0, 8, 2, 2), (1, 0, 1, 0), (1, 8, 0, 0), (1, 8, 2, 9), (1, 1 << 17, 1, 0)):
        with pytest.raises(ConfigError):
            TraceHeader(*values, "s", "n")


def test_a_trace_is_a_record_of_header_and_passes(tmp_path: Path) -> None:
    sample(tmp_path / "t", 1)
    assert isinstance(read_trace(tmp_path / "t"), Trace) and read_trace(tmp_path / "t").path == tmp_path / "t"

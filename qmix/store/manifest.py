"""qmix.json: what a store holds, where, with which checksums and errors.

Version 2 or 3, a JSON object. The same store always has the same bytes, so it holds no times and no paths:

    format_version   2                      needs_qmix   the first qmix that reads this version
    source           {name, revision, fingerprint} of the checkpoint
    model            spec.Model, as spec/json.py writes it: nothing else is needed to load the store
    alignment        {"tensor": 64, "record": 4096}: the bytes on whose multiples tensors and records begin
    quantization     QuantConfig
    records          [{layer, expert, file, offset, bytes, xxh3_128, error}]
    dense            [{name, format, file, offset, bytes, xxh3_128, error}]
    files            [{name, bytes, xxh3_128}], copied from the checkpoint
    calibration      {tokens, length, digest} of the text that a calibrated method was given; not there otherwise

error is the relative rms {w13, w2, all} of a record, or of a dense matrix, null for a plain tensor:
sqrt(sum((w - wq)^2) / sum(w^2)). In a calibrated store, records and the dense matrices of such a format also have
"calibrated", {method, tokens, output_error}. tokens: how many tokens of the text the matrices saw. method: the method
that was used, which is another one if the tokens were too few. output_error: how far the outputs are off on these
tokens. See Calibrated.

The place of a region follows from model and quantization. The manifest repeats it for readers that do not know qmix,
and a store in which the two differ is refused.

Version 3 is version 2 with what qmix 0.2.0 could not compute: records with biases, with another activation than SwiGLU,
in the format mxfp4 or one of ggml's, or with gate and up in two of these ("q4_k+q6_k" in quantization.kinds, tensors
w13.gate.* and w13.up.*), dense matrices in any of them (quantization.dense_formats), gated delta nets, and norms and
routers in fp32 beside weights in 16 bits (model.wide). A bias lies behind the weights of its matrix, fp32, one number a
row. All other stores are of version 2, so that qmix 0.2.0 reads them.

Version 1 has "dtype", of the checkpoint's weights, in place of model and alignment: its model is the Mixtral of the
config.json beside it, and its dense tensors have the names of the checkpoint (version1.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qmix import __version__
from qmix.bounded import parse_json, read_file
from qmix.config import CARRIED_NAMES, DTYPES, METHODS, ExpertKey, QuantConfig
from qmix.errors import ConfigError, StoreError
from qmix.sizes import RECORD_ALIGN, TENSOR_ALIGN
from qmix.spec import DeltaNet, Model
from qmix.spec.json import from_json, to_json
from qmix.store.json_object import DAMAGED, JsonObject
from qmix.store.raw import digest

FORMAT_VERSION = 3
NEEDS_QMIX = {2: "0.2.0", 3: "0.3.0"}  # the first qmix that reads a version
ALIGNMENT = {"tensor": TENSOR_ALIGN, "record": RECORD_ALIGN}
MAX_BYTES = 256 * 2**20  # of qmix.json; Mixtral's has 0.1 MB
MATRICES = ("w13", "w2", "all")
NEW_FORMATS = ("mxfp4", *CARRIED_NAMES)  # of version 3


@dataclass(frozen=True, slots=True)
class CalibrationEntry:
    """The text of a calibration: tokens in all, of each of its sequences, and a digest of their ids."""

    tokens: int
    length: int
    digest: str


@dataclass(frozen=True, slots=True)
class Calibrated:
    """How an expert or a dense matrix took part in a calibration. method: what chose its codes; tokens: that it was
    given; output_error: relative rms of the outputs on these, |X (W - Wq)^T| / |X W^T|, by matrix ("w13", "w2", or
    "all" of a dense one), empty where the method did not look at them."""

    method: str
    tokens: int
    output_error: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "tokens": self.tokens, "output_error": dict(self.output_error)}


@dataclass(frozen=True, slots=True)
class RecordEntry:
    """One expert's record. error: relative rms by matrix, {"w13", "w2", "all"}."""

    key: ExpertKey
    file: str
    offset: int
    nbytes: int
    xxh3: str
    error: Mapping[str, float]
    calibrated: Calibrated | None = None


@dataclass(frozen=True, slots=True)
class DenseEntry:
    """One dense tensor; format as in MatrixSpec, or "plain"; error None where it is plain."""

    name: str
    format: str
    file: str
    offset: int
    nbytes: int
    xxh3: str
    error: float | None
    calibrated: Calibrated | None = None


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file copied from the checkpoint as it is."""

    name: str
    nbytes: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """source: the checkpoint's name (a folder's or a hub id); revision: the hub's, else None. model: what the store
    holds; None in version 1, which has its dtype alone. version: as it was read, 0 before it was written. digest:
    of the bytes of the file that it was read from."""

    source: str
    revision: str | None
    fingerprint: str
    model: Model | None
    quant: QuantConfig
    records: Mapping[ExpertKey, RecordEntry]
    dense: Mapping[str, DenseEntry]
    files: Mapping[str, FileEntry]
    calibration: CalibrationEntry | None = None
    dtype: str = ""
    version: int = 0
    digest: str = ""

    def to_json(self) -> bytes:
        """One line per record, tensor and file; in today's version."""
        assert self.model is not None
        records = [{"layer": r.key.layer, "expert": r.key.expert, "file": r.file, "offset": r.offset,
                    "bytes": r.nbytes, "xxh3_128": r.xxh3, "error": dict(r.error), **_calibrated_json(r.calibrated)}
                   for r in self.records.values()]
        dense = [{"name": d.name, "format": d.format, "file": d.file, "offset": d.offset, "bytes": d.nbytes,
                  "xxh3_128": d.xxh3, "error": d.error, **_calibrated_json(d.calibrated)}
                 for d in self.dense.values()]
        files = [{"name": f.name, "bytes": f.nbytes, "xxh3_128": f.xxh3} for f in self.files.values()]
        source = {"name": self.source, "revision": self.revision, "fingerprint": self.fingerprint}
        version = version_of(self.model, self.quant)
        whole = {"format_version": version, "needs_qmix": NEEDS_QMIX[version], "source": source,
                 "model": to_json(self.model), "alignment": ALIGNMENT, "quantization": self.quant.to_json(),
                 "records": records, "dense": dense, "files": files}
        if self.calibration is not None:
            whole["calibration"] = asdict(self.calibration)
        lines = ",\n".join(f' "{key}": {_lines(value)}' for key, value in whole.items())
        return f"{{\n{lines}\n}}\n".encode()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check a qmix.json; StoreError names the key at fault."""
        data = _load(path)
        raw = JsonObject(path, "", _parsed(path, data))
        version = _check_version(raw)
        source = raw.object("source")
        model = _model(raw) if version > 1 else None
        dtype = model.dtype if model is not None else raw.text("dtype")
        if dtype not in DTYPES:
            raise raw.wrong("dtype", " or ".join(DTYPES))
        records = [_record(item) for item in raw.objects("records")]
        dense = [_dense(item) for item in raw.objects("dense")]
        files = [_file(item) for item in raw.objects("files")]
        calibration = _calibration(raw.object("calibration")) if raw.has("calibration") else None
        found = cls(source.text("name"), source.text("revision", optional=True), source.text("fingerprint"),
                    model, _quant(raw.object("quantization")), {r.key: r for r in records},
                    {d.name: d for d in dense}, {f.name: f for f in files}, calibration, dtype, version,
                    digest(data))
        for key, listed, kept in (("records", records, found.records), ("dense", dense, found.dense),
                                  ("files", files, found.files)):
            if len(listed) != len(kept):
                raise StoreError(f"{path}: {key}: one of them is listed twice", DAMAGED)
        return found


def version_of(model: Model, quant: QuantConfig) -> int:
    """The oldest format version that can say what the store of a model holds."""
    expert, recurrent = model.expert, any(isinstance(layer.mixer, DeltaNet) for layer in model.layers)
    new = (recurrent or model.wide or expert.bias or expert.activation.kind != "swiglu"
           or not quant.formats.isdisjoint(NEW_FORMATS))
    return 3 if new else 2


def _calibrated_json(calibrated: Calibrated | None) -> dict[str, Any]:
    return {} if calibrated is None else {"calibrated": calibrated.to_json()}


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    return "[\n" + ",\n".join("  " + json.dumps(item) for item in value) + "\n ]"


def _load(path: Path) -> bytes:
    try:
        return read_file(path, MAX_BYTES, StoreError, DAMAGED)
    except OSError as e:
        raise StoreError(f"{path}: {e.strerror}", "check its permissions") from None


def _parsed(path: Path, data: bytes) -> Any:
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as e:
        raise StoreError(f"{path}: not JSON ({str(e).splitlines()[0]:.100})", DAMAGED) from None


def _model(raw: JsonObject) -> Model:
    if raw.value("alignment") != ALIGNMENT:
        raise raw.wrong("alignment", str(ALIGNMENT))
    try:
        return from_json(raw.value("model"))
    except ConfigError as e:
        raise StoreError(f"{raw.path}: {e.message}", e.cure or DAMAGED) from None


def _check_version(raw: JsonObject) -> int:
    """The version, if this qmix reads it."""
    version = raw.count("format_version")
    if version > FORMAT_VERSION:
        needs = raw.text("needs_qmix")
        newer = needs if re.fullmatch(r"[\w.+-]{1,20}", needs) else "newer"
        cure = f"install qmix {newer} (or newer), or quantize again with this one"
        raise StoreError(f"{raw.path}: format_version: got {version}; this qmix, {__version__}, reads up to "
                         f"{FORMAT_VERSION}", cure)
    if version < 1:
        raise StoreError(f"{raw.path}: format_version: got {version}, want 1 to {FORMAT_VERSION}; no such version "
                         "was ever released", DAMAGED)
    return version


def _quant(raw: JsonObject) -> QuantConfig:
    kinds = {"str": raw.text, "int": raw.count, "bool": raw.flag}
    values: dict[str, Any] = {f.name: kinds[str(f.type)](f.name) for f in fields(QuantConfig) if f.type in kinds}
    if values["experts"] == "mixed":
        values |= {"kinds": tuple(tuple(pair) for pair in raw.lists("kinds")), "mix": tuple(raw.texts("mix"))}
    if raw.has("dense_formats"):
        pairs = raw.lists("dense_formats")
        if not all(len(pair) == 2 for pair in pairs):
            raise raw.wrong("dense_formats", "pairs of a tensor and its format")
        values["dense_formats"] = tuple((name, kind) for name, kind in pairs)
    try:
        return QuantConfig(**values)
    except ConfigError as e:
        raise StoreError(f"{raw.path}: quantization.{e.message}", DAMAGED) from None


def _record(raw: JsonObject) -> RecordEntry:
    error = raw.object("error")
    key = ExpertKey(raw.count("layer"), raw.count("expert"))
    return RecordEntry(key, raw.name("file"), raw.count("offset"), raw.count("bytes"), raw.xxh3(),
                       {name: error.number(name) for name in MATRICES}, _calibrated(raw, MATRICES[:2]))


def _dense(raw: JsonObject) -> DenseEntry:
    error = None if raw.value("error") is None else raw.number("error")
    return DenseEntry(raw.text("name"), raw.text("format"), raw.name("file"), raw.count("offset"),
                      raw.count("bytes"), raw.xxh3(), error, _calibrated(raw, MATRICES[2:]))


def _calibrated(raw: JsonObject, matrices: tuple[str, ...]) -> Calibrated | None:
    if not raw.has("calibrated"):
        return None
    value = raw.object("calibrated")
    if value.text("method") not in METHODS:
        raise value.wrong("method", " or ".join(METHODS))
    error = value.object("output_error")
    return Calibrated(value.text("method"), value.count("tokens"),
                      {name: error.number(name) for name in matrices if error.has(name)})


def _calibration(raw: JsonObject) -> CalibrationEntry:
    return CalibrationEntry(raw.count("tokens"), raw.count("length"), raw.text("digest"))


def _file(raw: JsonObject) -> FileEntry:
    return FileEntry(raw.name("name"), raw.count("bytes"), raw.xxh3())

"""A GGUF file, or several that are one model, as a checkpoint: opened, and every tensor accounted for.

The numbers of its tensors have types of their own; the model has one dtype, that of most weights. Where these
are quantized it is bfloat16, and what is read is rounded to it: by 2^-9 of a weight at most, where the coarsest step of
Q8_0 is 2^-8 of a group's largest. Norms, routers and biases, which files have in F32, stay so where the dtype does not
have all their numbers (Model.wide). What else loses bits without being quantized is named in a note.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch

from qmix import gguf
from qmix.errors import CheckpointError, ConfigError, DoesNotFit, QmixError
from qmix.formats import TORCH_DTYPES
from qmix.formats.ggml import READ
from qmix.gguf.header import Header
from qmix.gguf.model import gguf_config, gguf_layouts, gguf_skipped
from qmix.gguf.split import check_pieces, of_split
from qmix.gguf.tokenizer import tokenizer_files
from qmix.gguf.types import BY_NAME
from qmix.lowbit import Matrix
from qmix.models import Layout, Misfit, Source, choose_layout, read_model
from qmix.models.gguf import ROPE_FREQS
from qmix.shards import Location, Shard
from qmix.sources import narrow, read
from qmix.spec import WIDE, WIDENED, Model, Tensor
from qmix.spec.model import within_layer

DTYPES = {"F32": "float32", "F16": "float16"}  # of a model whose weights have that type; of any other, bfloat16
PIECE = 2**22  # bytes that are looked at together
MAX_TENSORS = 10**6  # of a model; keeps hostile metadata from costing memory
OTHER_TYPE = f"qmix reads {', '.join(READ)}: fetch the model in one of these types"
BELONG = "the file does not hold what its metadata says: fetch it again"


@dataclass(frozen=True, slots=True)
class Opened:
    """What Checkpoint needs, of a GGUF file or a folder. folder: holds config.json, tokenizer and chat template, and of
    a GGUF file goes when `opened` is closed; carried: the format that all experts have and may keep, or None; types: of
    all matrices and tensors, by the model's names."""

    raw_config: Mapping[str, Any]
    model: Model
    locations: Mapping[str, Location | Matrix]
    table: Mapping[str, Source]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    folder: Path
    carried: str | None
    types: Mapping[str, str]
    has_mtp_head: bool = False
    gguf: bool = False


def open_gguf(path: Path, opened: ExitStack) -> Opened:
    """CheckpointError names the file, and the key or tensor at fault."""
    paths = gguf.pieces(path)
    headers: list[Header] = []
    locations: dict[str, Location] = {}
    for piece in paths:
        shard, header = _shard(piece)
        opened.callback(shard.close)
        headers.append(header if not headers else of_split(header))
        locations |= {name: Location(shard, entry) for name, entry in header.file.entries.items()}
    check_pieces(paths, headers)
    raw, model = _read_model(paths[0], headers[0].metadata, locations)
    layout, unused = _account(paths[0], model, locations)
    inexact = _inexact(model, layout, locations)
    model = replace(model, wide=tuple(dict.fromkeys(
        within_layer(tensor.name) for tensor in inexact if tensor.role in WIDENED)))
    used = {source.name: locations[source.name] for source in layout.values()}
    folder = _written(_files(paths[0], raw, headers[0].metadata), opened)
    types = {name: used[source.name].entry.dtype for name, source in layout.items()}
    rounded = list(dict.fromkeys(layout[tensor.name].name for tensor in inexact if not model.is_wide(tensor)))
    return Opened(raw, model, used, layout, unused, _notes(paths[0], model, rounded), folder,
                  _carried(model, layout, used), types, gguf=True)


def _shard(path: Path) -> tuple[Shard, Header]:
    found: list[Header] = []

    def read(path: Path, fd: int) -> Any:
        found.append(gguf.read_header(path, fd))
        return found[0].file

    return Shard(path, read), found[0]


def _read_model(path: Path, metadata: Mapping[str, Any],
                locations: Mapping[str, Location]) -> tuple[dict[str, Any], Model]:
    """(config.json, the model), with the dtype of most weights."""
    weights: Counter[str] = Counter()
    for location in locations.values():
        weights[location.entry.dtype] += prod(location.entry.shape)
    dtype = DTYPES.get(weights.most_common(1)[0][0] if weights else "", "bfloat16")
    try:
        raw = gguf_config(metadata, {name: location.entry.shape for name, location in locations.items()},
                          _rope_freqs(locations))
        model = replace(read_model({**raw, "dtype": dtype}).trunk, dtype=dtype)  # heads are skipped
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e.message}", e.cure or BELONG) from None
    count = sum(7 + 3 * model.experts_in(layer) for layer in range(model.num_layers))
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path}: {model.num_layers} layers of up to {model.num_experts} experts: {count} "
                              f"tensors, want at most {MAX_TENSORS}", BELONG)
    return {**raw, "torch_dtype": dtype}, model


def _rope_freqs(locations: Mapping[str, Location]) -> tuple[float, ...] | None:
    """What frequencies are divided by, where a tensor has it."""
    if ROPE_FREQS not in locations:
        return None
    shard, entry = locations[ROPE_FREQS].shard, locations[ROPE_FREQS].entry
    if entry.dtype != "F32" or entry.nbytes > PIECE:
        raise ConfigError(f"{ROPE_FREQS}: got {prod(entry.shape)} numbers in {entry.dtype}, want F32, one for each "
                          "rotary pair")
    return tuple(shard.read(entry, 0, entry.nbytes).view(torch.float32).tolist())


def _files(path: Path, raw: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """{name: bytes} of config.json, tokenizer and chat template."""
    try:
        return {"config.json": json.dumps(raw, indent=2).encode(), **tokenizer_files(metadata)}
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e.message}", e.cure or BELONG) from None


def _written(files: Mapping[str, bytes], opened: ExitStack) -> Path:
    """A folder of temporary files that holds them."""
    try:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="qmix-gguf-")))
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    except OSError as e:
        kind = DoesNotFit if e.errno in (errno.ENOSPC, errno.EDQUOT) else QmixError
        raise kind(f"{tempfile.tempdir or 'temporary files'}: the tokenizer of a GGUF file cannot be written there: "
                   f"{e.strerror or e}", "make room there, or set TMPDIR to another folder") from None
    return folder


def _account(path: Path, model: Model, locations: Mapping[str, Location]) -> tuple[Layout, tuple[str, ...]]:
    """(the layout, names skipped); CheckpointError for what is missing, left over, misshapen or of a type that is not
    read."""
    layout = choose_layout(gguf_layouts(model), locations)
    wanted = dict.fromkeys(source.name for source in layout.values())
    missing = [name for name in wanted if name not in locations]
    if missing:
        raise CheckpointError(f"{path}: {missing[0]}: missing ({len(missing)} of {len(wanted)} tensors are)", BELONG)
    for tensor in _tensors(model):
        _check_tensor(tensor, layout[tensor.name], locations)
    skipped = gguf_skipped(model, locations)
    left = [name for name in locations if name not in wanted and name not in skipped and name != ROPE_FREQS]
    if left:
        raise CheckpointError(f"{locations[left[0]].shard.file.path}: {left[0]}: not a tensor of this model "
                              f"({len(left)} such tensors)", "qmix would compute the model without it: give the model "
                              "as safetensors")
    return layout, tuple(name for name in locations if name in skipped)


def _tensors(model: Model) -> chain[Tensor]:
    return chain(model.tensors(), (t for key in model.expert_keys for t in model.expert_tensors(key)))


def _check_tensor(tensor: Tensor, source: Source, locations: Mapping[str, Location]) -> None:
    location = locations[source.name]
    where = f"{location.shard.file.path}: {source.name}"
    try:
        got = source.shape_out(location.entry.shape)
    except Misfit as misfit:
        raise CheckpointError(f"{where}: {misfit} by the metadata", BELONG) from None
    if got != tensor.shape:
        part = " for a part of it" if source.steps else ""
        raise CheckpointError(f"{where}: got shape {list(got)}{part}, want {list(tensor.shape)} by the metadata",
                              BELONG)
    if location.entry.dtype not in READ:
        raise CheckpointError(f"{where}: has type {location.entry.dtype}, which qmix does not read", OTHER_TYPE)
    block = BY_NAME[location.entry.dtype].weights
    first, shape, _ = narrow(location.entry.shape, source.steps)
    end = first + prod(shape)
    if first % block or end % block:
        raise CheckpointError(f"{where}: has type {location.entry.dtype}, in blocks of {block} numbers, and numbers "
                              f"{first} to {end}, which are a tensor of the model, begin or end within one",
                              "fetch the model with this tensor in F32, as converters write biases and norms")


def _carried(model: Model, layout: Layout, locations: Mapping[str, Location]) -> str | None:
    """"mxfp4" where all matrices of experts are."""
    kinds = {locations[layout[tensor.name].name].entry.dtype for key in model.expert_keys
             for tensor in model.expert_tensors(key)[:3]}
    return "mxfp4" if kinds == {"MXFP4"} else None


def _notes(path: Path, model: Model, rounded: list[str]) -> tuple[str, ...]:
    """A line on tensors of the file whose numbers lose bits when they are read, where there are any."""
    more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
    return tuple([f"{path}: {rounded[0]}{more}: rounded to {model.dtype}, which most weights have"] if rounded else ())


def _inexact(model: Model, layout: Layout, locations: Mapping[str, Location]) -> list[Tensor]:
    """Unquantized tensors whose numbers, as the model has them, its dtype does not all have; those that stay fp32 in
    any case are none. Of tensors that lie in one of the file's, all are where one is."""
    dtype, found, exact = getattr(torch, model.dtype), list[Tensor](), dict[Source | str, bool]()
    for tensor in _tensors(model):
        source = layout[tensor.name]
        location = locations[source.name]
        kind = location.entry.dtype
        stays = tensor.role in WIDE or (tensor.role == "bias" and ".experts." in tensor.name)
        if stays or kind not in ("F32", "F16", "BF16") or dtype in (torch.float32, TORCH_DTYPES[kind]):
            continue
        key = source if source.computes else source.name
        if key not in exact:
            exact[key] = _exact(location, source, dtype)
        if not exact[key]:
            found.append(tensor)
    return found


def _exact(location: Location, source: Source, dtype: torch.dtype) -> bool:
    """Whether `dtype` has all numbers of a plain tensor, after steps that change them; read piece by piece, up to the
    first that it lacks, where there are none."""
    entry = location.entry
    if source.computes:
        return _has(dtype, read(location, source, dtype=torch.float32))
    for begin in range(0, entry.nbytes, PIECE):
        raw = location.shard.read(entry, begin, min(PIECE, entry.nbytes - begin))
        if not _has(dtype, raw.view(TORCH_DTYPES[entry.dtype]).float()):
            return False
    return True


def _has(dtype: torch.dtype, numbers: torch.Tensor) -> bool:
    return torch.equal(numbers, numbers.to(dtype).float())

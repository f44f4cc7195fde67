"""A checkpoint in Hugging Face layout, or a GGUF file, read one tensor at a time.

Opening reads config.json and the headers only, and accounts for every tensor: each one is used, or named in `skipped`,
or the checkpoint is refused by that tensor's name. Tensors are then read with pread into fresh memory, never mapped and
never unpickled, and their pages are given back to the system at once. So streaming 94 GB neither grows the process nor
empties the page cache.

A file that changes or disappears while it is read is an error, not a wrong model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from qmix import modelfiles, sources
from qmix.config import ExpertKey
from qmix.errors import CheckpointError, ConfigError
from qmix.formats.carried import Blocks as CarriedBlocks
from qmix.formats.mxfp4 import LARGEST, Blocks
from qmix.gguf.header import is_gguf
from qmix.gguf_checkpoint import Opened, open_gguf
from qmix.models import (
    Layout,
    Misfit,
    Source,
    choose_layout,
    layouts,
    mtp_layouts,
    mxfp4_layout,
    published_experts,
    read_model,
    skipped,
    with_mtp_head_of,
)
from qmix.models.source import Index
from qmix.shards import INDEX, REFETCH, SINGLE, Location, equal, locate, read_json, sample_of
from qmix.sizes import CARRIED, MX_GROUP
from qmix.spec import WIDE, Model

STORE_MANIFEST = "qmix.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPE_NAMES = MappingProxyType({"BF16": "bfloat16", "F16": "float16", "F32": "float32"})
BYTES = "U8"  # of MXFP4's codes and scales
LOW_BITS = ("F4", "F6_", "F8_")
BLOCKS = "_blocks"  # a tensor in MXFP4 is two, its codes under its name and this, and its _scales
HEAD = "lm_head.weight"  # also where a model ties it to its embedding
MAX_TENSORS = 10**6  # far above any real model; keeps a hostile config.json from costing memory

FOLDER = "give the folder that holds config.json and model*.safetensors"
ORIGINAL = "give the original bf16, fp16 or fp32 checkpoint"
MXFP4 = ("qmix takes MXFP4 in the experts of gpt_oss alone: have transformers decode the weights "
         "(Mxfp4Config(dequantize=True), then save_pretrained), and give what it saved")
NO_MTP = "the multi-token-prediction head is not whole: leave it out (--no-mtp), or fetch the checkpoint again"
WRONG_CONFIG = "config.json and the weights do not belong together: fetch both again, or correct config.json"


class Checkpoint:
    """An open checkpoint. Use as a context manager, or close it.

    Tensors are asked for by their canonical names (Model.tensors), whatever the files call them.
    path: the folder, or the GGUF file; folder: where config.json and the tokenizer are. model: what it holds, `dtype`
    as the files have it whatever config.json says.
    raw_config: config.json as it stands. nbytes: bytes of all used weights. expert_format: "mxfp4" where experts are
    quantized already; they are read as numbers of `dtype`, exactly, or as `expert_blocks`. Else None. types: of a GGUF
    file's tensors, by the model's names; empty of other checkpoints.
    has_mtp_head: whether the files have a multi-token-prediction head that qmix knows, the model's or left out.
    skipped: names of tensors and weight files that the model does not need. notes: lines on what the folder says
    and qmix does not follow.
    """

    def __init__(self, path: Path, raw_config: Mapping[str, Any], model: Model, locations: Mapping[str, Location],
                 table: Mapping[str, Source], skipped: tuple[str, ...], notes: tuple[str, ...], opened: ExitStack,
                 decoded: Opened | None = None, has_mtp_head: bool = False):
        self.path = path
        self.has_mtp_head = has_mtp_head
        self.folder = path if decoded is None else decoded.folder
        self.raw_config = raw_config
        self.model = model
        self.skipped = skipped
        self.notes = notes
        self.nbytes = sum(location.entry.nbytes for location in locations.values())
        self.expert_format = decoded.carried if decoded is not None else \
            "mxfp4" if any(source.scales for source in table.values()) else None
        self.types: Mapping[str, str] = {} if decoded is None else decoded.types
        self._decoded = None if decoded is None else getattr(torch, model.dtype)
        self._locations = locations
        self._table = table
        self._opened = opened
        self._widened = {tensor.name for tensor in model.tensors() if tensor.role in WIDE}

    @classmethod
    def open(cls, path: Path | str, mtp: bool = True) -> Checkpoint:
        """Open and account for every tensor; CheckpointError names file, tensor or key, and the cure. mtp: with the
        multi-token-prediction head, where there is one that qmix knows; without, its tensors are among the skipped."""
        path = Path(path)
        with ExitStack() as opened:
            if is_gguf(path):
                return cls._open_gguf(path, opened)
            try:
                _check_folder(path)
                raw = read_json(path / "config.json")
                _check_unquantized(path / "config.json", raw)
                _check_weights(path)
                locations, unused, notes = locate(path, opened)
            except OSError as e:
                raise CheckpointError(f"{path}: {e.strerror}", "check the path and its permissions") from None
            model = _read_config(path / "config.json", raw, locations, mtp)
            used, table, skipped = _account(path, model, locations)
            notes += ignored_keys(path / "config.json", raw)
            if published_experts(raw) and not any(source.scales for source in table.values()):
                notes.append(f"{path / 'config.json'}: quantization_config: says that the experts are MXFP4, but the "
                             f"files have them in {model.dtype}: read so")
            return cls(path, raw, model, used, table, (*skipped, *unused), tuple(notes), opened.pop_all(),
                       has_mtp_head=with_mtp_head_of(model, locations).mtp_head is not None)

    @classmethod
    def _open_gguf(cls, path: Path, opened: ExitStack) -> Checkpoint:
        try:
            found = open_gguf(path, opened)
        except ConfigError as e:
            raise CheckpointError(f"{path}: {e.message}", e.cure) from None
        except OSError as e:
            raise CheckpointError(f"{e.filename or path}: {e.strerror}", "check the path and its permissions") from None
        return cls(path, found.raw_config, found.model, found.locations, found.table, found.skipped, found.notes,
                   opened.pop_all(), found)

    def dense(self, name: str) -> Tensor:
        """A tensor of Model.tensors, in fresh memory and the file's dtype (of a GGUF file, the model's), or fp32 for
        the roles of WIDE."""
        if name in self._widened:
            return self._tensor(name, dtype=torch.float32).float()
        return self._tensor(name)

    def published(self, name: str) -> str:
        """What the checkpoint calls a tensor of the model, or the tensor that it is a part of."""
        return self._table[name].name

    def nbytes_of(self, name: str, shape: tuple[int, ...]) -> int:
        """Of a tensor of the model, as the file has it; its share of the file's tensor."""
        entry = self._locations[self._table[name].name].entry
        return entry.nbytes * prod(shape) // prod(entry.shape)

    def expert(self, key: ExpertKey) -> tuple[Tensor, Tensor, Tensor]:
        """w1 (gate) [F, H], w2 (down) [H, F], w3 (up) [F, H], in the file's dtype and fresh memory."""
        w1, w3, w2 = (self._tensor(tensor.name) for tensor in self.model.expert_tensors(key)[:3])
        return w1, w2, w3

    def carriable(self, *names: str) -> str | None:
        """The format of a store that all these tensors of the model have in the file, row by row, so that `blocks`
        reads them; else None."""
        kinds = {self.types.get(name, "").lower() for name in names}
        whole = all(sources.keeps_rows(self._table[name]) for name in names)
        return next(iter(kinds)) if whole and len(kinds) == 1 and kinds <= CARRIED.keys() else None

    def blocks(self, *names: str) -> CarriedBlocks:
        """`carriable` matrices of the model, one below the other, as the file has them. CheckpointError for a scale
        that no weight has."""
        found = []
        for name in names:
            location = self._locations[self._table[name].name]
            found.append(sources.read_carried(location, self._table[name]))
            if found[-1].nonfinite():
                raise CheckpointError(f"{location.shard.file.path}: {location.entry.name}: holds a scale that is not a "
                                      "number: no working model has such a weight", REFETCH)
        return CarriedBlocks(found[0].kind, found[0].raw if len(found) == 1 else torch.cat([b.raw for b in found]))

    def stacked_expert(self, key: ExpertKey, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """An expert as a record has it: w13 [2F, H], the gate above w3, and w2 [H, F], in the file's dtype; read
        into `buffer`, uint8 of an expert's bytes, and views into it."""
        return self.stacked_w13(key, buffer), self.w2(key, buffer)

    def stacked_w13(self, key: ExpertKey, buffer: Tensor) -> Tensor:
        """The first matrix of `stacked_expert`."""
        part = self._expert_part
        w1, _ = (self._tensor(tensor.name, buffer[i * part:(i + 1) * part])
                 for i, tensor in enumerate(self.model.expert_tensors(key)[:2]))
        return buffer[:2 * part].view(w1.dtype).view(2 * w1.shape[0], w1.shape[1])

    def w2(self, key: ExpertKey, buffer: Tensor) -> Tensor:
        """The second one, behind the first in `buffer`."""
        return self._tensor(self.model.expert_tensors(key)[2].name, buffer[2 * self._expert_part:3 * self._expert_part])

    @property
    def _expert_part(self) -> int:
        """Bytes of a third of an expert, in the model's dtype."""
        dtype: torch.dtype = getattr(torch, self.model.dtype)
        return self.model.hidden * self.model.expert_inner * dtype.itemsize

    def expert_blocks(self, key: ExpertKey) -> tuple[Blocks, Blocks]:
        """w13 and w2 of an expert in MXFP4, codes and scales as the checkpoint has them."""
        gate, up, down = (self._table[tensor.name] for tensor in self.model.expert_tensors(key)[:3])
        first, second = self._blocks(gate, up)
        w13 = Blocks(torch.cat((first.codes, second.codes)), torch.cat((first.scales, second.scales)))
        return w13, self._blocks(down)[0]

    def _blocks(self, *of: Source) -> list[Blocks]:
        """Of sources in one tensor, or in GGUF's. CheckpointError for a scale that no weight has."""
        if self._decoded is not None:
            found, scales = [sources.read_mxfp4(self._locations[s.name], s) for s in of], self._locations[of[0].name]
        else:
            codes, scales = self._locations[of[0].name], self._locations[of[0].scales]
            found = sources.read_blocks(codes, scales, of)
        if (largest := max(int(blocks.scales.max()) for blocks in found)) > LARGEST:
            part = ", ".join(str(step.at) for step in of[0].steps if isinstance(step, Index))
            raise CheckpointError(f"{scales.shard.file.path}: {scales.entry.name}[{part}]: holds {largest}, want at "
                                  f"most {LARGEST}: no weight is as large", REFETCH)
        return found

    def expert_locations(self, key: ExpertKey) -> list[Location]:
        """The tensors of the files in which an expert lies, each once; other experts may lie there too."""
        names = dict.fromkeys(name for tensor in self.model.expert_tensors(key)
                              for name in self._table[tensor.name].names)
        return [self._locations[name] for name in names]

    def expert_nbytes(self, key: ExpertKey) -> int:
        """Of an expert's share of the files."""
        found = 0
        for tensor in self.model.expert_tensors(key):
            count = prod(tensor.shape)
            found += count // 2 + count // MX_GROUP if self._table[tensor.name].scales else \
                self.nbytes_of(tensor.name, tensor.shape)
        return found

    def expert_biases(self, key: ExpertKey) -> tuple[Tensor, Tensor] | None:
        """Of w13 [2F], the gate's before the up's, and of w2 [H], fp32; None where experts have none."""
        names = [tensor.name for tensor in self.model.expert_tensors(key)[3:]]
        if not names:
            return None
        gate, up, down = (self._tensor(name, dtype=torch.float32).float() for name in names)
        return torch.cat((gate, up)), down

    def read_into(self, name: str, out: Tensor) -> None:
        """Any tensor of the model, into memory of its dtype and shape."""
        if not out.is_contiguous():
            out.copy_(self._tensor(name))
            return
        found = self._tensor(name, out.view(-1).view(torch.uint8))
        assert found.shape == out.shape

    def _tensor(self, name: str, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: in which a GGUF file is decoded, the model's by default; others stay as they are."""
        source = self._table[name]
        if not source.scales:
            decoded = None if self._decoded is None else dtype or self._decoded
            return sources.read(self._locations[source.name], source, out, decoded)
        dtype, exact = getattr(torch, self.model.dtype), self._blocks(source)[0].numbers(torch.float32)
        found = exact.to(dtype)
        if dtype == torch.float16 and not torch.equal(found.float(), exact):
            raise CheckpointError(f"{self.path}: {source.name}: has numbers that {self.model.dtype} does not have",
                                  "keep the experts as they are (leave --format out), or give a checkpoint in bf16")
        return found if out is None else out.view(found.dtype).view(found.shape).copy_(found)

    @property
    def extra_files(self) -> list[str]:
        """Names of tokenizer, chat template and generation defaults in `folder`, as far as they are there."""
        return list(modelfiles.present(self.folder))

    def fingerprint(self) -> str:
        """Hex digest of the content: config, every tensor's name, shape and location, and a sample of its
        bytes. Independent of path and time; reads 4 KiB a tensor."""
        digest = hashlib.blake2b(json.dumps(self.raw_config, sort_keys=True).encode(), digest_size=16)
        for name, location in sorted(self._locations.items()):
            entry, size = location.entry, location.shard.file.size
            digest.update(repr((name, entry.dtype, entry.shape, entry.offset, entry.nbytes, size)).encode())
            digest.update(bytes(location.shard.read(entry, *sample_of(entry)).tolist()))
        return digest.hexdigest()

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _check_folder(path: Path) -> None:
    """Refuse, each with its own cure, what is not a folder with safetensors weights and a config."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder", FOLDER)
    if not path.is_dir():
        raise CheckpointError(f"{path}: a file, not a folder", f"{FOLDER}, or a GGUF file")
    if (found := sorted(path.glob("*.gguf"))) and not (path / "config.json").exists():
        raise CheckpointError(f"{path}: no config.json, but {len(found)} GGUF file{'s' if len(found) > 1 else ''}",
                              f"name the file: {found[0]}")
    if (path / STORE_MANIFEST).exists():
        raise CheckpointError(f"{path}: a qmix store, quantized already",
                              f"talk to it with `qmix chat {path}`, or give the original checkpoint")
    if not (path / "config.json").exists():
        native = " (Mistral's own layout)" if (path / "params.json").exists() else ""
        raise CheckpointError(f"{path / 'config.json'}: missing{native}", f"{FOLDER}, Hugging Face layout")


def _check_weights(path: Path) -> None:
    """CheckpointError where the folder has none that can be read. Asked when config.json has been: the weights of a
    quantized checkpoint of the hub are not fetched."""
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return
    others = sorted(p.name for p in path.glob("*.safetensors"))
    if others:
        raise CheckpointError(f"{path}: {others[0]}, but neither {SINGLE} nor {INDEX}",
                              f"fetch {INDEX} too, or name a single file {SINGLE}")
    pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
    if pickles:
        raise CheckpointError(f"{path}: only pickled weights ({pickles[0]}), which can run code when loaded",
                              "fetch the safetensors version, or convert it with transformers")
    cached = path.parent.name == "snapshots"  # of the hub: then it was fetched as the repository has it
    raise CheckpointError(f"{path / SINGLE}: missing", "the repository has no safetensors weights (neither "
                          f"{SINGLE} nor {INDEX}): choose one that has" if cached else REFETCH)


def _check_unquantized(path: Path, raw: Mapping[str, Any]) -> None:
    """CheckpointError where config.json says how the weights were quantized; null says that they are not. Headers are
    read after this: those of a quantized checkpoint may have dtypes that qmix does not know."""
    found = raw.get("quantization_config")
    try:
        published = published_experts(raw)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e.message}", e.cure) from None
    if found is not None and published is None:
        method = found.get("quant_method") if isinstance(found, dict) else None
        how = f", as {method}" if isinstance(method, str) and method else ""
        raise CheckpointError(f"{path}: quantization_config: the weights are quantized already{how}",
                              MXFP4 if method == "mxfp4" else ORIGINAL)


def ignored_keys(path: Path, raw: Mapping[str, Any]) -> list[str]:
    """Lines on values of config.json that qmix reads otherwise than they stand there."""
    found = []
    if raw.get("auto_map"):
        found.append("auto_map names code that comes with the model (trust_remote_code): qmix never runs such code and "
                     "computes the model as transformers' own does")
    if "sliding_window" in raw and raw["sliding_window"] is not None and raw["sliding_window"] <= 0:
        found.append(f"sliding_window {raw['sliding_window']}: read as no window, full attention")
    eos = raw.get("eos_token_id")
    if any(i < 0 for i in (eos if isinstance(eos, list) else [] if eos is None else [eos])):
        found.append(f"eos_token_id {eos}: a negative id is not a token: ignored")
    return [f"{path}: {line}" for line in found]


def _read_config(path: Path, raw: Mapping[str, Any], locations: Mapping[str, Location], mtp: bool) -> Model:
    """The model of config.json, with the dtype that most tensors have, and the prediction head that they have."""
    try:
        model = read_model({**raw, "dtype": "bfloat16"})
        model = with_mtp_head_of(model, locations) if mtp else model.trunk
        unused = skipped(model, locations)
        found = Counter(p.entry.dtype for name, p in locations.items()
                        if name not in unused and p.entry.dtype != BYTES)
        model = replace(model, dtype=DTYPE_NAMES.get(found.most_common(1)[0][0], "bfloat16") if found else model.dtype)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e.message}", e.cure or "correct config.json, or fetch it again") from None
    return model


def _account(path: Path, model: Model, locations: Mapping[str, Location]
             ) -> tuple[dict[str, Location], dict[str, Source], list[str]]:
    """({name: location} of all that the model uses, {canonical name: Source}, names skipped); CheckpointError for
    whatever is missing, left over, misshapen or of another dtype."""
    _check_count(path, model)
    packed = mxfp4_layout(model)
    known = layouts(model) + (() if packed is None else (packed,))
    layout = choose_layout(known, locations)
    heads = set[str]()
    if known := mtp_layouts(model):
        head = choose_layout(known, locations)
        heads = {name for source in head.values() for name in source.names}
        layout = {**layout, **head}
    wanted = dict.fromkeys(name for source in layout.values() for name in source.names)
    _check_no_low_bits(wanted, locations)
    missing = [name for name in wanted if name not in locations]
    if missing:
        both = f"{path / SINGLE} is read and {INDEX} ignored: remove the one that does not belong to the model"
        tied = "if the model ties its embeddings, config.json must say tie_word_embeddings: true"
        raise CheckpointError(f"{path}: {missing[0]}: missing ({len(missing)} of {len(wanted)} tensors are)",
                              NO_MTP if all(name in heads for name in missing) else
                              tied if missing == [HEAD] else
                              both if (path / SINGLE).is_file() and (path / INDEX).exists() else WRONG_CONFIG)
    _check_tensors(model, layout, locations)
    found = skipped(model, locations)
    unused = [name for name in locations if name in found]
    if model.tied and HEAD in locations:
        _check_tied(locations[layout["embedding"].name], locations[HEAD])
        unused.append(HEAD)
    left = [name for name in locations if name not in wanted and name not in unused]
    if left:
        raise CheckpointError(f"{locations[left[0]].shard.file.path}: {left[0]}: not a tensor of this model "
                              f"({len(left)} such tensors)", WRONG_CONFIG)
    return {name: locations[name] for name in wanted}, dict(layout), unused


def _check_count(path: Path, model: Model) -> None:
    count = 7 * model.num_layers + sum(3 * model.experts_in(layer) for layer in model.paged_layers)
    if count > MAX_TENSORS:
        raise CheckpointError(
            f"{path / 'config.json'}: {model.num_layers} layers of up to {model.num_experts} experts: {count} tensors, "
            f"want at most {MAX_TENSORS}", WRONG_CONFIG)


def _check_tensors(model: Model, layout: Layout, locations: Mapping[str, Location]) -> None:
    """Shape and dtype of every tensor, in the order of the model."""
    of_experts = (t for key in model.expert_keys for t in model.expert_tensors(key))
    for tensor in chain(model.tensors(), of_experts):
        source = layout[tensor.name]
        wide = tensor.role in WIDE and locations[source.name].entry.dtype == "F32"
        _check_tensor(source, locations[source.name], tensor.shape,
                      BYTES if source.scales else "float32" if wide else model.dtype)
        if source.scales:
            rows, cols = tensor.shape
            _check_tensor(source.of_scales, locations[source.scales], (rows, cols // MX_GROUP), BYTES)


def _check_tensor(source: Source, location: Location, shape: tuple[int, ...], dtype: str) -> None:
    """dtype: as in Model, or BYTES."""
    where = f"{location.shard.file.path}: {source.name}"
    try:
        got = source.shape_out(location.entry.shape)
    except Misfit as misfit:
        raise CheckpointError(f"{where}: {misfit} by config.json", WRONG_CONFIG) from None
    if got != shape:
        part = " for a part of it" if source.steps else ""
        raise CheckpointError(f"{where}: got shape {list(got)}{part}, want {list(shape)} by config.json", WRONG_CONFIG)
    if dtype != BYTES:
        _check_dtype(location, where, dtype)
    elif location.entry.dtype != BYTES:
        raise CheckpointError(f"{where}: got dtype {location.entry.dtype}, want {BYTES}, as MXFP4 has it", REFETCH)


def _check_dtype(location: Location, where: str, dtype: str) -> None:
    if location.entry.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{where}: got dtype {location.entry.dtype}, want BF16, F16 or F32",
                              "give the original, unquantized checkpoint")
    if DTYPE_NAMES[location.entry.dtype] != dtype:
        raise CheckpointError(f"{where}: got {DTYPE_NAMES[location.entry.dtype]}, want {dtype} like the other tensors",
                              "save the checkpoint again with one dtype")


def _check_no_low_bits(wanted: Mapping[str, object], locations: Mapping[str, Location]) -> None:
    """A checkpoint with 4-, 6- or 8-bit floats is named as what it is, by the model's own tensor where that has one;
    otherwise its scales would be called leftovers and its weights missing. So is one in MXFP4, which has bytes."""
    packed = next((locations[name + BLOCKS] for name in wanted if name + BLOCKS in locations), None)
    if packed is not None:
        raise CheckpointError(f"{packed.shard.file.path}: {packed.entry.name}: the weights are quantized already, as "
                              "mxfp4", MXFP4)
    low = {name: location for name, location in locations.items() if location.entry.dtype.startswith(LOW_BITS)}
    if low:
        location = next((low[name] for name in wanted if name in low), next(iter(low.values())))
        raise CheckpointError(f"{location.shard.file.path}: {location.entry.name}: got dtype {location.entry.dtype}, "
                              "want BF16, F16 or F32: the weights are quantized already",
                              "give the original, unquantized checkpoint")


def _check_tied(embedding: Location, head: Location) -> None:
    """The head of a model with tied embeddings may be there, but must be the embedding."""
    if not equal(embedding, head):
        raise CheckpointError(f"{head.shard.file.path}: {HEAD}: differs from {embedding.entry.name}, though "
                              "config.json says tie_word_embeddings: true",
                              "set tie_word_embeddings to false in config.json to use both")

"""Every tensor of a checkpoint accounted for: each one is used, or named as skipped, or the checkpoint is refused by
that tensor's name."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from math import prod
from pathlib import Path
from types import MappingProxyType

from qmix.errors import CheckpointError
from qmix.lowbit import Matrix, is_zero
from qmix.models import Layout, Misfit, Source, choose_layout, layouts, mtp_layouts, mxfp4_layout, skipped
from qmix.shards import INDEX, REFETCH, SINGLE, Location, equal
from qmix.sizes import MX_GROUP
from qmix.spec import WIDE, Model, Tensor

Locations = Mapping[str, Location | Matrix]  # by the names of the files; of a quantized tensor, by the weight's
NO_MTP = "the multi-token-prediction head is not whole: leave it out (--no-mtp), or fetch the checkpoint again"
WRONG_CONFIG = "config.json and the weights do not belong together: fetch both again, or correct config.json"
MXFP4 = ("qmix takes MXFP4 in the experts of gpt_oss alone: have transformers decode the weights "
         "(Mxfp4Config(dequantize=True), then save_pretrained), and give what it saved")
BYTES = "U8"  # of MXFP4's codes and scales
LOW_BITS = ("F4", "F6_", "F8_")
BLOCKS = "_blocks"  # a tensor in MXFP4 is two, its codes under its name and this, and its _scales
BIAS = ".bias"
HEAD = "lm_head.weight"  # also where a model ties it to its embedding
DTYPE_NAMES = MappingProxyType({"BF16": "bfloat16", "F16": "float16", "F32": "float32"})
MAX_TENSORS = 10**6  # far above any real model; keeps a hostile config.json from costing memory


def account(path: Path, model: Model, locations: Locations, known: tuple[Layout, ...] | None = None
            ) -> tuple[dict[str, Location | Matrix], dict[str, Source], list[str]]:
    """({name: location} of all that the model uses, {canonical name: Source}, names skipped); CheckpointError for
    whatever is missing, left over, misshapen or of another dtype."""
    _check_count(path, model)
    if known is None:
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
    unused += _zero_biases(wanted, locations)
    there = {*unused}
    left = [name for name in locations if name not in wanted and name not in there]
    if left:
        raise CheckpointError(f"{locations[left[0]].shard.file.path}: {left[0]}: not a tensor of this model "
                              f"({len(left)} such tensors)", WRONG_CONFIG)
    return {name: locations[name] for name in wanted}, dict(layout), unused


def _zero_biases(wanted: Mapping[str, object], locations: Locations) -> list[str]:
    """AutoGPTQ gives every module that it quantizes a bias, of zeros where the model has none. CheckpointError for one
    that is not zero."""
    found = []
    for name, location in locations.items():
        if name in wanted or not name.endswith(BIAS) or isinstance(location, Matrix) or \
                not isinstance(locations.get(name.removesuffix(BIAS) + ".weight"), Matrix):
            continue
        if not is_zero(location):
            raise CheckpointError(f"{location.shard.file.path}: {name}: not a tensor of this model, whose quantized "
                                  "module has no bias, and not all zeros, as programs that quantize leave it behind",
                                  WRONG_CONFIG)
        found.append(name)
    return found


def shares(model: Model, table: Layout, locations: Locations) -> dict[str, int]:
    """Bytes of the files by the model's tensor; all of them together are all bytes that the model uses. Tensors that
    lie in one divide its bytes, and those of its scales, by their numbers; the last one has what is left over."""
    counts: dict[str, dict[str, int]] = {}
    for tensor in all_tensors(model):
        counts.setdefault(table[tensor.name].name, {})[tensor.name] = prod(tensor.shape)
    found: dict[str, int] = {}
    for numbers in counts.values():
        source = table[next(iter(numbers))]
        nbytes, whole = sum(nbytes_of(locations[name]) for name in source.names), sum(numbers.values())
        found |= {name: nbytes * count // whole for name, count in numbers.items()}
        found[next(reversed(numbers))] += nbytes - sum(found[name] for name in numbers)
    return found


def nbytes_of(location: Location | Matrix) -> int:
    """Of a tensor in the files."""
    return location.nbytes if isinstance(location, Matrix) else location.entry.nbytes


def all_tensors(model: Model) -> chain[Tensor]:
    """The model's, in its order, and those of its experts."""
    return chain(model.tensors(), (t for key in model.expert_keys for t in model.expert_tensors(key)))


def _check_count(path: Path, model: Model) -> None:
    count = 7 * model.num_layers + sum(3 * model.experts_in(layer) for layer in model.paged_layers)
    if count > MAX_TENSORS:
        raise CheckpointError(
            f"{path / 'config.json'}: {model.num_layers} layers of up to {model.num_experts} experts: {count} tensors, "
            f"want at most {MAX_TENSORS}", WRONG_CONFIG)


def _check_tensors(model: Model, layout: Layout, locations: Locations) -> None:
    """Shape and dtype of every tensor, in the order of the model."""
    for tensor in all_tensors(model):
        source = layout[tensor.name]
        wide = tensor.role in WIDE and locations[source.name].entry.dtype == "F32"
        _check_tensor(source, locations[source.name], tensor.shape,
                      BYTES if source.scales else "float32" if wide else model.dtype)
        if source.scales:
            rows, cols = tensor.shape
            _check_tensor(source.of_scales, locations[source.scales], (rows, cols // MX_GROUP), BYTES)


def _check_tensor(source: Source, location: Location | Matrix, shape: tuple[int, ...], dtype: str) -> None:
    """dtype: as in Model, or BYTES."""
    where = f"{location.shard.file.path}: {source.name}"
    try:
        got = source.shape_out(location.entry.shape)
    except Misfit as misfit:
        raise CheckpointError(f"{where}: {misfit} by config.json", WRONG_CONFIG) from None
    if got != shape:
        part = " for a part of it" if source.steps else ""
        raise CheckpointError(f"{where}: got shape {list(got)}{part}, want {list(shape)} by config.json", WRONG_CONFIG)
    if isinstance(location, Matrix):
        return
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


def _check_no_low_bits(wanted: Mapping[str, object], locations: Locations) -> None:
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


def _check_tied(embedding: Location | Matrix, head: Location | Matrix) -> None:
    """The head of a model with tied embeddings may be there, but must be the embedding."""
    if isinstance(embedding, Matrix) or isinstance(head, Matrix) or not equal(embedding, head):
        raise CheckpointError(f"{head.shard.file.path}: {HEAD}: differs from {embedding.entry.name}, though "
                              "config.json says tie_word_embeddings: true",
                              "set tie_word_embeddings to false in config.json to use both")

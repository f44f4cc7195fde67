"""--format auto: what a quantized checkpoint has in a format that stores have too stays as it is, bit for bit: a GGUF
file's types, and what of a safetensors file's weights fits one (qmix/lowbit/carry.py). The rest is quantized again, as
int4 or q8_0: with at least a bit more than it has, or as q8_0 where no format has that. It is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from qmix.checkpoint import Checkpoint
from qmix.config import (
    CALIBRATED,
    CARRIED_NAMES,
    GROUP_SIZES,
    GROUPED_BITS,
    KIND_LETTERS,
    QuantConfig,
    parse_kind,
    parts_of,
)
from qmix.errors import UsageError
from qmix.spec import ExpertKey

UNQUANTIZED = ("F32", "F16", "BF16")
PACKED = ("linear", "mlp", "head")  # roles of the tensors that a store packs
Pair = tuple[str, str]  # the formats of w13 and w2


def quantized_types(checkpoint: Checkpoint) -> list[str]:
    """The types of quantized weights, see Checkpoint.types; none of a checkpoint that has none."""
    return sorted({*checkpoint.types.values()}.difference(UNQUANTIZED))


def carry_all(checkpoint: Checkpoint, quant: QuantConfig, dense: str | None) -> QuantConfig:
    """A mix in which every matrix has the format that the file has it in, where a store has that format. quant: int4,
    with the method, groups and blocks of what is quantized again; dense: the format of dense matrices, None to keep
    what can be kept, the others as `quant` says. UsageError where there are too many kinds of experts."""
    model = checkpoint.model
    pairs = {key: _formats(checkpoint, quant, key) for key in model.expert_keys}
    kinds = tuple(sorted(set(pairs.values())))
    if len(kinds) > len(KIND_LETTERS):
        raise UsageError(f"--format auto: the experts have {len(kinds)} pairs of types, a store at most "
                         f"{len(KIND_LETTERS)}", "choose --format int4")
    if len(kinds) == 1 and kinds[0] in {(f"int4g{size}",) * 2 for size in GROUP_SIZES}:
        return replace(quant, experts="int4", dense=dense or quant.dense, group_size=parse_kind(kinds[0][0])[1],
                       dense_formats=() if dense is not None else dense_formats(checkpoint))
    lines = tuple("".join(KIND_LETTERS[kinds.index(pairs[ExpertKey(layer, e)])] for e in range(model.experts_in(layer)))
                  for layer in range(model.num_layers))
    kept = () if dense is not None else dense_formats(checkpoint)
    grouped = quant.dense in GROUPED_BITS or not _carried_only(kinds)
    how = (quant.method, quant.group_size, quant.block) if grouped else ("", 0, 0)
    return QuantConfig("mixed", dense or quant.dense, *how, kinds=kinds, mix=lines, dense_formats=kept)


def all_experts(checkpoint: Checkpoint) -> bool:
    """Whether all matrices of experts can stay as they are."""
    several = ([t.name for t in checkpoint.model.expert_tensors(key)[:3]] for key in checkpoint.model.expert_keys)
    return all(checkpoint.carriable(gate, up) is not None and checkpoint.carriable(down) is not None
               for gate, up, down in several)


def dense_formats(checkpoint: Checkpoint) -> tuple[Pair, ...]:
    """QuantConfig.dense_formats with all dense matrices that can stay as they are, the embedding among them."""
    return tuple((t.name, kind) for t in checkpoint.model.tensors()
                 if (t.role in PACKED or t.role == "embedding")
                 and (kind := checkpoint.carriable(t.name)) in CARRIED_NAMES)


def _carried_only(kinds: Iterable[Pair]) -> bool:
    return all(part in CARRIED_NAMES for pair in kinds for name in pair for part in parts_of(name))


def _formats(checkpoint: Checkpoint, quant: QuantConfig, key: ExpertKey) -> Pair:
    gate, up, down = (t.name for t in checkpoint.model.expert_tensors(key)[:3])
    return _format(checkpoint, quant, gate, up), _format(checkpoint, quant, down)


def _format(checkpoint: Checkpoint, quant: QuantConfig, *names: str) -> str:
    """Of a matrix that is stacked from these tensors: the file's; or int4 where it has a bit a weight more; or q8_0,
    whose 8.5 bits are no more than Q8_0 has, beside a type that no store has, and less than unquantized weights
    have."""
    if (kind := checkpoint.carriable(*names)) is not None:
        return kind
    bits = max(8 * checkpoint.nbytes_of(name) / (checkpoint.model.hidden * checkpoint.model.expert_inner)
               for name in names)
    return f"int4g{quant.group_size}" if 4 + 32 / quant.group_size >= bits + 1 else "q8_0"


def again_line(checkpoint: Checkpoint, quant: QuantConfig) -> str:
    """What a user should know who has all experts in one format, or a mix of int4 and fewer bits, made of a quantized
    file: what is in the format asked for stays as it is, the rest is quantized a second time."""
    model, experts = checkpoint.model, quant.experts
    if experts in GROUPED_BITS and quant.method not in CALIBRATED:
        experts = f"{experts}g{quant.group_size}"
    asked = [(names, experts) for key in model.expert_keys
             for gate, up, down in [[t.name for t in model.expert_tensors(key)[:3]]] for names in ((gate, up), (down,))]
    asked += [((t.name,), quant.dense) for t in model.tensors() if t.role in PACKED]
    quantized = [(names, kind) for names, kind in asked if {checkpoint.types[n] for n in names} - {*UNQUANTIZED}]
    kept = sum(checkpoint.carriable(*names) == kind for names, kind in quantized)
    types = "" if checkpoint.lowbit else f" ({', '.join(quantized_types(checkpoint))})"  # its notes say what it has
    start = f"note: {checkpoint.path}: the weights are quantized already{types}; "
    if kept and kept == len(quantized):
        return start + f"all {kept} matrices are in the format asked for and stay as they are, bit for bit"
    stay = f"{kept} of {len(quantized)} matrices are in the format asked for and stay so, bit for bit; the others" \
        if kept else "they"
    some = any(checkpoint.carriable(name) for name in checkpoint.types)
    auto = " (--format auto keeps all that can stay as it is)" if some else ""
    return start + f"{stay} are read as {model.dtype}, and what is quantized again adds to their error{auto}"


def lines(checkpoint: Checkpoint, quant: QuantConfig) -> list[str]:
    """What a user should know of `carry_all`'s answer: what is carried, and what is not."""
    model, found = checkpoint.model, list[str]()
    carried, again = Counter[str](), Counter[tuple[tuple[str, ...], str]]()
    for key in model.expert_keys:
        w13, w2 = quant.kinds[quant.kind_of(key)] if quant.kinds else (f"{quant.experts}g{quant.group_size}",) * 2
        gate, up, down = (t.name for t in model.expert_tensors(key)[:3])
        for kind, names in ((w13, (gate, up)), (w2, (down,))):
            if checkpoint.carriable(*names) == kind:
                carried[kind] += 1
            else:
                again[tuple(dict.fromkeys(checkpoint.types[name] for name in names)), kind] += 1
    if carried:
        found.append(f"experts: kept bit for bit: {_counted(carried.items())} matrices")
    for (types, kind), count in sorted(again.items()):
        several = ", gate and up of different types," if len(types) > 1 else ""
        how = "quantized" if set(types) <= {*UNQUANTIZED} else "quantized again"
        most = ", the most that a mix has" if {*types} & {"Q8_0", *UNQUANTIZED} else ""
        found.append(f"experts: {count} matrices in {' and '.join(types)}{several} are {how} as {kind}{most}, which "
                     "adds to their error: the table below has it")
    return found + dense_lines(checkpoint, quant)


def dense_lines(checkpoint: Checkpoint, quant: QuantConfig) -> list[str]:
    """The same of what is no expert."""
    model, dense, found = checkpoint.model, quant.dense_kinds, list[str]()
    if dense:
        counts = Counter(dense.values())
        found.append(f"attention, head, embedding and other matrices: kept bit for bit: {_counted(counts.items())}")
    same = [t.name for t in model.tensors()  # by --dense q8_0
            if t.role in PACKED and t.name not in dense and checkpoint.carriable(t.name) == quant.dense]
    if same:
        found.append(f"attention, head and other matrices: kept bit for bit: {len(same)} {quant.dense}")
    others = Counter(checkpoint.types[t.name] for t in model.tensors()
                     if t.role in PACKED and t.name not in dense and t.name not in same)
    again = "decoded," if quant.dense in ("keep", "bf16") else "quantized again"
    for how, types in (("stored", others.keys() & {*UNQUANTIZED}), (again, others.keys() - {*UNQUANTIZED})):
        if types:
            found.append(f"attention, head and other matrices: {_counted((t, others[t]) for t in types)} are {how} "
                         "as --dense says")
    plain = Counter(checkpoint.types[t.name] for t in model.tensors()
                    if t.role not in PACKED and t.name not in dense and checkpoint.types[t.name] not in UNQUANTIZED)
    if plain:
        found.append(f"embedding and the like: {_counted(plain.items())} are decoded to {model.dtype}, which rounds "
                     "them by 2^-9 of each number at most")
    return found


def _counted(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(items))

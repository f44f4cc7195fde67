"""--format auto: what a quantized GGUF file has in a format that stores have too stays as it is, bit for bit. The rest
is quantized again, as int4 or q8_0: with at least a bit more than it has, or as q8_0 where no format has that. It is
said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from qmix.checkpoint import Checkpoint
from qmix.config import CARRIED_NAMES, GROUPED_BITS, KIND_LETTERS, QuantConfig
from qmix.errors import UsageError
from qmix.gguf.types import BY_NAME
from qmix.spec import ExpertKey

UNQUANTIZED = ("F32", "F16", "BF16")
PACKED = ("linear", "mlp", "head")  # roles of the tensors that a store packs
Pair = tuple[str, str]  # the formats of w13 and w2


def quantized_types(checkpoint: Checkpoint) -> list[str]:
    """The types of a GGUF file's quantized weights; none of any other checkpoint."""
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
    lines = tuple("".join(KIND_LETTERS[kinds.index(pairs[ExpertKey(layer, e)])] for e in range(model.experts_in(layer)))
                  for layer in range(model.num_layers))
    kept = () if dense is not None else dense_formats(checkpoint)
    grouped = quant.dense in GROUPED_BITS or not _carried_only(kinds)
    how = (quant.method, quant.group_size, quant.block) if grouped else ("", 0, 0)
    return QuantConfig("mixed", dense or quant.dense, *how, kinds=kinds, mix=lines, dense_formats=kept)


def dense_formats(checkpoint: Checkpoint) -> tuple[Pair, ...]:
    """QuantConfig.dense_formats with all dense matrices that can stay as they are, the embedding among them."""
    return tuple((t.name, kind) for t in checkpoint.model.tensors()
                 if (t.role in PACKED or t.role == "embedding") and (kind := checkpoint.carriable(t.name)) is not None)


def _carried_only(kinds: Iterable[Pair]) -> bool:
    return all(name in CARRIED_NAMES for pair in kinds for name in pair)


def _formats(checkpoint: Checkpoint, quant: QuantConfig, key: ExpertKey) -> Pair:
    gate, up, down = (t.name for t in checkpoint.model.expert_tensors(key)[:3])
    return _format(checkpoint, quant, gate, up), _format(checkpoint, quant, down)


def _format(checkpoint: Checkpoint, quant: QuantConfig, *names: str) -> str:
    """Of a matrix that is stacked from these tensors: the file's; or int4 where it has a bit a weight more; or q8_0,
    whose 8.5 bits are no more than Q8_0 has, stacked with another type, and less than unquantized weights have."""
    if (kind := checkpoint.carriable(*names)) is not None:
        return kind
    types = [BY_NAME[checkpoint.types[name]] for name in names]
    bits = max(8 * kind.nbytes / kind.weights for kind in types)
    return f"int4g{quant.group_size}" if 4 + 32 / quant.group_size >= bits + 1 else "q8_0"


def again_line(checkpoint: Checkpoint, quant: QuantConfig) -> str:
    """What a user should know who has all experts in one format, or a mix of int4 and fewer bits, made of a quantized
    file: what is in the format asked for stays as it is, the rest is quantized a second time."""
    model = checkpoint.model
    asked = [(names, quant.experts) for key in model.expert_keys
             for gate, up, down in [[t.name for t in model.expert_tensors(key)[:3]]] for names in ((gate, up), (down,))]
    asked += [((t.name,), quant.dense) for t in model.tensors() if t.role in PACKED]
    quantized = [(names, kind) for names, kind in asked if {checkpoint.types[n] for n in names} - {*UNQUANTIZED}]
    kept = sum(checkpoint.carriable(*names) == kind for names, kind in quantized)
    start = f"note: {checkpoint.path}: the weights are quantized already ({', '.join(quantized_types(checkpoint))}); "
    if kept and kept == len(quantized):
        return start + f"all {kept} matrices are in the format asked for and stay as they are, bit for bit"
    stay = f"{kept} of {len(quantized)} matrices are in the format asked for and stay so, bit for bit; the others" \
        if kept else "they"
    return start + (f"{stay} are read as {model.dtype}, and what is quantized again adds to their error (--format auto "
                    "keeps all that can stay as it is)")


def lines(checkpoint: Checkpoint, quant: QuantConfig) -> list[str]:
    """What a user should know of `carry_all`'s answer: what is carried, and what is not."""
    model, found = checkpoint.model, list[str]()
    carried, again = Counter[str](), Counter[tuple[tuple[str, ...], str]]()
    for key in model.expert_keys:
        w13, w2 = quant.kinds[quant.kind_of(key)]
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

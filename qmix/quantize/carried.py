"""--format auto: what a quantized GGUF file has in a format that stores have too stays as it is, bit for bit. The rest
is quantized again with at least a bit more than it has, which is said."""

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
    """QuantConfig.dense_formats with all dense matrices that can stay as they are."""
    return tuple((t.name, kind) for t in checkpoint.model.tensors()
                 if t.role in PACKED and (kind := checkpoint.carriable(t.name)) is not None)


def _carried_only(kinds: Iterable[Pair]) -> bool:
    return all(name in CARRIED_NAMES for pair in kinds for name in pair)


def _formats(checkpoint: Checkpoint, quant: QuantConfig, key: ExpertKey) -> Pair:
    gate, up, down = (t.name for t in checkpoint.model.expert_tensors(key)[:3])
    return _format(checkpoint, quant, gate, up), _format(checkpoint, quant, down)


def _format(checkpoint: Checkpoint, quant: QuantConfig, *names: str) -> str:
    """Of a matrix that is stacked from these tensors: the file's, or int4 or q8_0 where these have a bit more."""
    if (kind := checkpoint.carriable(*names)) is not None:
        return kind
    types = [BY_NAME[checkpoint.types[name]] for name in names]
    bits = max(8 * kind.nbytes / kind.weights for kind in types)
    return f"int4g{quant.group_size}" if 4 + 32 / quant.group_size >= bits + 1 else "q8_0"


def lines(checkpoint: Checkpoint, quant: QuantConfig) -> list[str]:
    """What a user should know of `carry_all`'s answer: what is carried, and what is not."""
    model, found = checkpoint.model, list[str]()
    carried, again = Counter[str](), Counter[tuple[str, str]]()
    for key in model.expert_keys:
        w13, w2 = quant.kinds[quant.kind_of(key)]
        gate, up, down = (t.name for t in model.expert_tensors(key)[:3])
        for kind, names in ((w13, (gate, up)), (w2, (down,))):
            if checkpoint.carriable(*names) == kind:
                carried[kind] += 1
            else:
                again[" and ".join(dict.fromkeys(checkpoint.types[name] for name in names)), kind] += 1
    if carried:
        found.append(f"experts: kept bit for bit: {_counted(carried.items())} matrices")
    for (types, kind), count in sorted(again.items()):
        several = ", gate and up of different types," if " and " in types else ""
        found.append(f"experts: {count} matrices in {types}{several} are quantized again as {kind}, which adds to "
                     "their error: the table below has it")
    return found + dense_lines(checkpoint, quant)


def dense_lines(checkpoint: Checkpoint, quant: QuantConfig) -> list[str]:
    """The same of what is no expert."""
    model, dense, found = checkpoint.model, quant.dense_kinds, list[str]()
    if dense:
        counts = Counter(dense.values())
        found.append(f"attention, head and other matrices: kept bit for bit: {_counted(counts.items())}")
    others = Counter(checkpoint.types[t.name] for t in model.tensors()
                     if t.role in PACKED and t.name not in dense)
    if others:
        found.append(f"attention, head and other matrices: {_counted(others.items())} are quantized again as --dense "
                     "says")
    plain = Counter(checkpoint.types[t.name] for t in model.tensors()
                    if t.role not in PACKED and checkpoint.types[t.name] not in UNQUANTIZED)
    if plain:
        found.append(f"embedding and the like: {_counted(plain.items())} are decoded to {model.dtype}, which rounds "
                     "them by 2^-9 of each number at most")
    return found


def _counted(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(items))

"""How much memory a calibration takes, from the model's program.

H hidden, F expert inner.
"""

from __future__ import annotations

from collections.abc import Iterable

from qmix.kernels import ops
from qmix.kernels.op import WIDE, Op
from qmix.quantize.calibrated import STRIP
from qmix.quantize.calibration import LENGTH
from qmix.quantize.forward_pass import CHUNK, SEQUENCES, LayerPieces, compute_dtype
from qmix.quantize.layer_weights import dense_bytes
from qmix.spec import Model


def peak_bytes(model: Model, tokens: int, threads: int) -> int:
    """The most memory that quantizing with a calibration takes, about: 3.9 GiB for 65536 tokens of Mixtral 8x7B and
    two threads."""
    item = 4 if model.dtype == "float32" else 2
    hidden, inner = model.hidden, model.expert_inner
    layers = [LayerPieces.of(model, i) for i in range(len(model.layers))]
    kept = tokens * (WIDE * hidden + max(_kept(layer, model) for layer in layers))
    widest = max(hidden, inner, *(max(t.shape) for t in model.tensors() if t.role in ("linear", "mlp")))
    packing = threads * 3 * WIDE * STRIP * widest  # strips, and products in pieces
    expert = WIDE * (hidden**2 + inner**2 + CHUNK * (2 * hidden + 2 * inner))  # sums, and a chunk's activations
    dense = max(_dense(run, item, threads) for layer in layers for run in (layer.before, layer.after))
    stream = 2 * 3 * hidden * inner * item + 3 * hidden * inner + model.vocab * hidden * item  # two read, one packed
    return kept + stream + packing + max(expert, dense)


def _kept(layer: LayerPieces, model: Model) -> int:
    """Bytes a token."""
    return sum(width * dtype.itemsize for width, dtype in layer.kept(compute_dtype(model)).values())


def _dense(program: Iterable[Op], item: int, threads: int) -> int:
    """What a run of Ops takes beside the text's rows: weights, the sums over what its products read, a batch of that,
    and the buffers of a sequence for each thread."""
    program = tuple(program)
    read = inputs(program)
    batch = SEQUENCES * LENGTH * sum(read)
    return (dense_bytes(program, item) + WIDE * (sum(cols**2 for cols in read) + batch)
            + threads * sum(op.scratch(LENGTH) for op in program))


def inputs(program: Iterable[Op]) -> list[int]:
    """The widths of what the products of these Ops read; Linears that read the same, one after another, count once."""
    found, last = [], ""
    for op in program:
        if isinstance(op, ops.Linear) and not op.exact and op.source != last:
            found.append(op.weight.shape[1])
        elif isinstance(op, ops.Mlp):
            found += [op.gate.shape[1], op.down.shape[1]]
        last = op.source if isinstance(op, ops.Linear) else ""
    return found

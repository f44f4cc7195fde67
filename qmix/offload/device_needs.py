"""What a GPU takes for computing beside what a plan counts for any device: decoded tiles, what the kernels pass on from
launch to launch (kernels/device_scratch.py), and the buffers of decoding. In integers, without torch.

What takes less than some KiB is not counted: the plan's reserve has it.

T tokens, K experts per token, E experts, H hidden, F expert inner, L layers with records.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from qmix.config import QuantConfig
from qmix.forward.program import embed_program, head_program, layer_program
from qmix.kernels import ops
from qmix.kernels.configs import Gemv
from qmix.kernels.device_scratch import NUMBER, Scratch, decoded_bytes, device_matrices, head_matrix
from qmix.kernels.kv_size import taps_bytes
from qmix.kernels.op import FEW, Op
from qmix.sizes import pass_tokens, record_layouts
from qmix.spec import Model

FARTHEST = 3  # layers looked ahead, at most
TOGETHER = 512  # tokens of a prompt that a product takes at a time: forward.passes.BLOCK, and those of one expert
JOINED = 8  # times F, what an expert takes between its halves where torch joins gate and up
IN_PLACE = (ops.Experts, ops.Route, ops.Guess, ops.Take)  # what they write has a place in FewBuffers


def scratch_of(model: Model, quant: QuantConfig, context: int, gemv: Gemv) -> Scratch:
    """The buffers of the kernels that decode, for all that an engine may ask of them."""
    return Scratch.of(model, quant, context, gemv, FARTHEST)


def scratch_bytes(model: Model, quant: QuantConfig, context: int, item_bytes: int, scoring: bool = False,
                  gemv: Gemv | None = None) -> int:
    """All of it, computing in numbers of so many bytes. gemv: how the products of few tokens are cut, None as is built
    in for every card. scoring: logits are read after every token."""
    return tile_bytes(model, quant, context, item_bytes, scoring) + decode_bytes(model, quant) + \
        scratch_of(model, quant, context, gemv or Gemv()).nbytes


def tile_bytes(model: Model, quant: QuantConfig, context: int, item_bytes: int, scoring: bool = False) -> int:
    """Of the product of a prompt that takes most."""
    tokens = min(context, pass_tokens(model), TOGETHER)
    records = [spec for layout in record_layouts(model, quant) for spec in (layout.w13, layout.w2)]

    of_layers = max(decoded_bytes(spec, item_bytes, tokens) for spec in (*device_matrices(model, quant), *records))
    return max(of_layers, decoded_bytes(head_matrix(model, quant), item_bytes, tokens if scoring else 1))


def decode_bytes(model: Model, quant: QuantConfig) -> int:
    """What a decode pass reads and writes (forward/device_buffers.py, device/routed.py), of all numbers of tokens up to
    FEW; rows that the CPU sends up (host_rows.py); what kernels read as one tensor, or in fp32, beside the weights."""
    hidden, k, layers, experts = model.hidden, model.top_k, len(model.record_layers), model.num_experts
    routed = k * hidden + hidden + 2 * k + FARTHEST * k  # Routed: rows, and what goes to the host
    sent = k * hidden + k  # _Made, whose flags take a byte
    counted = 2 * layers * k + 4  # choices of all layers; tokens and positions, int64
    each = sum(range(1, FEW + 1)) * (routed + sent + counted)
    later = FARTHEST * (hidden + 2 * experts) * len(model.moe_layers)  # cuda_router: norms and biases of later routers
    vectors = sum(t.shape[0] for t in model.tensors() if len(t.shape) == 1 and t.role != "norm")
    slots = (layers + 1) * experts  # SlotTable, and DeviceExperts' own row
    by_slot = all(layout.w13.in_blocks and layout.w2.in_blocks for layout in record_layouts(model, quant))
    alone = 0 if by_slot else FEW * (JOINED * model.expert_inner + 3 * hidden)  # TritonOps.expert
    return NUMBER * (each + later + vectors + slots + alone) + shared_bytes(model) + taps_bytes(model)


def shared_bytes(model: Model) -> int:
    """Of the buffers by name and width (device_buffers.Shared), at most: those of all Ops, of Linears that stand
    together as one, and each rope's angles."""
    program = [embed_program(model), *head_program(model)]
    for i in range(len(model.layers)):
        program += layer_program(model, i)
    buffers = {(op.outputs, op.scratch(FEW)) for op in program if not isinstance(op, (*IN_PLACE, ops.Linear, ops.Norm))}
    buffers |= {(op.outputs, FEW * op.size * NUMBER) for op in program if isinstance(op, ops.Norm)}
    buffers |= {((f"{op.out}.gate", f"{op.out}.up"), 2 * FEW * op.gate.shape[0] * NUMBER)
                for op in program if isinstance(op, ops.Mlp)}
    buffers |= set(_linears(program))
    ropes = {op.rope for op in program if isinstance(op, ops.Rope)}
    return sum(nbytes for _, nbytes in buffers) + FEW * NUMBER * sum(FEW * rope.dim for rope in ropes)


def _linears(program: Iterable[Op]) -> Iterable[tuple[tuple[str, ...], int]]:
    """(names, bytes) of Linears of one source that follow each other."""
    for source, found in groupby(program, lambda op: op.source if isinstance(op, ops.Linear) else None):
        if source is not None:
            group = [op for op in found if isinstance(op, ops.Linear)]
            yield tuple(op.out for op in group), sum(op.scratch(FEW) for op in group)

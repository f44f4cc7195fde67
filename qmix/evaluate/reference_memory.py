"""Bytes that transformers takes to compute a model, at most, beside the weights that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from qmix.kernels.kv_size import channels
from qmix.offload.workspace import SCORED_COPIES, SCORED_PIECE, SCORED_ROWS, dense_mlps
from qmix.sizes import MIB
from qmix.spec import Attention, DeltaNet, Model


def workspace(model: Model, context: int) -> int:
    """Bytes that a window of T tokens takes beside weights, at most: residuals, and one in fp32 for a norm; q, k, v and
    the attention's output; for each choice of a token, its row in and out of an expert, gate and up and what becomes of
    them; the mask; with sinks the scores of all heads, up to six times; a matrix that the CPU's kernels lay
    out anew; a piece of logits, and what scoring makes of it."""
    item, hidden = getattr(torch, model.dtype).itemsize, model.hidden
    inner = max(model.expert_inner, *(mlp.inner for mlp in dense_mlps(model)), 0)
    heads = max(layer.mixer.heads * layer.mixer.head_dim for layer in model.layers
                if isinstance(layer.mixer, Attention))
    chosen = model.top_k * (4 * hidden + 5 * inner)
    token = item * (4 * hidden + chosen + 4 * heads) + 12 * hidden
    matrix = tensor_bytes((2 * inner, hidden), model)
    scores = 5 + 6 * sink_heads(model) * item
    deltas = [_delta_row(layer.mixer) for layer in model.layers if isinstance(layer.mixer, DeltaNet)]
    token += max(deltas, default=0)
    return context * token + scores * context * context + matrix + scoring(model, context) + 32 * MIB


def _delta_row(d: DeltaNet) -> int:
    """Bytes of a token in a gated delta net, in fp32: q, k, v and z; the first three through the convolution; queries
    and keys by value head, with their scaled copies; values; in each chunk of 64 tokens what they are to each other."""
    keys, values = d.value_heads * d.key_dim, d.value_heads * d.value_dim
    return 4 * (5 * channels(d) + 9 * keys + 8 * values + 5 * 64 * d.value_heads)


def scoring(model: Model, context: int) -> int:
    """Bytes of a piece of logits, and of what becomes of it."""
    head = min(context, SCORED_PIECE) * model.vocab * (getattr(torch, model.dtype).itemsize + 4)
    return head + SCORED_ROWS * SCORED_COPIES * model.vocab * 8


def largest_part(model: Model) -> int:
    """Bytes of the largest part that is brought in at once: a layer, as accelerate plans it, or embedding or head."""
    layers = [sum(prod(t.shape) for t in model.layer_tensors(i))
              + model.experts_in(i) * 3 * model.hidden * model.expert_inner for i in range(model.num_layers)]
    return tensor_bytes((max(*layers, model.vocab * model.hidden),), model)


def tensor_bytes(shape: Sequence[int], model: Model) -> int:
    count = getattr(torch, model.dtype).itemsize
    for size in shape:
        count *= size
    return count


def sink_heads(model: Model) -> int:
    """The most heads of a layer with sinks. transformers computes these with "eager" attention alone, which keeps the
    scores of all heads."""
    mixers = [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]
    return max((mixer.heads for mixer in mixers if mixer.sinks), default=0)

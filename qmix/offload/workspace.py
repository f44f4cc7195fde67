"""Bytes of what a prefill pass holds beside weights and caches, at its widest."""

from __future__ import annotations

from qmix.kernels import prompt_tiles
from qmix.kernels.kv_size import channels, recurrent_bytes
from qmix.sizes import KV_PIECE, MTP_PENDING, pass_tokens
from qmix.spec import Attention, DeltaNet, Mlp, Model, Moe

ATTENTION_BLOCK = 512  # query positions of one attention call
SCORED_PIECE = 512  # rows of logits that are made together where every token's are read
SCORED_ROWS = 16  # of them, how many are looked at in fp64 at a time
SCORED_COPIES = 6  # of those rows: log-probabilities, probabilities, products, of two models
EXPERT_CHUNK = 512  # tokens that one expert computes at a time


def dense_mlps(model: Model) -> list[Mlp]:
    """The MLPs that are not records."""
    found: list[Mlp] = []
    for i, layer in enumerate(model.layers):
        if isinstance(layer.mlp, Moe):
            found += [mlp for mlp in (layer.mlp.shared, layer.mlp.beside and layer.mlp.beside[0]) if mlp is not None]
        elif not model.experts_in(i):
            found.append(layer.mlp)
    return found


def workspace_bytes(model: Model, context: int, itemsize: int, kv: str = "bf16", grouped: bool = False,
                    apart: bool = False) -> int:
    """What one prefill pass holds at its widest: per token the fp32 residual, the normed states, the [K, H]
    fp32 rows of expert outputs with their sum and one addend; for a chunk of tokens one expert's operand, inner
    activations and result, or for a block queries, keys and values in fp32 and in the compute dtype, the
    attention mask and the scores of its heads; two rows of logits. With an int8 KV cache also the keys and values
    of one head in the compute dtype, and in fp32 a piece of them or the new ones three times over.

    The native kernels have fp32 inner activations and packed ones, at most 4 bytes a number, instead of torch's
    four inner tensors of a chunk. apart: gate and up in two formats are two products, whose fp32 results wait beside
    the inner activations. grouped: a GPU computes many experts at a time instead, see prompt_tiles."""
    tokens = min(context, pass_tokens(model))
    hidden, k = model.hidden, model.top_k
    inner = max(model.expert_inner, *(mlp.inner for mlp in dense_mlps(model)), 0)
    mixers = [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]
    heads = max((a.heads * (1 + a.output_gate) + 2 * a.kv_heads) * a.head_dim for a in mixers)
    per_token = (4 + itemsize) * hidden + (k + 2) * hidden * 4
    block = min(tokens, ATTENTION_BLOCK) * (heads * (4 + itemsize) + context * (1 + itemsize) + hidden * itemsize)
    between = max(4 * itemsize, 3 * 4) if apart else 4 * itemsize
    chunk = min(tokens, EXPERT_CHUNK) * (inner * between + hidden * (2 * itemsize + 4))
    for delta in {layer.mixer for layer in model.layers if isinstance(layer.mixer, DeltaNet)}:
        block = max(block, delta_bytes(delta, min(tokens, ATTENTION_BLOCK), itemsize))
    if kv == "int8":
        new = min(tokens, ATTENTION_BLOCK) * max(a.kv_heads for a in mixers)
        block += max(a.head_dim for a in mixers) * (2 * context * itemsize + 4 * 3 * max(min(context, KV_PIECE), new))
    if grouped:
        chunk = max(chunk, prompt_tiles.workspace(tokens * k, model.num_experts, model.expert_inner, itemsize))
    if model.mtp_head is not None:  # hidden states of a pass, before and behind the last norm, and those that wait
        per_token += 3 * 4 * hidden
        block += 4 * (3 * hidden * min(tokens, ATTENTION_BLOCK) + hidden * MTP_PENDING)
    return tokens * per_token + max(block, chunk) + model.vocab * 8


def delta_bytes(d: DeltaNet, tokens: int, itemsize: int) -> int:
    """What a gated delta net takes for a block of a prompt: q, k and v as projected, side by side, with the past,
    summed and activated; queries and keys once for each value head, and a product with them; z, the values read, their
    norm and gate; and three states on their way."""
    keys, values = d.value_heads * d.key_dim, d.value_heads * d.value_dim
    row = channels(d) * (itemsize + 4 * 4) + 3 * 4 * keys + values * (itemsize + 5 * 4)
    return tokens * row + 3 * recurrent_bytes(d)


def scoring_bytes(model: Model, context: int) -> int:
    """What logits after every token of a context take: the residuals of all, and of one piece the normed rows and the
    logits, as the head gives them and in fp32. Whoever scores them has a few rows in fp64 besides."""
    rows = min(context, SCORED_PIECE)
    looked_at = SCORED_ROWS * SCORED_COPIES * 8
    return (context * 4 + rows * 8) * model.hidden + (rows * 8 + looked_at) * model.vocab

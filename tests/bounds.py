"""How far two computations of the same numbers may lie apart: derived, so that it holds on every processor.

One rounding to nearest changes a number by at most its unit roundoff u relative to itself, and by u / sqrt(3) in the
mean square (the error is uniform). Roundings of different operations are independent of each other, so that their
squares add up: a chain of n of them moves a vector by about sqrt(n / 3) * u of its length (Higham and Mary 2019, "A new
approach to probabilistic rounding error analysis"). Norms and residual sums carry a relative error on as it is. A
router near a tie may choose otherwise, which no such bound holds for: tests of whole models take the median over
tokens.
"""

from __future__ import annotations

import math

from qmix.kernels.ops import CHUNK
from qmix.spec import Model

FP32, BF16, FP16 = 2.0**-24, 2.0**-8, 2.0**-11  # unit roundoffs

# What a layer rounds, one after the other: norm, q, k, v, weights of attention, its sum, o, norm, gate, up, their
# product, down, the sum of experts.
ACTIVATIONS_OF_A_LAYER = 13
WEIGHTS_OF_A_LAYER = 7  # q, k, v, o, gate, up, down


def chain(roundings: int, u: float) -> float:
    """Relative error, in the norm, of a result behind so many roundings of unit roundoff u."""
    return math.sqrt(roundings / 3) * u


def model_apart(layers: int, u: float = BF16) -> float:
    """Of the logits of two computations that both round every activation of a layer to u, but elsewhere."""
    return chain(2 * (ACTIVATIONS_OF_A_LAYER * layers + 1), u)


def model_rounded(layers: int, u: float = BF16) -> float:
    """Of the logits of a model whose weights and activations are rounded to u, from those of the one that is not."""
    return chain((ACTIVATIONS_OF_A_LAYER + WEIGHTS_OF_A_LAYER) * layers + 2, u)


def int8_keys_and_values(layers: int, head_dim: int) -> float:
    """Of the logits with keys and values in int8, a scale for each head's vector, from those in fp32.

    A step is the largest number of head_dim over 127; of normal numbers that is about sqrt(2 ln head_dim) of their
    standard deviation. Rounding to a step errs by step / sqrt(12) in the mean square; keys and values are two.
    """
    step = math.sqrt(2 * math.log(head_dim)) / 127
    return math.sqrt(2 * layers) * step / math.sqrt(12)


def int8_activations(layers: int, group: int) -> float:
    """Of the logits with activations of 255 steps within each `group` of columns, from those that are not rounded.

    A step is the largest number of a group over 127; of normal numbers that is about sqrt(2 ln group) of their standard
    deviation. Rounding to a step errs by step / sqrt(12) in the mean square. Four inputs of a layer's products are
    rounded so, those of q, k and v, of o, of gate and up, and of down, and the head's.
    """
    step = math.sqrt(2 * math.log(group)) / 127
    return math.sqrt(4 * layers + 1) * step / math.sqrt(12)


def fp32_model(config: Model) -> float:
    """Of the logits of two computations in fp32, at worst: in each layer one sum of the most terms that there are, all
    of whose roundings point the same way (Higham 2002, section 3.1: n terms err by n * u)."""
    return config.num_layers * max(config.hidden, config.expert_inner) * FP32


def delta_in_chunks(tokens: int, key_dim: int) -> float:
    """Of the gated delta rule in chunks (kernels/delta_rule.py) from exact arithmetic on the same rows: outputs and
    state, relative to outputs, values and states together.

    A chunk's outputs are behind two products over key_dim (of keys with keys or queries, and with the state), two over
    the chunk's tokens (the inverse and what it multiplies), and some 8 single operations. Later chunks carry a state's
    error on by factors of at most 1. Queries are divided by sqrt(key_dim), so that errors of outputs weigh no more.
    """
    chunks = -(-tokens // CHUNK)
    return chain(chunks * (2 * key_dim + 2 * min(tokens, CHUNK) + 8), FP32)

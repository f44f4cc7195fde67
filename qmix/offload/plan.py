"""What goes where, in integers, before anything is loaded.

Today one tier: every expert record resident in RAM, beside the dense weights, the KV cache and the
workspace. What does not fit is refused with the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmix.config import DTYPES, ModelConfig, QuantConfig
from qmix.errors import DoesNotFit
from qmix.names import dense_tensors
from qmix.sizes import MIB, dense_bytes, format_bytes, kv_bytes_per_token, record_layout

DEFAULT_CONTEXT = 8192
PREFILL_PASS = 8192  # tokens of one layer-major prefill pass
ATTENTION_BLOCK = 512  # query positions of one attention call


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes by purpose; context in tokens."""

    context: int
    dense: int
    experts: int
    kv: int
    workspace: int
    reserve: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.kv + self.workspace + self.reserve

    def line(self) -> str:
        """For the user; the reserve is kept free and not used."""
        return (f"RAM {format_bytes(self.total - self.reserve)}: experts {format_bytes(self.experts)} (all resident), "
                f"dense {format_bytes(self.dense)}, KV cache {format_bytes(self.kv)} for {self.context} tokens")


def choose_context(config: ModelConfig, asked: int) -> int:
    """0 asks for the default: min(model, 8192)."""
    return min(config.max_positions, DEFAULT_CONTEXT) if asked == 0 else asked


def workspace_bytes(config: ModelConfig, context: int, itemsize: int) -> int:
    """What one prefill pass holds at its widest: per token the fp32 residual, the normed states, queries,
    keys and values in fp32 and in the compute dtype, the [K, H] fp32 rows of expert outputs with their
    sum, and one expert's inner activations; once, the attention mask of a block and two rows of logits."""
    tokens = min(context, PREFILL_PASS)
    hidden, inner, k = config.hidden_size, config.intermediate_size, config.experts_per_token
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    block = min(tokens, ATTENTION_BLOCK)
    per_token = (4 + itemsize) * hidden + (k + 1) * hidden * 4 + 4 * inner * itemsize
    per_block = heads * (4 + itemsize) + context * (1 + itemsize)
    return tokens * per_token + block * per_block + config.vocab_size * 8


def plan_resident(config: ModelConfig, quant: QuantConfig, context: int, available: int) -> Plan:
    """Everything in RAM; DoesNotFit (exit 3) says how much is missing. available: bytes."""
    itemsize = 4 if quant.experts == quant.dense == "keep" and DTYPES[config.dtype] != "bf16" else 2
    dense = sum(dense_bytes(config, quant, t) for t in dense_tensors(config))
    experts = record_layout(config, quant).nbytes * len(config.expert_keys)
    reserve = max(256 * MIB, available // 50)
    plan = Plan(context, dense, experts, kv_bytes_per_token(config, itemsize) * context,
                workspace_bytes(config, context, itemsize), reserve)
    if plan.total > available:
        raise DoesNotFit(
            f"needs {format_bytes(plan.total)} of RAM, {format_bytes(available)} available, "
            f"short of {format_bytes(plan.total - available)} (experts {format_bytes(experts)}, dense "
            f"{format_bytes(dense)}, KV cache {format_bytes(plan.kv)} for {context} tokens, workspace and "
            f"reserve {format_bytes(plan.workspace + reserve)})",
            "close other programs, choose a smaller -c/--ctx-size, or quantize to fewer bits; paging experts "
            "from disk is not in this version")
    return plan

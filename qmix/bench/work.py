"""How much a repetition must move and compute at least: the numerators of the roofline.

Work is counted per pass through the model. A pass reads every dense weight once (of the embedding only single rows,
which are left out), each chosen record once, with its padding, and the keys and values of all positions it attends to.
Kernels that read something twice, and the results that they write, do not count as work; they are the reason why a
share stays below 100 %. On a device, the dense weights, the chosen records and the keys and values are in its memory,
except the records that the CPU computes: their bytes are read from RAM, and so are the bytes that are copied to the
device. Products count 2 operations a weight and token, attention 4 a head dimension and pair of positions.

L layers, K experts chosen per token, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from qmix.bench.cases import Case
from qmix.config import ModelConfig, QuantConfig
from qmix.names import dense_tensors
from qmix.offload.plan import PREFILL_PASS, Needs
from qmix.sizes import dense_bytes


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model the work depends on. dense: bytes that a pass reads of the weights every token needs; kv: bytes
    of keys and values of one position; record: bytes of an expert, which weighs `expert` weights."""

    config: ModelConfig
    dense: int
    kv: int
    record: int
    expert: int
    linear: int  # weights of attention and routers that each token is multiplied with
    head: int

    @classmethod
    def of(cls, config: ModelConfig, quant: QuantConfig, needs: Needs) -> Model:
        tensors = dense_tensors(config)
        embedding = next(t for t in tensors if t.role == "embedding")
        unread = 0 if config.tie_embeddings else dense_bytes(config, quant, embedding)
        return cls(config, needs.dense - unread, needs.kv // needs.context, needs.record,
                   3 * config.hidden_size * config.intermediate_size,
                   sum(prod(t.shape) for t in tensors if t.role in ("linear", "router")), prod(embedding.shape))

    def bytes_read(self, case: Case, chosen: int) -> int:
        """Bytes that one repetition reads from memory, of `chosen` records summed over layers and passes."""
        passes = list(_passes(case))
        positions = sum(self._seen(start) - 1 + count for start, count in passes)
        return len(passes) * self.dense + chosen * self.record + positions * self.kv

    def operations(self, case: Case) -> int:
        """Floating point operations of one repetition. Of a prompt only the last token meets the head, and the experts
        of the last layer."""
        config = self.config
        last = 1 if case.kind == "pp" else case.tokens
        chosen = ((config.num_layers - 1) * case.tokens + last) * config.experts_per_token
        pairs = sum(self._seen(position) for position in range(case.depth, case.positions))
        return (2 * (case.tokens * self.linear + chosen * self.expert + last * self.head)
                + 4 * pairs * config.num_layers * config.num_heads * config.head_dim)

    def _seen(self, position: int) -> int:
        """Positions that the token at `position` attends to, itself among them."""
        return min(position + 1, self.config.sliding_window or position + 1)


def _passes(case: Case) -> Iterator[tuple[int, int]]:
    """(first position, tokens) of each pass: a prompt's are as long as may be, a generation's one token."""
    step = PREFILL_PASS if case.kind == "pp" else 1
    for start in range(case.depth, case.positions, step):
        yield start, min(step, case.positions - start)

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
from qmix.config import QuantConfig
from qmix.kernels.kv_size import position_bytes
from qmix.offload.needs import Needs, compute_bytes
from qmix.sizes import kv_owners, pass_tokens
from qmix.spec import Attention, Model


@dataclass(frozen=True, slots=True)
class Workload:
    """What of a model the work depends on. dense: bytes that a pass reads of the weights every token needs; kv: of each
    layer's attention the bytes of keys and values of one position; record: bytes of an expert, which weighs `expert`
    weights."""

    model: Model
    dense: int
    kv: tuple[tuple[Attention, int], ...]
    record: int
    expert: int
    linear: int  # weights of attention and routers that each token is multiplied with
    head: int

    @classmethod
    def of(cls, model: Model, quant: QuantConfig, needs: Needs) -> Workload:
        tensors = model.trunk.tensors()
        embedding = next(t for t in tensors if t.role == "embedding")
        item_bytes = compute_bytes(model, quant)
        kv = tuple((a, position_bytes(a, item_bytes, needs.kv_cache)) for a in kv_owners(model))
        return cls(model, needs.dense - needs.embedding, kv, needs.record,
                   3 * model.hidden * model.expert_inner,
                   sum(prod(t.shape) for t in tensors if t.role in ("linear", "mlp", "router")), prod(embedding.shape))

    def bytes_read(self, case: Case, chosen: int) -> int:
        """Bytes that one repetition reads from memory, of `chosen` records summed over layers and passes."""
        passes = list(_passes(case, pass_tokens(self.model)))
        kv = sum(sum(_seen(a, start) - 1 + count for start, count in passes) * size for a, size in self.kv)
        return len(passes) * self.dense + chosen * self.record + kv

    def operations(self, case: Case) -> int:
        """Floating point operations of one repetition. Of a prompt only the last token meets the head, and the experts
        of the last layer."""
        model = self.model
        last = 1 if case.kind == "pp" else case.tokens
        above = model.chosen - model.chosen_in(model.num_layers - 1)
        chosen = above * case.tokens + model.chosen_in(model.num_layers - 1) * last
        heads = sum(4 * a.heads * a.head_dim * sum(_seen(a, position) for position in range(case.depth, case.positions))
                    for layer in model.layers if isinstance(a := layer.mixer, Attention))
        return 2 * (case.tokens * self.linear + chosen * self.expert + last * self.head) + heads


def _seen(attention: Attention, position: int) -> int:
    """Positions that the token at `position` attends to, itself among them."""
    return min(position + 1, attention.window or position + 1)


def _passes(case: Case, most: int) -> Iterator[tuple[int, int]]:
    """(first position, tokens) of each pass: a prompt's are as long as may be, a generation's one token."""
    step = most if case.kind == "pp" else 1
    for start in range(case.depth, case.positions, step):
        yield start, min(step, case.positions - start)

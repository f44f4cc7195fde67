"""A few tokens through their K experts, where all experts are in memory: one call of the native kernels, which look the
records up themselves.

T tokens, H hidden, F expert inner, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmix.config import ExpertKey
from qmix.formats import Packed
from qmix.kernels.cpu import FEW
from qmix.kernels.native import Native
from qmix.kernels.native import Sequence as Calls
from qmix.kernels.native.experts import ExpertTable
from qmix.kernels.native.sequence import EXPERTS
from qmix.offload.tiers import Tier
from qmix.spec import Model


class ResidentExperts:
    """The experts of `tier`, which has a slot for each. views: (w13, w2) of each slot. The records of a layer are
    entered in the table when the layer is asked for first: they are whole by then, and do not move any more."""

    def __init__(self, native: Native, tier: Tier, views: Sequence[tuple[Packed, Packed]], model: Model):
        self._native = native
        self._tier = tier
        kinds = [(w13.spec, w2.spec) for w13, w2 in views]
        self._kinds = {specs: number for number, specs in enumerate(dict.fromkeys(kinds))}
        self._kind_of_slot = [self._kinds[specs] for specs in kinds]
        firsts = [kinds.index(specs) for specs in self._kinds]
        self._experts = model.num_experts
        self._table = ExpertTable(len(model.record_layers), model.num_experts,
                                  [(tier.slots[slot], *views[slot]) for slot in firsts])
        self._entered: set[int] = set()
        pairs = FEW * model.top_k
        self._between = torch.empty(pairs, self._table.inner)
        self._rows = torch.empty(pairs, self._table.hidden)

    def job(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, out: Tensor) -> bytes:
        """Of a call of kind EXPERTS: out [T, H] fp32 = the weighted sum of the experts ids [T, K] int64 of x [T, H]
        fp32 or bf16, by topk_weights [T, K] fp32; T up to FEW, all contiguous. One at a time may run."""
        if layer not in self._entered:
            self._enter(layer)
        return self._table.job(layer, x, ids, topk_weights, self._between, self._rows, out)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The same at once -> [T, H] fp32."""
        assert len(x) <= FEW, len(x)
        x, ids, topk_weights = x.contiguous(), ids.contiguous(), topk_weights.contiguous()
        out = torch.empty(len(x), self._table.hidden)
        native = self._native
        missing = Calls(native.level, native.code, native.threads,
                        [(EXPERTS, self.job(layer, x, ids, topk_weights, out))], tokens=len(x)).run()
        assert missing is None, f"layer {layer}: a chosen expert is in no slot"
        return out

    def _enter(self, layer: int) -> None:
        for expert in range(self._experts):
            if (key := ExpertKey(layer, expert)) in self._tier:
                slot = self._tier.slot(key)
                self._table.enter(layer, expert, self._tier.slots[slot], self._kind_of_slot[slot])
        self._entered.add(layer)

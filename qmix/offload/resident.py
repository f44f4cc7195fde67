"""A few tokens through their K experts, where the records of all of these are in memory: one call of the native
kernels, which look the records up themselves.

T tokens, H hidden, F expert inner, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmix.config import ExpertKey
from qmix.formats import Packed
from qmix.kernels.cpu import FEW
from qmix.kernels.native import CallSequence, NativeProducts
from qmix.kernels.native.experts import ExpertTable
from qmix.kernels.native.sequence import EXPERTS
from qmix.offload.tiers import Tier
from qmix.spec import Model


class ResidentExperts:
    """The experts in the slots of `tier`, which says what comes and goes. views: (w13, w2) of each slot."""

    def __init__(self, native: NativeProducts, tier: Tier, views: Sequence[tuple[Packed, Packed]], model: Model):
        self._native = native
        self._tier = tier
        kinds = [(w13.spec, w2.spec) for w13, w2 in views]
        numbers = {specs: number for number, specs in enumerate(dict.fromkeys(kinds))}
        self._kind_of_slot = [numbers[specs] for specs in kinds]
        firsts = [kinds.index(specs) for specs in numbers]
        self._table = ExpertTable(len(model.paged_layers), model.num_experts,
                                  [(tier.slots[slot], *views[slot]) for slot in firsts])
        pairs = FEW * model.top_k
        self._between = torch.empty(pairs, self._table.inner)
        self._rows = torch.empty(pairs, self._table.hidden)
        self._calls: dict[int, CallSequence] = {}  # by T
        tier.follow(self._enter, self._leave)

    def job(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, out: Tensor) -> bytes:
        """Of a call of kind EXPERTS: out [T, H] fp32 = the weighted sum of the experts ids [T, K] int64 of x [T, H]
        fp32 or bf16, by topk_weights [T, K] fp32; T up to FEW, all contiguous. One at a time may run."""
        return self._table.job(layer, x, ids, topk_weights, self._between, self._rows, out)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The same at once -> [T, H] fp32."""
        tokens = len(x)
        assert tokens <= FEW, tokens
        x, ids, topk_weights = x.contiguous(), ids.contiguous(), topk_weights.contiguous()
        out = torch.empty(tokens, self._table.hidden)
        job, native, calls = self.job(layer, x, ids, topk_weights, out), self._native, self._calls.get(tokens)
        if calls is None:
            calls = CallSequence(native.level, native.code, native.threads, [(EXPERTS, job)], tokens)
            self._calls[tokens] = calls
        calls.patch(0, job)
        missing = calls.run()
        assert missing is None, f"layer {layer}: a chosen expert is in no slot"
        return out

    def _enter(self, key: ExpertKey, slot: int) -> None:
        self._table.enter(key.layer, key.expert, self._tier.slots[slot], self._kind_of_slot[slot])

    def _leave(self, key: ExpertKey) -> None:
        self._table.leave(key.layer, key.expert)

"""The experts callable that the model calls: computes each chosen expert from its record.

ResidentExperts holds every record in one pool of equal slots, filled and verified at start; nothing
is allocated per record afterwards.

T tokens, K experts per token, H hidden, E experts.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from qmix.config import ExpertKey, Step
from qmix.errors import Interrupted
from qmix.formats import Packed
from qmix.kernels.table import KernelTable
from qmix.render import Progress
from qmix.store import Store

READERS = 4  # threads that keep an NVMe disk's queue filled


class ResidentExperts:
    """Every expert of a store in RAM.

    Outputs of the K chosen experts of a token are kept apart in fp32 and summed in rank order 0..K-1,
    so that the result does not depend on the order in which experts are computed.
    """

    ahead = 0  # how many of the next layer's experts the model should guess: none, all are here

    def __init__(self, store: Store, kernels: KernelTable, verify: bool = True,
                 progress: Progress | None = None):
        self._kernels = kernels
        self._top_k = store.config.experts_per_token
        self._experts = store.config.num_experts
        self._pool = slot_pool(len(store.config.expert_keys), store.layout.nbytes)
        self._records = _fill(store, self._pool, verify, progress)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, step: Step,
                 ahead: Tensor | None = None) -> Tensor:
        """x [T, H] normed hidden states; ids [T, K] int64 and weights [T, K] fp32 from the router -> [T, H]
        fp32, as the residual is that it is added to.

        Interrupted when step.cancel is set between two experts. `ahead` is a hint for tiers that fetch;
        here everything is resident already."""
        if x.shape[0] == 1:
            return self._one_token(layer, x, ids, weights, step)
        rows = torch.empty(x.shape[0], self._top_k, x.shape[1], dtype=torch.float32)
        # One sort instead of a search per expert: the (token, rank) pairs of an expert become adjacent.
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self._experts).tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                _check(step)
                pairs = order[start:start + count]
                token, rank = pairs // self._top_k, pairs % self._top_k
                out = self._kernels.expert(x[token], *self._records[ExpertKey(layer, expert)])
                rows[token, rank] = out.float()
            start += count
        return _weighted(rows, weights)

    def _one_token(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, step: Step) -> Tensor:
        rows = torch.empty(1, self._top_k, x.shape[1], dtype=torch.float32)
        for rank, expert in enumerate(ids[0].tolist()):
            _check(step)
            rows[0, rank] = self._kernels.expert(x, *self._records[ExpertKey(layer, expert)])[0]
        return _weighted(rows, weights)


def slot_pool(slots: int, nbytes: int) -> Tensor:
    """[slots, nbytes] uint8 on 4096-aligned anonymous memory (torch.empty aligns to 64 only), with
    huge pages where the kernel gives them."""
    memory = mmap.mmap(-1, max(1, slots * nbytes))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:slots * nbytes].view(slots, nbytes)


def _fill(store: Store, pool: Tensor, verify: bool,
          progress: Progress | None) -> dict[ExpertKey, tuple[Packed, Packed]]:
    """Read every record into its slot, a few threads side by side; the first error stops the rest."""
    keys = store.config.expert_keys
    report: Callable[[int, int, str], None] = progress or (lambda done, total, label: None)
    records = {}
    with ThreadPoolExecutor(READERS, "qmix-load") as readers:
        jobs = [readers.submit(store.read_record, key, pool[i], verify) for i, key in enumerate(keys)]
        try:
            for i, (key, job) in enumerate(zip(keys, jobs, strict=True)):
                job.result()
                records[key] = store.expert(key, pool[i])
                report((i + 1) * store.layout.nbytes, pool.numel(), "")
        except BaseException:
            readers.shutdown(wait=True, cancel_futures=True)
            raise
    return records


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights[:, k] * rows[:, k], strictly in rank order; fp32 [T, H]."""
    total = rows[:, 0] * weights[:, 0, None]
    for rank in range(1, rows.shape[1]):
        total += rows[:, rank] * weights[:, rank, None]
    return total


def _check(step: Step) -> None:
    if step.cancel:
        raise Interrupted("cancelled")

"""The memory below a device's, and what is decided about its records: which the CPU computes there, which come up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qmix.config import ExpertKey
from qmix.formats import Packed
from qmix.kernels.table import KernelTable
from qmix.offload.copies import Copies
from qmix.offload.split import Split
from qmix.offload.tiers import Tier

RISING = 1  # records that come up because they are worth it, though the CPU has computed them
TRIP = 0.3e-3  # seconds of the host's own work for a record that comes up, as an H200's host had them
SHARE = 0.1  # of the host's time, that small records may take which come up because they are worth it


@dataclass(frozen=True, slots=True)
class Below:
    """The tier below, in host memory: what comes from it, and what the CPU computes of it. views: (w13, w2) of each of
    its slots; kernels: the CPU's; split: what is computed there, None for nothing."""

    tier: Tier
    copies: Copies
    views: Sequence[tuple[Packed, Packed]]
    kernels: KernelTable
    split: Split | None


def divide(missing: Sequence[ExpertKey], tier: Tier, below: Below,
           nbytes: Callable[[ExpertKey], int]) -> tuple[list[ExpertKey], list[ExpertKey]]:
    """Of what `tier` lacks: (to be copied there, to be computed by the CPU). What is on its way up while the disk still
    reads it is waited for: the CPU could not begin before it is here either."""
    if below.split is None or not missing:
        return list(missing), []

    def left(key: ExpertKey) -> int:
        """Bytes of it that have still to be copied up."""
        load = tier.load_of(key)
        return 0 if tier.ready(key) else nbytes(key) - (load.arrived if load is not None else 0)

    waited = [key for key in missing if key in tier and not below.tier.ready(key)]
    coming = sorted((key for key in missing if key in tier and key not in waited), key=left)
    free = sorted((key for key in missing if key not in tier), key=tier.cache.score, reverse=True)
    order = coming + free
    count = below.split.on_host([(left(key), nbytes(key)) for key in order], sum(map(left, waited)))
    return waited + order[:len(order) - count], order[len(order) - count:]


class Promotion:
    """Brings up, beside other work, what the CPU has computed, where it is worth more than what is in `tier`. small:
    records of which the host's own work may be the larger part."""

    def __init__(self, tier: Tier, small: bool, clock: Callable[[], float]):
        self._tier, self._small, self._clock = tier, small, clock
        self._rising: list[ExpertKey] = []
        self._rises_at = 0.0  # on the clock: when the next one may

    def consider(self, keys: Sequence[ExpertKey]) -> None:
        """The CPU has computed them: the best one may come up."""
        self._rising = [k for k in self._rising if k in self._tier and not self._tier.ready(k)]
        if len(self._rising) >= RISING or (self._small and self._clock() < self._rises_at):
            return
        best = max(keys, key=self._tier.cache.score)
        if best not in self._tier and self._tier.want(best, "warm"):
            self._rising.append(best)
            self._rises_at = self._clock() + TRIP / SHARE

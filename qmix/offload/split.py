"""Divides the experts that a layer lacks on the device: some are copied there, the CPU computes the others.

Both happen at the same time: copies one after another over the bus, products one after another on the CPU. The layer
waits for the longer of the two. The time per byte is measured all the time for both, as they run together, because both
read the same RAM. Ties go to copying: a copied record will be there next time.

The first guesses are measured while the model is loaded. Were the CPU's too low, it would never be asked to compute,
and so never be measured: after many layers in which it computed nothing, its rate is believed to be what it was then.

A record that is already being copied has only its remaining bytes to copy, but all of them to compute. The CPU computes
it if the rest would arrive later than the CPU is done; the copy continues, for later tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

MEMORY = 0.9  # of what was known, per measurement: twenty records forget a guess
UNASKED = 256  # layers in a row of which the CPU computed nothing, after which its rate is what it was at first


class Split:
    """copy_gbps, host_gbps: a first guess of what the bus and the CPU's products do, decimal GB/s of record bytes."""

    COPY, HOST = 12.0, 12.0

    def __init__(self, copy_gbps: float = COPY, host_gbps: float = HOST):
        self._copy = 1e-9 / copy_gbps  # seconds a byte
        self._host = self._host_first = 1e-9 / host_gbps
        self._unasked = 0

    @property
    def copy_gbps(self) -> float:
        return 1e-9 / self._copy

    @property
    def host_gbps(self) -> float:
        return 1e-9 / self._host

    def quickest(self, nbytes: int) -> float:
        """Seconds after which a record of so many bytes has come up or been computed, whichever is sooner."""
        return nbytes * min(self._copy, self._host)

    def copied(self, nbytes: int, seconds: float) -> None:
        """So many bytes went over the bus in so much time of its being busy."""
        if nbytes > 0 and seconds > 0:
            self._copy = MEMORY * self._copy + (1 - MEMORY) * seconds / nbytes

    def computed(self, nbytes: int, seconds: float) -> None:
        """The CPU went through records of so many bytes."""
        if nbytes > 0 and seconds > 0:
            self._host = MEMORY * self._host + (1 - MEMORY) * seconds / nbytes

    def on_host(self, missing: Sequence[tuple[int, int]], coming: int = 0) -> int:
        """missing: of each missing record (bytes that have still to be copied, bytes that the CPU would go through),
        the one most worth copying first; coming: bytes of others that are waited for in any case. How many of
        `missing`, from the end, the CPU had better compute.

        Example: a copy takes 8 ms and a product 10. Of [(half, whole), (whole, whole)] the CPU computes the last:
        max(4, 10) ms, where copying both takes 12. Of [(half, whole)] alone nothing: 4 ms. At 1 ms a product, both.

        Of records of one size it should have those with the most bytes left. Where `missing` is sorted by these, no
        other choice makes the layer wait less."""
        if self._unasked >= UNASKED:
            self._host, self._unasked = min(self._host, self._host_first), 0
        best, least = 0, float("inf")
        for count in range(len(missing) + 1):
            first = len(missing) - count
            longest = max((coming + sum(left for left, _ in missing[:first])) * self._copy,
                          sum(whole for _, whole in missing[first:]) * self._host)
            if longest < least:
                best, least = count, longest
        self._unasked = 0 if best else self._unasked + bool(missing)
        return best

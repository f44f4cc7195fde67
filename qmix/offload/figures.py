"""What a run counts: per phase, how often experts were in a slot, what was read, and where the time went."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

Report = dict[str, Any]  # what setup.Offload.report gives


@dataclass(slots=True)
class PhaseFigures:
    """Sums over the passes of one phase. Seconds of the process's clock, bytes read from the disk.

    chosen: records that passes needed (each once per layer and pass, however many tokens share it); hits: those
    whose bytes were all there when the router spoke, prefetched: of these, read ahead for it. On a device: below,
    misses that were in host memory; computed, those that the CPU computed there, in host_seconds. seconds: whole
    passes; stalled_seconds: of those, waiting for records; read_seconds: the disk was reading, stalled or beside the
    computing.
    """

    tokens: int = 0
    passes: int = 0
    chosen: int = 0
    hits: int = 0
    prefetched: int = 0
    misses: int = 0
    below: int = 0
    computed: int = 0
    host_seconds: float = 0.0
    bytes_read: int = 0
    seconds: float = 0.0
    stalled_seconds: float = 0.0
    read_seconds: float = 0.0

    def report(self) -> dict[str, Any]:
        """All of it; compute_seconds is what was not stalled, overlapped_seconds what was read meanwhile."""
        return {**asdict(self), "compute_seconds": max(0.0, self.seconds - self.stalled_seconds),
                "overlapped_seconds": max(0.0, self.read_seconds - self.stalled_seconds)}


def sentences(report: Report) -> dict[str, str]:
    """{"disk": ..., "prefetch": ...} for people; {} where nothing was fetched."""
    decode, prefill, guesses = report["decode"], report["prefill"], report["prefetcher"]
    if not sum(phase["misses"] + phase["prefetched"] for phase in (decode, prefill)):
        return {}
    found = {}
    read, seconds = decode["bytes_read"], decode["read_seconds"]
    if decode["tokens"] and read:
        found["disk"] = (
            f"{read / decode['tokens'] / 1e9:.3g} GB a token at {read / max(seconds, 1e-9) / 1e9:.2f} GB/s; "
            f"{100 * decode['stalled_seconds'] / max(decode['seconds'], 1e-9):.0f} % of the time stalled, "
            f"{100 * decode['overlapped_seconds'] / max(decode['seconds'], 1e-9):.0f} % read beside computing")
    if prefill["bytes_read"]:
        found["prompt"] = (f"{prefill['bytes_read'] / 1e9:.3g} GB read in {prefill['passes']} pass"
                           f"{'es' if prefill['passes'] != 1 else ''}, {prefill['stalled_seconds']:.2f} s stalled")
    if guesses["issued"]:
        wrong = guesses["issued"] - guesses["used"]
        found["prefetch"] = (
            f"{guesses['issued']} read ahead, {guesses['used']} wanted ({guesses['late']} late), {wrong} not, "
            f"{guesses['wasted_bytes'] / 1e9:.3g} GB wasted; recall {_percent(guesses['recall'])}, by weight "
            f"{_percent(guesses['recall_weight'])}")
    off = [str(row["layer"]) for row in guesses["layers"] if row["state"].startswith("off:")]
    if off:
        found["unguessed"] = f"for layers {', '.join(off)}: wrong too often to pay"
    return found


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.0f} %"

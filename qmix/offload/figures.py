"""What a run counts: per phase, how often experts were in a slot, what was read, and where the time went."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

Report = dict[str, Any]  # what setup.Offload.report gives


class Meter(NamedTuple):
    """Sums since the start, as of PhaseFigures. launches: pieces of work given to the device; waits: for it, by the
    host."""

    bytes_read: int
    read_seconds: float
    bytes_up: int = 0
    bytes_down: int = 0
    up_seconds: float = 0.0
    launches: int = 0
    waits: int = 0


@dataclass(slots=True)
class PhaseFigures:
    """Sums over the passes of one phase. Seconds of the process's clock, bytes read from the disk.

    chosen: records that passes needed (each once per layer and pass, however many tokens share it); hits: those
    whose bytes were all there when the router spoke, prefetched: of these, read ahead for it. On a device: below,
    misses that were in host memory; computed, those that the CPU computed there. seconds: whole passes;
    stalled_seconds: of those, waiting for records; read_seconds: the disk was reading, stalled or beside the
    computing; bytes_up, up_seconds: to the device, likewise; bytes_down: from it; host_seconds: the CPU computed.
    """

    tokens: int = 0
    passes: int = 0
    chosen: int = 0
    hits: int = 0
    prefetched: int = 0
    misses: int = 0
    below: int = 0
    computed: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    stalled_seconds: float = 0.0
    read_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    up_seconds: float = 0.0
    host_seconds: float = 0.0
    launches: int = 0
    waits: int = 0

    def add(self, since: Meter, now: Meter, seconds: float) -> None:
        """A pass that took `seconds`: what the meters gained in it."""
        self.passes += 1
        self.seconds += seconds
        for name in Meter._fields:
            gained = getattr(now, name) - getattr(since, name)
            setattr(self, name, getattr(self, name) + (min(seconds, gained) if name.endswith("seconds") else gained))

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
    if decode["launches"] and decode["tokens"]:
        found["bus"] = _bus(decode)
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
        found["unguessed"] = f"for layers {', '.join(off)}: wrong too often to help"
    return found


def _bus(decode: Report) -> str:
    """Of copies to the device and back, and of what the CPU computed."""
    tokens, up, seconds = decode["tokens"], decode["bytes_up"], max(decode["up_seconds"], 1e-9)
    return (f"{up / tokens / 1e9:.3g} GB a token to the GPU at {up / seconds / 1e9:.1f} GB/s, "
            f"{decode['bytes_down'] / tokens / 1e9:.3g} back; {decode['computed']} of {decode['misses']} experts that "
            f"were not there computed by the CPU; {decode['launches'] / tokens:.0f} launches and "
            f"{decode['waits'] / tokens:.0f} waits a token")


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.0f} %"

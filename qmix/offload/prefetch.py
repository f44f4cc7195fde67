"""Which records the coming layers will need: guesses, their probabilities, and how many were right. Pure.

There are two sources. `ahead`: the model applies the routers of the next layers to this layer's hidden state.
`transitions`: how often, in the router statistics, an expert followed those that this layer chose.
Each guess carries a probability. For `ahead` it is the share of right guesses so far, by layer, distance and rank. For
`transitions` it is the conditional frequency, or the share of its right guesses so far if that is less, because
transitions in other texts may not hold in this one. `both` takes the larger of the two.

A guess is worth a read if it is right more often than not. A right guess only reads earlier what would be read anyway;
a wrong one wastes disk time and may displace a record. So a layer whose guesses are right less than half of the time
gets none: prefetch is off there, and the figures say so. The estimates continue without reading anything, so prefetch
resumes in a layer when its guesses get better.

E experts, K chosen per token, A guesses per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qmix.config import ExpertKey
from qmix.errors import UsageError

MODES = ("auto", "ahead", "transitions", "both", "off")
PAYS = 0.5  # probability from which a guess is worth its read
MEMORY = 128  # guesses that an estimate remembers
OPENING = (0.6, 8)  # an estimate starts as though 8 guesses had been 60 % right

Transitions = Callable[[int, Iterable[int]], Sequence[float]]


class Guess(NamedTuple):
    key: ExpertKey
    probability: float


@dataclass(slots=True)
class LayerFigures:
    """Of the guesses for one layer. wanted: choices of its router that were seen with guesses made for them;
    guessed: those among them that had been guessed, weight: the same by routing weight.
    issued records were read ahead: used of them were wanted (late: not there yet by then), cancelled ones
    and those never used were wasted, with so many bytes."""

    wanted: int = 0
    guessed: int = 0
    weight: float = 0.0
    weight_guessed: float = 0.0
    issued: int = 0
    used: int = 0
    late: int = 0
    cancelled: int = 0
    wasted_bytes: int = 0


@dataclass(slots=True)
class _Estimate:
    """A share of right guesses that forgets slowly."""

    value: float = OPENING[0]
    seen: int = OPENING[1]

    def note(self, right: bool) -> None:
        self.seen = min(MEMORY, self.seen + 1)
        self.value += (right - self.value) / self.seen


@dataclass(slots=True)
class _Pending:
    """Guesses made for the layer that comes: {(distance, rank): expert}, and all that were named. Those of
    `transitions` have the distance -1."""

    made: dict[tuple[int, int], int] = field(default_factory=dict)
    named: set[int] = field(default_factory=set)


class Prefetcher:
    """mode: one of MODES; auto is `ahead`. transitions: (layer, chosen experts) -> probability of each expert
    of layer + 1; RouterStats.next_probabilities."""

    def __init__(self, mode: str, layers: int, top_k: int, transitions: Transitions | None = None):
        if mode not in MODES:
            raise UsageError(f"--prefetch {mode}: want " + ", ".join(MODES))
        self.mode = "ahead" if mode == "auto" else mode
        self.asked = mode not in ("auto", "off")  # for by name: also where it is likely not to pay
        self._top_k = top_k
        self._transitions = transitions if self.mode in ("transitions", "both") else None
        self._estimates: list[dict[tuple[int, int], _Estimate]] = [{} for _ in range(layers)]
        self._pending = [_Pending() for _ in range(layers)]
        self.figures = [LayerFigures() for _ in range(layers)]

    @property
    def off(self) -> bool:
        return self.mode == "off"

    def guess(self, layer: int, chosen: Iterable[int], ahead: Sequence[Sequence[int]]) -> list[Guess]:
        """After the router of `layer` chose `chosen`: which records to read now, likeliest and nearest first.
        ahead[d]: what the router of layer + 1 + d would choose, best first."""
        found: list[Guess] = []
        for distance, experts in enumerate(ahead if self.mode in ("ahead", "both") else ()):
            target = layer + 1 + distance
            if target < len(self.figures):
                found += self._from_ahead(target, distance, experts)
        if self._transitions is not None and layer + 1 < len(self.figures):
            found += self._from_transitions(layer, chosen)
        best: dict[ExpertKey, Guess] = {}
        for one in found:
            if one.probability >= PAYS and (one.key not in best or one.probability > best[one.key].probability):
                best[one.key] = one
        return sorted(best.values(), key=lambda g: (g.key.layer, -g.probability))

    def _from_ahead(self, layer: int, distance: int, experts: Sequence[int]) -> list[Guess]:
        estimates, pending = self._estimates[layer], self._pending[layer]
        found = []
        for rank, expert in enumerate(experts):
            at = distance, rank
            pending.made[at] = expert
            pending.named.add(expert)
            estimate = estimates.get(at)
            if estimate is None:
                estimate = estimates[at] = _Estimate()
            found.append(Guess(ExpertKey(layer, expert), estimate.value))
        return found

    def _from_transitions(self, layer: int, chosen: Iterable[int]) -> list[Guess]:
        assert self._transitions is not None
        shares = self._transitions(layer, chosen)
        likely = sorted(range(len(shares)), key=lambda e: -shares[e])[:self._top_k]
        estimates, pending = self._estimates[layer + 1], self._pending[layer + 1]
        pending.named.update(likely)
        found = []
        for rank, expert in enumerate(likely):
            if shares[expert] >= PAYS:  # others claim nothing that could be judged
                pending.made[-1, rank] = expert
                so_far = estimates.setdefault((-1, rank), _Estimate()).value
                found.append(Guess(ExpertKey(layer + 1, expert), min(shares[expert], so_far)))
        return found

    def guessed(self, layer: int) -> bool:
        """Whether there is something for `score_guesses` to judge."""
        return bool(self._pending[layer].named)

    def score_guesses(self, layer: int, chosen: Sequence[int], topk_weights: Sequence[float]) -> None:
        """What the router of `layer` really chose, all tokens of the pass, with its weights: the guesses for it
        are judged."""
        pending, figures = self._pending[layer], self.figures[layer]
        if not pending.named:
            return
        for at, expert in pending.made.items():
            self._estimates[layer][at].note(expert in chosen)
        for expert, weight in zip(chosen, topk_weights, strict=True):
            right = expert in pending.named
            figures.wanted += 1
            figures.guessed += right
            figures.weight += weight
            figures.weight_guessed += weight * right
        self._pending[layer] = _Pending()

    def pays(self, layer: int) -> bool | None:
        """Whether any kind of guess for `layer` is worth a read now; None where none was made."""
        estimates = self._estimates[layer]
        return any(e.value >= PAYS for e in estimates.values()) if estimates else None

    def report(self) -> dict[str, Any]:
        """All figures, in all and by layer; recall None where nothing was guessed."""
        rows = []
        for layer, f in enumerate(self.figures):
            rows.append({"layer": layer, "recall": _share(f.guessed, f.wanted),
                         "recall_weight": _share(f.weight_guessed, f.weight), "issued": f.issued, "used": f.used,
                         "late": f.late, "cancelled": f.cancelled, "wasted_bytes": f.wasted_bytes,
                         "state": self._state(layer)})
        total = {name: sum(getattr(f, name) for f in self.figures)
                 for name in ("issued", "used", "late", "cancelled", "wasted_bytes")}
        wanted, weight = sum(f.wanted for f in self.figures), sum(f.weight for f in self.figures)
        return {**total, "recall": _share(sum(f.guessed for f in self.figures), wanted),
                "recall_weight": _share(sum(f.weight_guessed for f in self.figures), weight), "layers": rows}

    def reset(self) -> None:
        """Start the figures anew; what was learnt stays."""
        self.figures = [LayerFigures() for _ in self.figures]

    def _state(self, layer: int) -> str:
        if self.off or (layer == 0 and self.figures[0].wanted == 0):
            return "off" if self.off else "none before it"
        return "off: its guesses are wrong too often" if self.pays(layer) is False else "on"


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None

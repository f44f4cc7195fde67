"""Passes the routing of a running model on to the figures, one pass after the other. Only counts are kept of a pass,
and the choices of the first SHOWN tokens, for the coloured text.

L layers, E experts, K chosen per token, T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from qmix.analysis.measures import Foretold, Ids, Load, Repeats, Reuse, Together

SHOWN = 1000  # tokens of a text that are kept for its coloured view

Rows = Sequence[Sequence[int]]


class LayerFigures:
    """All figures of one layer."""

    def __init__(self, experts: int, chosen: int):
        self.load = Load(experts)
        self.repeats = Repeats()
        self.together = Together(experts)
        self.reuse = Reuse(experts)
        self.foretold = Foretold(experts, chosen)


class TextFigures:
    """All layers of one text. firsts: of the first SHOWN tokens, the first choices, by token and layer."""

    def __init__(self, layers: int, experts: int, chosen: int):
        self.experts = experts
        self.chosen = chosen
        self.tokens = 0
        self.layers = [LayerFigures(experts, chosen) for _ in range(layers)]
        self.firsts: list[tuple[int, ...]] = []
        self._last: list[Ids | None] = [None] * layers

    def begin_window(self) -> None:
        """The next token follows none: it is computed from an empty context. The cache of `Reuse` stays."""
        self._last = [None] * len(self.layers)

    def add(self, ids: Sequence[Rows], ahead: Sequence[Rows | None]) -> None:
        """A pass: ids[l][t] the K choices, ahead[l][t] the guesses of layer l for the next one."""
        before: Rows | None = None
        guesses: Rows | None = None
        for layer, (figures, rows) in enumerate(zip(self.layers, ids, strict=True)):
            last = self._last[layer]
            for t, chosen in enumerate(rows):
                figures.load.note(chosen)
                figures.together.note(chosen)
                figures.reuse.note(chosen)
                if last is not None:
                    figures.repeats.note(last, chosen)
                if before is not None:
                    figures.foretold.note(before[t], chosen, None if guesses is None else guesses[t])
                last = chosen
            self._last[layer] = last
            before, guesses = rows, ahead[layer]
        room = max(0, SHOWN - len(self.firsts))
        self.firsts += zip(*([chosen[0] for chosen in rows[:room]] for rows in ids), strict=True)
        self.tokens += len(ids[0])


class Collector:
    """An offload.watch.Recorder that gives every pass to the text that is its turn."""

    guess_prompts = True

    def __init__(self) -> None:
        self.text: TextFigures | None = None
        self._ids: list[Rows] = []
        self._ahead: list[Rows | None] = []

    def drop_pass(self) -> None:
        self._ids, self._ahead = [], []

    def add(self, layer: int, ids: Rows, topk_weights: Sequence[Sequence[float]], ahead: Rows | None) -> None:
        self._ids.append(ids)
        self._ahead.append(ahead)

    def end_pass(self, phase: str, sequence: Sequence[int]) -> None:
        ids, guesses = self._ids, self._ahead
        self.drop_pass()
        if self.text is not None:
            self.text.add(ids, guesses)

"""Whether drafts of a model's multi-token-prediction head pay, from measurements, as pace.py has it for drafts from the
text. They cost something before they are checked: the head reads its layer and the output head for each id.

If its ids are right with probabilities p1, p2, ..., each given that those before it were right, then

    gain(d) = (1 + p1 + p1 p2 + ... + p1 p2 ... pd) / (ratio(1 + d) + cost(d))

is the tokens per second with d ids over those without: ratio(1 + d), what the pass takes that checks them, and cost(d),
what the head takes, both over a pass of one token. The first OPENING drafts measure. Afterwards the best d is taken, or
none if its gain is below PAYS: then the head is off, a line says so, and nothing more is computed for it. After some
thousand tokens it is measured once more, from the beginning of an answer on.
"""

from __future__ import annotations

from collections.abc import Callable

from qmix.speculation.pace import LONGEST, PAYS, Estimate, Pace

OPENING = 12  # drafts that measure, whatever they seem to gain
OPENING_IDS = 2  # ids in such a draft
REST = (4096, 65536)  # tokens for which the head is off, at first and at last


class MtpPace:
    """pace: what passes take; say: gets a line when the head is switched off for the first time."""

    def __init__(self, pace: Pace, say: Callable[[str], None] = lambda line: None):
        self._pace = pace
        self._say: Callable[[str], None] | None = say
        self._chances = [Estimate(0.6, 2, 64) for _ in range(LONGEST)]
        self._first, self._further = Estimate(0.0, 0, 16), Estimate(0.0, 0, 16)
        self._tried = 0  # drafts since the head was switched on
        self._rest, self._left = REST[0], 0
        self.on = True
        self.drafted = self.accepted = 0

    def begin(self) -> None:
        """An answer begins."""
        if not self.on and self._left <= 0:
            self.on, self._tried = True, 0

    def token(self) -> None:
        """A token was chosen."""
        self._left -= 1

    def judge(self, ahead: int, right: bool) -> None:
        """Of a draft the id number `ahead`, from 0, was right or wrong; those before it were right."""
        self._chances[ahead].note(right)
        self.accepted += right

    def took(self, ids: int, seconds: float) -> None:
        """A draft of so many ids took so long."""
        self._tried += 1
        self.drafted += ids
        if (single := self._pace.single) <= 0:
            return
        cost = seconds / single
        if ids == 1 or self._first.seen < 1:
            self._first.note(cost / ids)
        if ids > 1:
            self._further.note(max(0.0, cost - self._first.value) / (ids - 1))

    def cost(self, ids: int) -> float:
        """What the head takes for so many ids, over a pass of one token."""
        further = self._further if self._further.seen else self._first
        return self._first.value + (ids - 1) * further.value

    def gain(self, ids: int) -> float:
        """Tokens per second with drafts of so many ids over those without."""
        emitted = chance = 1.0
        for estimate in self._chances[:ids]:
            chance *= estimate.value
            emitted += chance
        return emitted / (self._pace.ratio(1 + ids) + self.cost(ids))

    def length(self, most: int) -> int:
        """How many ids to draft now, 0 to `most`."""
        most = min(most, self._pace.longest)
        if not self.on or most < 1 or self._pace.single <= 0:
            return 0
        if self._tried < OPENING:  # one id and two in turn tell what the first costs and what a further one
            return min(most, 1 + self._tried % OPENING_IDS)
        best = max(range(1, most + 1), key=self.gain)
        if self.gain(best) >= PAYS:
            self._rest = REST[0]
            return best
        if most < OPENING_IDS:  # at the end of an answer or of the context: it tells nothing
            return 0
        self.on, self._left, self._rest = False, self._rest, min(REST[1], 2 * self._rest)
        if self._say is not None:
            self._say(f"the multi-token-prediction head does not pay here and is off: {self.text()}")
            self._say = None
        return 0

    def text(self) -> str:
        """ "its first id is right 61 % of the time, and costs 0.24 of a token to draft and 0.70 to check"."""
        return (f"its first id is right {100 * self._chances[0].value:.0f} % of the time, and costs "
                f"{self.cost(1):.2f} of a token to draft and {self._pace.ratio(2) - 1:.2f} to check")

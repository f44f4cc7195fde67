"""Whether drafts of a model's multi-token-prediction head pay, from measurements, as pace.py has it for drafts from the
text. They cost something before they are checked: the head reads its layer and the output head for each id.

If its ids are right with probabilities p1, p2, ..., each given that those before it were right, then

    gain(d) = (1 + p1 + p1 p2 + ... + p1 p2 ... pd) single / (check(1 + d) + cost(d))

is the tokens per second with d ids over those without: single, the seconds of a pass of one token, check(1 + d), of the
pass that checks them, and cost(d), of the head. The first OPENING drafts measure. Afterwards the best d is taken, or
none if its gain is below PAYS: then the head is off, a line says so, and nothing more is computed for it. After some
thousand tokens it is measured once more, from the beginning of an answer on.

With the head on, every pass might have drafts, and nobody would know any longer what a pass without takes. So some
passes go without, to measure that: after every few drafts at first, then after every SPACING. The very first one is
slower than the others, and is forgotten with the second.

The head also reads prompts, and what was decoded without it, which no draft can avoid any more. Where that took more
over the last answers than the drafts saved, it is off too.
"""

from __future__ import annotations

from collections.abc import Callable

from qmix.speculation.pace import LONGEST, PAYS, Estimate, Pace

OPENING = 12  # drafts that measure, whatever they seem to gain
OPENING_IDS = 2  # ids in such a draft
OPENING_SPACING = 3  # drafts among these between two passes without any
SPACING = 32  # and later
SINGLES = 8  # such passes that are remembered
ANSWERS = 4  # after which that is asked: the first prompt of a conversation is the longest
KEPT = 0.75  # of what was saved and spent: what counts of it in the next answer
REST = (4096, 65536)  # tokens for which the head is off, at first and at last


class MtpPace:
    """pace: what passes take; say: gets a line, by `report`, when the head was switched off for the first time."""

    def __init__(self, pace: Pace, say: Callable[[str], None] = lambda line: None):
        self._pace = pace
        self._say, self._told = say, False
        self._chances = [Estimate(0.6, 2, 64) for _ in range(LONGEST)]
        self._singles = 0
        self._single = Estimate(0.0, 0, SINGLES)  # seconds, as all of these
        self._checks: dict[int, Estimate] = {}  # by tokens of the pass
        self._first, self._further = Estimate(0.0, 0, 16), Estimate(0.0, 0, 16)
        self._tried = 0  # drafts since the head was switched on
        self._since = 0  # drafts since the last pass without
        self._rest, self._left = REST[0], 0
        self._answers = 0  # begun since the head was switched on
        self._saved = self._spent = 0.0  # seconds, in the last ones
        self._line = ""  # that is to be said
        self.on = True
        self.drafted = self.accepted = 0

    def begin(self) -> None:
        """An answer begins."""
        saved = max(0.0, self._saved)
        if self.on and self._answers >= ANSWERS and self._spent > saved:
            self._switch_off(f"over the last answers it took {self._spent:.1f} s to read prompts, and its drafts saved "
                             f"{saved:.1f} s")
        elif not self.on and self._left <= 0:
            self.on, self._tried, self._answers = True, 0, 0
            self._checks.clear()  # they are old
            self._first, self._further = Estimate(0.0, 0, 16), Estimate(0.0, 0, 16)
            self._saved = self._spent = 0.0
        self._answers += 1
        self._saved, self._spent = KEPT * self._saved, KEPT * self._spent

    def token(self) -> None:
        """A token was chosen."""
        self._left -= 1

    def judge(self, ahead: int, right: bool) -> None:
        """Of a draft the id number `ahead`, from 0, was right or wrong; those before it were right."""
        self._chances[ahead].note(right)
        self.accepted += right

    def passed(self, tokens: int, seconds: float) -> None:
        """A decode pass of `tokens` tokens took so long."""
        if tokens > 1:
            self._checks.setdefault(tokens, Estimate(0.0, 0, 16)).note(seconds)
            return
        self._since = 0
        self._singles += 1
        if self._singles == 2:
            self._single = Estimate(0.0, 0, SINGLES)
        self._single.note(seconds)

    def took(self, ids: int, seconds: float) -> None:
        """A draft of so many ids took so long."""
        self._tried += 1
        self._since += 1
        self.drafted += ids
        if ids == 1 or self._first.seen < 1:
            self._first.note(seconds / ids)
        if ids > 1:
            self._further.note(max(0.0, seconds - self._first.value) / (ids - 1))
        if self._tried > OPENING:
            self._saved += (self.gain(ids) - 1) * (self.check(1 + ids) + self.cost(ids))

    def spend(self, seconds: float) -> None:
        """The head took so long to read tokens, none of them a guess."""
        self._spent += seconds

    @property
    def single_due(self) -> bool:
        """Whether the next pass is to have no drafts, to measure what it takes."""
        return self.on and self._since >= (OPENING_SPACING if self._tried <= OPENING else SPACING)

    def cost(self, ids: int) -> float:
        """Seconds that the head takes for so many ids."""
        further = self._further if self._further.seen else self._first
        return self._first.value + (ids - 1) * further.value

    def check(self, tokens: int) -> float:
        """Seconds of a pass of so many tokens; as Pace estimates it where there was none yet."""
        known = self._checks.get(tokens)
        return known.value if known else self._single.value * self._pace.ratio(tokens)

    def gain(self, ids: int) -> float:
        """Tokens per second with drafts of so many ids over those without."""
        emitted = chance = 1.0
        for estimate in self._chances[:ids]:
            chance *= estimate.value
            emitted += chance
        return emitted * self._single.value / (self.check(1 + ids) + self.cost(ids))

    def length(self, most: int) -> int:
        """How many ids to draft now, 0 to `most`."""
        most = min(most, self._pace.longest)
        if not self.on or most < 1 or self._single.value <= 0 or self.single_due:
            return 0
        if self._tried < OPENING:  # one id and two in turn tell what the first costs and what a further one
            return min(most, 1 + self._tried % OPENING_IDS)
        best = max(range(1, most + 1), key=self.gain)
        if self.gain(best) >= PAYS:
            self._rest = REST[0]
            return best
        if most < min(OPENING_IDS, self._pace.longest):  # at the end of an answer or of the context: it tells nothing
            return 0
        self._switch_off(self.text())
        return 0

    def _switch_off(self, why: str) -> None:
        self.on, self._left, self._rest = False, self._rest, min(REST[1], 2 * self._rest)
        if not self._told:
            self._told, self._line = True, f"the multi-token-prediction head does not pay here and is off: {why}"

    def report(self) -> None:
        """Say what there is to say. Asked once an answer has been shown: a line would fall into its middle."""
        if self._line:
            self._say(self._line)
            self._line = ""

    def text(self) -> str:
        """ "its first id is right 61 % of the time, and costs 0.24 of a token to draft and 0.70 to check"."""
        single = self._single.value
        return (f"its first id is right {100 * self._chances[0].value:.0f} % of the time, and costs "
                f"{self.cost(1) / single:.2f} of a token to draft and {self.check(2) / single - 1:.2f} to check")

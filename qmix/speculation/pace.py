"""Whether drafts pay, from measurements: how often they are right, and how long a pass of several tokens takes.

If the next ids of a draft are right with probabilities p1, p2, ..., each given that those before it were right, a pass
with d of them emits

    1 + p1 + p1 p2 + ... + p1 p2 ... pd     tokens (Leviathan et al. 2023, arXiv 2211.17192, section 3.1)

and takes ratio(1 + d) times as long as a pass of one token. The d with the best quotient is taken, or none if the best
is below PAYS.

Probabilities are kept by the length of the match. Learning them costs nothing: a draft that is not tried is compared
with the tokens that follow in any case. Ratios are learnt only from passes with drafts. Before the first pass of 1 + d
tokens, its ratio is estimated from the number of experts that so many tokens read, scaled like the passes seen so far.
If drafts do not pay, but would if the passes were as cheap as can be hoped, one is tried now and then, each time after
twice as many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmix.speculation.mtp import MtpPace

LONGEST = 7  # ids in a draft: with the one before them 8 tokens, what the decode kernels are made for
PAYS = 1.05  # tokens per second with a draft over those without, from which it is tried
HOPE = 0.1  # of a single pass: what a further token may cost at the least
PROBE = (64, 4096)  # tokens between two trials where drafts do not pay, at first and at last
PROBED = 2  # ids in such a trial, at most
MATCHES = (2, 3, 5, 9, 16)  # match lengths from which a chance is kept apart


@dataclass(slots=True)
class Estimate:
    """A mean that forgets slowly: of the last `memory`, opened as though `seen` had been `value`."""

    value: float
    seen: float
    memory: float

    def note(self, value: float) -> None:
        self.seen = min(self.memory, self.seen + 1)
        self.value += (value - self.value) / self.seen


class Pace:
    """What is known of drafts on this machine with this model; lives as long as the model is loaded.

    longest: ids in a draft, 0 to 7. share: experts per token over experts, K / E. mtp: the same of the model's
    multi-token-prediction head, where that drafts too.
    """

    def __init__(self, longest: int = LONGEST, share: float = 0.25):
        if not 0 <= longest <= LONGEST:
            raise ValueError(f"longest: got {longest}, want 0 to {LONGEST}")
        self.longest = longest
        # Different experts that t tokens read under even routing, over those of one.
        self._experts = [(1 - (1 - share) ** t) / share for t in range(LONGEST + 2)]
        self._scale = Estimate(1.0, 1, 8)
        self._ratios: dict[int, Estimate] = {}
        self._single = Estimate(0.0, 0, 32)
        self._chances = [Estimate(0.4, 4, 64) for _ in MATCHES]
        self._wait = PROBE[0]
        self._since = 0  # tokens since the last pass with a draft
        self.mtp: MtpPace | None = None

    @property
    def single(self) -> float:
        """Seconds that a pass of one token takes; 0 before the first."""
        return self._single.value

    def gain(self, match: int, ids: int) -> float:
        """Tokens per second with a draft of so many ids after a match of `match` over those without."""
        return self._emitted(match, ids)[ids] / self.ratio(1 + ids)

    def took(self, tokens: int, seconds: float) -> None:
        """A decode pass of `tokens` tokens took so long."""
        if self.mtp is not None:
            self.mtp.passed(tokens, seconds)
        if tokens == 1:
            self._single.note(seconds)
            self._since += 1
            return
        self._since = 0
        if self._single.value > 0:
            ratio = max(1.0, seconds / self._single.value)
            self._ratios.setdefault(tokens, Estimate(self.ratio(tokens), 1, 16)).note(ratio)
            if share := self._experts[tokens] - 1:
                self._scale.note((ratio - 1) / share)

    def judge(self, match: int, right: bool) -> None:
        """An id that was drafted after `match` equal ones was right or wrong, tried or not."""
        self._chances[_bucket(match)].note(right)

    def report(self) -> None:
        """An answer was shown: say what there is to say of drafts."""
        if self.mtp is not None:
            self.mtp.report()

    def ratio(self, tokens: int) -> float:
        """What a pass of so many tokens takes, over one of a single token."""
        known = self._ratios.get(tokens)
        return known.value if known else max(1.0, 1 + self._scale.value * (self._experts[tokens] - 1))

    def length(self, match: int, most: int) -> int:
        """How many ids of a draft to try, 0 to `most`, after a match of `match` ids."""
        most = min(most, self.longest)
        if most < 1 or self._single.seen < 1:
            return 0
        emitted = self._emitted(match, most)
        best = max(range(1, most + 1), key=lambda d: emitted[d] / self.ratio(1 + d))
        if emitted[best] >= PAYS * self.ratio(1 + best):
            self._wait = PROBE[0]
            return best if self._scale.seen > 1 else min(best, PROBED)  # the very first one is a short one
        probe = min(PROBED, most)
        if self._since >= self._wait and emitted[probe] >= PAYS * (1 + HOPE * probe):
            self._wait = min(PROBE[1], 2 * self._wait)
            self._ratios.clear()  # they are old
            return probe
        return 0

    def _emitted(self, match: int, most: int) -> Sequence[float]:
        """Tokens that a pass with 0, 1, ... `most` drafted ids emits on average."""
        found, chance = [1.0], 1.0
        for ahead in range(most):
            chance *= self._chances[_bucket(match + ahead)].value
            found.append(found[-1] + chance)
        return found


def _bucket(match: int) -> int:
    return max((i for i, least in enumerate(MATCHES) if match >= least), default=0)

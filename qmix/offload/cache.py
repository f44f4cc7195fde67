"""Which records a tier keeps: eviction policies and guarded admission. Pure: no torch, no clock, no I/O, so `qmix
replay` runs the same code on a trace.

Decode walks the layers in a cycle and uses K experts in each. So the value of a record depends on how likely its layer
chooses it in the next cycle. There are three estimates of that:

    lru       how many tokens ago it was used
    lfu       how often, each use losing half its weight in `half_life` tokens (LRFU of Lee et al. 2001,
              which has LRU and LFU as its two ends)
    static    its share in the router statistics of earlier runs

The value also depends on how soon: a record whose layer has just passed is needed a whole token later than one of the
next layer. So every layer counts tokens by its own clock, which advances when its router speaks, and if two estimates
are close, the nearer record stays (see NEAR). With `quotas` every layer keeps its share of the slots, which helps lru
if slots are few.

Prefill uses nearly every expert, which says nothing about the next token. So only its last SEED tokens enter the
histories, as if they had been decoded. They replace what earlier answers left there.

Admission. A demanded record always gets a slot. A speculative record, or one that is warmed, displaces no record of the
last `guard` decoded tokens. The exception: up to `probation` speculative records at a time may do so. These are needed
sooner than anything else, and if the guess was wrong the harm is bounded. A warmed record also displaces none that
scores higher. Prefill displaces records of the last tokens last.

Spares. A record that a faster tier also holds is a spare here, and costs nothing to drop. So a spare is evicted before
any other record. Among spares the one with the highest score goes first, because it is the surest to stay above.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import log2
from typing import Literal, Protocol

from qmix.config import ExpertKey
from qmix.errors import UsageError
from qmix.offload.ranking import Ranking, Scores

Reason = Literal["demand", "prefill", "speculative", "warm"]

SEED = 256  # tokens at the end of a prompt that count as though they had been decoded
HALF_LIFE = 32.0  # tokens; docs/cache-policy.md has the replay that chose it
NEAR = 0.6  # an estimate loses up to this share for the wait until its layer comes; by the same replay
POLICIES = ("lru", "lfu", "static")


class Policy(Scores, Protocol):
    """Estimates, from the past, how likely a record is to be wanted. Times are counted in tokens."""

    def use(self, key: ExpertKey, now: int) -> None:
        """The router chose `key` for token `now`."""


class Lru:
    """Least recently used. prior: share of tokens that chose a key in earlier runs, for keys not used yet."""

    def __init__(self, prior: Mapping[ExpertKey, float]):
        self._prior = prior
        self._last: dict[ExpertKey, int] = {}

    def use(self, key: ExpertKey, now: int) -> None:
        self._last[key] = max(now, self._last.get(key, 0))

    def rank(self, key: ExpertKey) -> float:
        # Tokens are numbered from 1, so any use outranks any share.
        return self._last[key] if key in self._last else self._prior.get(key, 0.0) - 1

    def worth(self, rank: float, now: int) -> float:
        return rank - now

    def scores(self, worths: Sequence[float], waits: Sequence[float]) -> list[float]:
        return [worth - wait for worth, wait in zip(worths, waits, strict=True)]


class Lfu:
    """Uses counted with decay. A prior share of s starts at what s uses a token would have added up to.

    Kept as the logarithm of the count that the key would have had at token 0, to which each use at token t adds
    2 ** (t / half_life): nothing has to be decayed as time goes on.
    """

    def __init__(self, prior: Mapping[ExpertKey, float], half_life: float = HALF_LIFE):
        self._half_life = half_life
        whole = 1 / (1 - 0.5 ** (1 / half_life))
        self._log = {key: log2(share * whole) for key, share in prior.items() if share > 0}

    def use(self, key: ExpertKey, now: int) -> None:
        new, old = now / self._half_life, self._log.get(key)
        if old is None:
            self._log[key] = new
        else:  # log2(2 ** old + 2 ** new), without the powers, which overflow
            high, low = (new, old) if new > old else (old, new)
            self._log[key] = high + log2(1 + 2 ** max(low - high, -100.0))

    def rank(self, key: ExpertKey) -> float:
        return self._log.get(key, -1e18)

    def worth(self, rank: float, now: int) -> float:
        return 2 ** max(rank - now / self._half_life, -1000.0)

    def scores(self, worths: Sequence[float], waits: Sequence[float]) -> list[float]:
        return _nearer(worths, waits)


class Static:
    """The share of earlier runs, whatever happens now; a key that was never seen counts for nothing."""

    def __init__(self, prior: Mapping[ExpertKey, float]):
        self._prior = prior

    def use(self, key: ExpertKey, now: int) -> None:
        pass

    def rank(self, key: ExpertKey) -> float:
        return self._prior.get(key, 0.0)

    def worth(self, rank: float, now: int) -> float:
        return rank

    def scores(self, worths: Sequence[float], waits: Sequence[float]) -> list[float]:
        return _nearer(worths, waits)


def _nearer(worths: Sequence[float], waits: Sequence[float]) -> list[float]:
    return [worth * (1 - NEAR * wait) for worth, wait in zip(worths, waits, strict=True)]


def score(policy: Policy, key: ExpertKey, now: int, wait: float) -> float:
    """Of one record; see Scores.scores."""
    return policy.scores([policy.worth(policy.rank(key), now)], [wait])[0]


def make_policy(name: str, prior: Mapping[ExpertKey, float]) -> Policy:
    """The policy of that name, "lfu:64" with that half-life; UsageError for an unknown one."""
    kind, colon, half_life = name.partition(":")
    if kind == "lfu" and colon:
        try:
            if 0 < (tokens := float(half_life)) < 1e9:
                return Lfu(prior, tokens)
        except ValueError:
            pass
        raise UsageError(f"--cache-policy {name}: want lfu:TOKENS, its half-life, a number above 0")
    found = {"lru": Lru, "lfu": Lfu, "static": Static}
    if name not in found:
        raise UsageError(f"--cache-policy {name}: want " + ", ".join(POLICIES) + ", or lfu:TOKENS")
    return found[name](prior)


def alike(key: ExpertKey) -> int:
    """The kind of a record where all have the same size."""
    return 0


def warm_order(layers: int, experts: int, slots: int | Sequence[int], prior: Mapping[ExpertKey, float],
               kind_of: Callable[[ExpertKey], int] = alike) -> list[ExpertKey]:
    """Which records fill the slots, of each kind so many, at first: each layer its share, the most frequent experts of
    it, in the order in which a first prompt meets them."""
    room = [slots] if isinstance(slots, int) else list(slots)
    ranked = [sorted((ExpertKey(layer, e) for e in range(experts)), key=lambda key: (-prior.get(key, 0.0), key))
              for layer in range(layers)]
    chosen: list[list[ExpertKey]] = [[] for _ in range(layers)]
    for rank in range(experts):
        for layer in range(layers):
            kind = kind_of(key := ranked[layer][rank])
            if room[kind]:
                room[kind] -= 1
                chosen[layer].append(key)
    return [key for keys in chosen for key in keys]


class Cache:
    """The keys in a tier of `slots` slots; in a mixed store of so many slots of each kind, where a record of
    `kind_of` can only be. The caller moves the bytes and does what it is told:

        cache.begin_token()                       each decoded token
        cache.use(key)                            the router chose it
        if key not in cache:
            leaves = cache.admit(key, "demand", busy)     frees a slot where one is needed
    """

    def __init__(self, slots: int | Sequence[int], layers: int, policy: Policy, *, quotas: bool = False,
                 guard: int = 1, probation: int = 2, kind_of: Callable[[ExpertKey], int] = alike):
        self._free = [slots] if isinstance(slots, int) else list(slots)
        if min(self._free, default=0) < 1:
            raise ValueError(f"slots: got {slots}, want >= 1")
        if quotas and len(self._free) > 1:
            raise ValueError("quotas: a layer's share may be of the wrong kind")
        self.slots = sum(self._free)
        self.kind_of = kind_of
        self._layers = layers
        self._policy = policy
        self._probation = probation
        self._held: list[dict[ExpertKey, None]] = [{} for _ in range(layers)]
        self._count = 0
        share, more = divmod(self.slots, layers)
        self._quota = [share + (i < more) for i in range(layers)] if quotas and share else None
        self._unproven: set[ExpertKey] = set()  # speculative records that nobody has used yet
        # Of each kind: all, and the spares.
        self._ranked = [Ranking(policy, layers) for _ in self._free]
        self._spares = [Ranking(policy, layers, highest=True) for _ in self._free]
        self._rankings = [*self._ranked, *self._spares]
        # What each of the last `guard` decoded tokens used.
        self._recent: deque[set[ExpertKey]] = deque([set()] if guard else (), maxlen=guard)
        self._now = 0  # tokens in the histories
        self._clocks = [0] * layers  # the last of them that each layer knows of
        self._layer = 0  # where the walk through the layers is

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._held[key.layer]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ExpertKey]:
        return (key for held in self._held for key in held)

    def begin_token(self) -> None:
        """A decode pass starts."""
        self._now += 1
        self._recent.append(set())

    def begin_prefill(self, tokens: int) -> None:
        """A prefill pass over `tokens` tokens starts."""
        self._now += min(tokens, SEED)

    def use(self, *keys: ExpertKey) -> None:
        """The router of their layer chose `keys` for the token being decoded; of several tokens each key once."""
        layer, now, use = keys[0].layer, self._now, self._policy.use
        self._layer = layer
        self._clocks[layer] = now
        for key in keys:
            use(key, now)
        for ranking in self._rankings:
            ranking.used(layer, keys)
        if self._recent:
            self._recent[-1].update(keys)
        self._unproven.difference_update(keys)

    def seed(self, layer: int, choices: Sequence[Collection[int]]) -> None:
        """What the last tokens of a prompt (at most SEED of them, oldest first) chose in `layer`."""
        self._layer = layer
        self._clocks[layer] = self._now
        first = self._now - len(choices) + 1
        for token, experts in enumerate(choices):
            for expert in experts:
                self._policy.use(ExpertKey(layer, expert), first + token)
        keys = [ExpertKey(layer, expert) for expert in set().union(*choices)]
        for ranking in self._rankings:
            ranking.used(layer, keys)
        self.end_layer(layer)

    def end_layer(self, layer: int) -> None:
        """The router of `layer` has spoken: guesses that it did not confirm are ordinary records now."""
        if self._unproven:
            self._unproven = {key for key in self._unproven if key.layer != layer}

    def score(self, key: ExpertKey) -> float:
        """What the policy makes of a record now; the one with the lowest score leaves first."""
        return score(self._policy, key, self._clocks[key.layer], self._distance(key.layer) / self._layers)

    def mark_spare(self, key: ExpertKey) -> None:
        """A faster tier holds `key` too."""
        self._spares[self.kind_of(key)].add(key)
        self._unproven.discard(key)

    def unmark_spare(self, key: ExpertKey) -> None:
        """It does not, any more."""
        self._spares[self.kind_of(key)].remove(key)

    @property
    def spares(self) -> Collection[ExpertKey]:
        """Those that leave first."""
        return [key for ranking in self._spares for key in ranking.keys]

    def admit(self, key: ExpertKey, reason: Reason, busy: Collection[ExpertKey] = ()) -> ExpertKey | bool:
        """Take `key` in. True: a slot was free. A key: it left, and its slot is the one. False: refused, since
        every record that may leave is busy (being read or computed), or, for a guess, worth more than the guess."""
        assert key not in self, key
        kind, leaves = self.kind_of(key), None
        if not self._free[kind]:
            stays = busy if isinstance(busy, set) else set(busy)
            leaves = self._spares[kind].best(self._layer, self._clocks, [stays])  # whatever the quotas
            if leaves is None:
                leaves = self._victim(key, reason, stays)
                if leaves is None or (reason == "warm" and self.score(leaves) > self.score(key)):
                    return False
            self.remove(leaves)
        self._held[key.layer][key] = None
        self._ranked[kind].add(key)
        self._free[kind] -= 1
        self._count += 1
        if reason == "speculative":
            self._unproven.add(key)
        return True if leaves is None else leaves

    def remove(self, key: ExpertKey) -> None:
        """Its slot is free: evicted, or what was to be read into it did not come."""
        kind = self.kind_of(key)
        del self._held[key.layer][key]
        self._ranked[kind].remove(key)
        self._spares[kind].remove(key)
        self._free[kind] += 1
        self._count -= 1
        self._unproven.discard(key)

    def _victim(self, key: ExpertKey, reason: Reason, busy: set[ExpertKey]) -> ExpertKey | None:
        """What leaves for `key`. Guesses leave last, they are wanted within a layer or two, and one guess
        does not displace another one."""
        recent, soon = list(self._recent), self._unproven
        spared: list[list[set[ExpertKey]]]  # tried in turn: what stays besides what is busy
        if reason == "demand":
            spared = [[soon], []]
        elif reason == "prefill":
            spared = [[soon, *recent], [soon], []]
        elif reason == "speculative" and len(self._unproven) < self._probation:
            spared = [[soon, *recent], [soon]]
        else:
            spared = [[soon, *recent]]
        ranked, layers = self._ranked[self.kind_of(key)], self._sources(key.layer)
        for stays in spared:
            leaves = ranked.best(self._layer, self._clocks, [busy, *stays], layers)
            if leaves is not None:
                return leaves
        return None

    def _sources(self, layer: int) -> list[int] | None:
        """With quotas a layer that has its share makes room itself, else those that have more than their own; None for
        all."""
        if self._quota is None:
            return None
        if len(self._held[layer]) >= self._quota[layer]:
            return [layer]
        return [i for i, (held, quota) in enumerate(zip(self._held, self._quota, strict=True)) if len(held) > quota]

    def _distance(self, layer: int) -> int:
        """Layers until the walk is there."""
        return (layer - self._layer - 1) % self._layers

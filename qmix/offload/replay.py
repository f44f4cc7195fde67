"""What a cache would have done on recorded traces: hit rates of policies and slot counts, and how well the choices of a
layer can be predicted. No torch.

The caches are the ones that run (`cache.py`), told what the engine would tell them:

    prefill   begin_prefill; then by layer seed, and every record that any token chose is admitted
    decode    begin_token; then by layer use, and what is missing is admitted, while the layer's own are busy

    hit       the record was there when its router spoke; counted in decode alone

The upper bound is Belady's optimum (1966): of the records that may leave, it evicts the one that is used again farthest
in the future. It knows the future, so no policy can beat it. After a prefill it may keep any of the records that were
there or passed through.

T tokens, L layers, K experts chosen per token, A guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmix.config import ExpertKey
from qmix.errors import UsageError
from qmix.offload.cache import SEED, Cache, Reason, make_policy, warm_order
from qmix.offload.router_stats import RouterStats
from qmix.offload.trace import Ids, Trace, TraceHeader

NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Visit:
    """One pass, as a cache sees it. wanted: by layer, the records that its tokens chose, each once; last: by layer,
    what the last SEED tokens of a prefill chose, () in decode."""

    decode: bool
    tokens: int
    wanted: tuple[tuple[ExpertKey, ...], ...]
    last: tuple[list[Ids], ...] = ()


@dataclass(slots=True)
class Tally:
    """Of the decoded tokens. chosen: records that they wanted; misses: those among them that were not there."""

    tokens: int = 0
    chosen: int = 0
    misses: int = 0

    @property
    def hit_rate(self) -> float:
        """1 where nothing was wanted."""
        return 1 - self.misses / self.chosen if self.chosen else 1.0

    def __iadd__(self, other: Tally) -> Tally:
        self.tokens += other.tokens
        self.chosen += other.chosen
        self.misses += other.misses
        return self


def check_alike(traces: Iterable[Trace]) -> TraceHeader:
    """The header of traces of one model; UsageError where they are not, or where there is no trace."""
    first = None
    for trace in traces:
        if first is None:
            first = trace
        for name in ("layers", "experts", "top_k", "store"):
            mine, theirs = getattr(first.header, name), getattr(trace.header, name)
            if mine != theirs:
                raise UsageError(f"{trace.path}: {name} {theirs}, but {first.path} has {mine}",
                                 "give traces of one model")
    if first is None:
        raise UsageError("no trace", "record one with --trace FILE")
    return first.header


def visits(trace: Trace) -> list[Visit]:
    """The passes of a trace."""
    keys = [[ExpertKey(layer, expert) for expert in range(trace.header.experts)]
            for layer in range(trace.header.layers)]
    found = []
    for one in trace.passes:
        wanted = tuple(tuple(row[expert] for expert in dict.fromkeys(ids))
                       for row, ids in zip(keys, one.ids, strict=True))
        decode = one.phase == "decode"
        last = () if decode else tuple(one.choices(layer)[-SEED:] for layer in range(len(keys)))
        found.append(Visit(decode, one.tokens, wanted, last))
    return found


def gather(traces: Iterable[Trace], layers: int, experts: int) -> RouterStats:
    """The router statistics that these runs would have left."""
    stats = RouterStats(layers, experts)
    for trace in traces:
        for one in trace.passes:
            by_layer = [one.choices(layer) for layer in range(layers)]
            for choices in zip(*by_layer, strict=True):
                stats.add_token(one.phase, choices)
    return stats


def simulate(passes: Iterable[Visit], cache: Cache) -> Tally:
    """Run a cache over them."""
    tally = Tally()
    for visit in passes:
        if visit.decode:
            _decode(visit, cache, tally)
        else:
            cache.begin_prefill(visit.tokens)
            for layer, wanted in enumerate(visit.wanted):
                cache.seed(layer, visit.last[layer])
                before: tuple[ExpertKey, ...] = ()
                for key in wanted:
                    if key not in cache:
                        _admit(cache, key, "prefill", before)
                        before = (key,)  # it is computed while the next one is read
    return tally


def _decode(visit: Visit, cache: Cache, tally: Tally) -> None:
    cache.begin_token()
    tally.tokens += visit.tokens
    for wanted in visit.wanted:
        for key in wanted:
            cache.use(key)
        missing = [key for key in wanted if key not in cache]
        tally.chosen += len(wanted)
        tally.misses += len(missing)
        for key in missing:
            if key not in cache:
                _admit(cache, key, "demand", wanted)


def _admit(cache: Cache, key: ExpertKey, reason: Reason, busy: Sequence[ExpertKey]) -> None:
    """Where all slots are busy, one of them is waited for."""
    if cache.admit(key, reason, busy) is False:
        cache.admit(key, reason)


def belady(passes: Sequence[Visit], slots: int) -> Tally:
    """The fewest misses that `slots` slots allow, knowing the future. It starts with what it likes best."""
    uses = _uses(passes)
    coming = {key: times[-1] for key, times in uses.items()}  # when it is wanted next; NEVER
    held = set(sorted(coming, key=lambda key: coming[key])[:slots])
    tally = Tally()
    for visit in passes:
        if not visit.decode:
            seen = held.union(*visit.wanted)
            held = set(sorted(seen, key=lambda key: coming.get(key, NEVER))[:slots])
            continue
        tally.tokens += visit.tokens
        for wanted in visit.wanted:
            for key in wanted:
                uses[key].pop()
                coming[key] = uses[key][-1]
            missing = [key for key in wanted if key not in held]
            tally.chosen += len(wanted)
            tally.misses += len(missing)
            for key in missing:
                if len(held) >= slots:
                    idle = held.difference(wanted) or held
                    held.remove(max(idle, key=lambda key: coming.get(key, NEVER)))
                held.add(key)
    return tally


def _uses(passes: Sequence[Visit]) -> dict[ExpertKey, list[int]]:
    """When each record is wanted in decode, last first: [NEVER, ..., first]. Times count layers."""
    uses: dict[ExpertKey, list[int]] = {}
    time = sum(len(visit.wanted) for visit in passes)
    for visit in reversed(passes):
        for wanted in reversed(visit.wanted):
            time -= 1
            for key in wanted if visit.decode else ():
                uses.setdefault(key, [NEVER]).append(time)
    return uses


def rows(tests: Sequence[Trace], trains: Sequence[Trace], slots: Sequence[int], policies: Sequence[str],
         quotas: Sequence[bool] = (False,), record: int = 0) -> list[dict[str, Any]]:
    """A row for each slot count, policy ("lru", "lfu:64", ...; then the optimum) and setting of quotas: what the tests
    would have met, one after the other, each in a cache of its own that starts warm by the statistics of `trains`.

    record: bytes of a record; 0 leaves the bytes out. With quotas of fewer than K slots a layer computes its experts in
    turn, which the optimum does not do, so those rows may fall below it. UsageError for traces of different models,
    an unknown policy, or fewer slots than a token uses in a layer.
    """
    header = check_alike([*tests, *trains])
    stats = gather(trains, header.layers, header.experts)
    prior = stats.share("decode") or stats.share("prefill")
    played = [visits(trace) for trace in tests]
    found = []
    for count in slots:
        if count < header.top_k:
            raise UsageError(f"--slots {count}: a token uses {header.top_k} experts at once",
                             f"name at least {header.top_k}")
        bound = Tally()
        for passes in played:
            bound += belady(passes, count)
        for policy in policies:
            for fixed in quotas:
                tally = Tally()
                for passes in played:
                    tally += simulate(passes, _warm(count, header, policy, fixed, prior))
                found.append(_row(count, policy, fixed, tally, bound, record))
        found.append(_row(count, "belady", False, bound, bound, record))
    return found


def _warm(slots: int, header: TraceHeader, policy: str, quotas: bool, prior: Mapping[ExpertKey, float]) -> Cache:
    cache = Cache(slots, header.layers, make_policy(policy, prior), quotas=quotas)
    for key in warm_order(header.layers, header.experts, slots, prior):
        cache.admit(key, "warm")
    return cache


def _row(slots: int, policy: str, quotas: bool, tally: Tally, bound: Tally, record: int) -> dict[str, Any]:
    """x optimum: misses, in those of the optimum."""
    per_token = tally.misses / max(1, tally.tokens)
    row = {"slots": slots, "policy": policy, "quotas": "yes" if quotas else "no", "hit %": 100 * tally.hit_rate,
           "misses/token": per_token, "x optimum": tally.misses / bound.misses if bound.misses else 1.0}
    return row | ({"MB/token": per_token * record / 1e6} if record else {})


@dataclass(slots=True)
class _Recall:
    """Of the choices of one layer, by rank, those that were guessed; and the sums of their routing weights."""

    seen: list[int]
    right: list[int]
    weight: float = 0.0
    weight_right: float = 0.0

    def note(self, chosen: Ids, topk_weights: Ids, guessed: Sequence[int]) -> None:
        for rank, (expert, weight) in enumerate(zip(chosen, topk_weights, strict=True)):
            right = expert in guessed
            self.seen[rank] += 1
            self.right[rank] += right
            self.weight += weight
            self.weight_right += weight * right

    def row(self, layer: int | str, source: str) -> dict[str, Any]:
        row = {"layer": layer, "source": source, "recall %": _percent(sum(self.right), sum(self.seen)),
               "by weight %": _percent(self.weight_right, self.weight)}
        return row | {f"choice {rank + 1} %": _percent(right, seen)
                      for rank, (right, seen) in enumerate(zip(self.right, self.seen, strict=True))}


def prediction_rows(tests: Sequence[Trace], trains: Sequence[Trace], guesses: int = 0) -> list[dict[str, Any]]:
    """How many of the choices of each layer, decoding, are among `guesses` guesses (0: K of them) made one layer
    before: by `ahead`, the next router asked early; by the transitions that `trains` have; and by both, which takes
    the guesses that were right most often there. By rank of the choice, and by routing weight. The last rows are all
    layers together. Without guesses in the traces there is no row for them.
    """
    header = check_alike([*tests, *trains])
    guesses = guesses or header.top_k
    stats = gather(trains, header.layers, header.experts)
    right = _precision(trains, header)
    recalls: dict[tuple[int | str, str], _Recall] = {}
    for before, layer, chosen, topk_weights, ahead in _steps(tests):
        shares = stats.next_probabilities(layer - 1, before)
        sources = {"transitions": _best(dict(enumerate(shares)), guesses)}
        if ahead is not None:
            sources["ahead"] = list(ahead[:guesses])
            worth = {expert: right[layer][rank] for rank, expert in enumerate(ahead)}
            sources["both"] = _best({e: max(p, worth.get(e, 0.0)) for e, p in enumerate(shares)}, guesses)
        for source, guessed in sources.items():
            for where in (layer, "all"):
                empty = _Recall([0] * header.top_k, [0] * header.top_k)
                recalls.setdefault((where, source), empty).note(chosen, topk_weights, guessed)
    order = sorted(recalls, key=lambda at: (at[0] == "all", at[0] if at[0] != "all" else 0, at[1]))
    return [recalls[at].row(*at) for at in order]


def _steps(traces: Iterable[Trace]) -> Iterator[tuple[Ids, int, Ids, Ids, Ids | None]]:
    """Of each decoded token and each layer but the first: what the layer before chose, the layer, what it chose, with
    which weights, and what `ahead` had guessed."""
    for trace in traces:
        k, a = trace.header.top_k, trace.header.ahead
        for one in trace.passes:
            for token in range(one.tokens if one.phase == "decode" else 0):
                at, near = slice(token * k, token * k + k), slice(token * a, token * a + a)
                for layer in range(1, trace.header.layers):
                    ahead = one.ahead[layer - 1]
                    yield (one.ids[layer - 1][at], layer, one.ids[layer][at], one.weights[layer][at],
                           None if ahead is None else ahead[near])


def _precision(traces: Iterable[Trace], header: TraceHeader) -> list[list[float]]:
    """How often the guess of each rank was right, by layer; a half where none was made, as often as not."""
    seen = [[2] * header.experts for _ in range(header.layers)]
    right = [[1] * header.experts for _ in range(header.layers)]
    for _, layer, chosen, _, ahead in _steps(traces):
        for rank, expert in enumerate(ahead or ()):
            seen[layer][rank] += 1
            right[layer][rank] += expert in chosen
    return [[r / s for r, s in zip(*both, strict=True)] for both in zip(right, seen, strict=True)]


def _best(worth: Mapping[int, float], count: int) -> list[int]:
    return sorted(worth, key=lambda expert: -worth[expert])[:count]


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0

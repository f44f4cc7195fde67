"""How the next token is chosen from the logits.

The steps, in the order of Hugging Face transformers:

    repetition penalty -> frequency and presence penalty -> bias -> constraint
    -> temperature -> top-k -> top-p -> min-p -> draw

Temperature 0 is greedy: after the penalty the highest logit wins, the lowest id among equals, and no random number is
used. Otherwise each token takes exactly one random number. So a seed gives the same tokens wherever the logits are the
same, and a token's draw does not depend on how many candidates an earlier token had. Everything after the constraint is
computed in float64. A Constraint says which ids may follow at all; the logits of the others become minus infinity.

V vocabulary, C candidates that are left.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from qmix.config import SamplingParams
from qmix.errors import QmixError, UsageError

# Candidates below these shares of the best one's probability are sorted only where top-p needs them.
COARSE = (1e-2, 1e-4, 0.0)


class Constraint(Protocol):
    """Which ids an answer may consist of, such as those that a grammar allows. One per answer."""

    @property
    def done(self) -> bool:
        """Whether the answer is complete, so that nothing can follow but its end."""

    def allowed(self) -> Tensor | None:
        """bool [V or less] of the next id; ids beyond are not allowed. None where all are."""

    def push(self, token_id: int) -> None:
        """The answer goes on with `token_id`, which `allowed`."""


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen ids by `penalty`, multiply negative ones (Keskar et al. 2019, CTRL,
    section 4.1, in the form that leaves the sign alone). logits [V] fp32, seen [S] int64 without
    repeats -> [V] fp32. UsageError where the penalty is so small that a logit becomes infinite."""
    if penalty == 1 or seen.numel() == 0:
        return logits
    chosen = logits[seen]
    changed = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    if not torch.isfinite(changed).all():
        raise UsageError(f"repeat_penalty: got {penalty}, which makes a logit infinite", "give one nearer to 1")
    return logits.scatter(0, seen, changed)


def constrain(logits: Tensor, allowed: Tensor) -> Tensor:
    """Minus infinity where `allowed`, bool [V or less], is false or at its end. logits [V] fp32 -> [V] fp32."""
    if not allowed.any():
        raise UsageError("nothing can follow: the grammar and this model's vocabulary have no common continuation",
                         "correct the grammar")
    full = torch.zeros(logits.numel(), dtype=torch.bool)
    count = min(logits.numel(), allowed.numel())
    full[:count] = allowed[:count]
    return logits.masked_fill(~full, -math.inf)


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """What temperature, top-k, top-p and min-p leave: ids [C] int64 and their probabilities [C] fp64,
    which sum to 1. logits [V]; temperature > 0; at least one candidate always stays.

    top-k keeps k, the lower id first among equals (logits of a 16-bit head are often equal); top-p keeps the
    smallest set of the most probable whose mass reaches p, the lower id first among equals; min-p keeps what has at
    least that share of the best's probability.
    """
    ids = torch.arange(logits.numel())
    if 0 < params.top_k < logits.numel():  # before the scaling, which keeps the order but may round
        ids = _largest(logits, params.top_k)
    scaled = logits[ids].double()
    scaled = (scaled - scaled.max()) / params.temperature  # <= 0, the best is 0 however small the temperature
    probs = torch.softmax(scaled, dim=0)
    if params.top_p < 1:
        kept = _nucleus(probs, params.top_p)
        ids, probs = ids[kept], probs[kept]
    if params.min_p > 0:
        kept = probs >= params.min_p * probs.max()
        ids, probs = ids[kept], probs[kept]
    return ids, probs / probs.sum()


def _largest(logits: Tensor, k: int) -> Tensor:
    """Ids [k] of the k largest logits [V], the lower id first among equals: [1, 3, 3, 3], 2 -> [1, 2]."""
    least = logits.topk(k).values[-1]
    above, equal = torch.nonzero(logits > least).squeeze(1), torch.nonzero(logits == least).squeeze(1)
    return torch.cat([above, equal[:k - above.numel()]]).sort().values


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Indices [C] of the smallest set whose mass reaches top_p. Sorts only as much of the upper part as
    that needs; equals are all in it or all out of it, so the result is that of a full stable sort."""
    best = probs.max()
    for share in COARSE:
        upper = torch.nonzero(probs >= share * best).squeeze(1)
        if probs[upper].sum() >= top_p:
            break
    ordered, order = probs[upper].sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    return upper[order[before < top_p]]


def draw(probs: Tensor, uniform: float) -> int:
    """The index whose share of the cumulated probabilities holds `uniform`, 0 <= uniform < 1: probs
    [0.2, 0.8] and uniform 0.3 -> 1. A probability of 0 is never drawn."""
    cumulated = probs.cumsum(0)
    index = int(torch.searchsorted(cumulated, uniform * cumulated[-1], right=True))
    return min(index, int(torch.nonzero(probs)[-1]))


class Sampler:
    """Chooses one token after the other for one answer.

    history: ids of the prompt, which the repetition penalty counts with those of the answer.
    seed: what to give as SamplingParams.seed to get the same answer again; chosen here where it was None,
    small enough to be typed. constraint: is told the ids that are chosen.
    """

    def __init__(self, params: SamplingParams, history: Iterable[int] = (), constraint: Constraint | None = None):
        self.params = params
        self._constraint = constraint
        self._counts: dict[int, int] = {}  # of the answer's ids, where a penalty counts them
        self._biased, self._biases = _pairs(params.logit_bias)
        self.seed = secrets.randbelow(2**32) if params.seed is None else params.seed
        self._generator = torch.Generator().manual_seed(self.seed)
        self._seen = dict.fromkeys(history if params.repeat_penalty != 1 else ())
        self._highest = max((*self._seen, *self._biased.tolist()), default=-1)

    def choose(self, logits: Tensor) -> int:
        """The next id, for logits [V] of any float dtype and device; it counts as seen from here on."""
        logits = check_logits(logits)
        params = self.params
        if self._highest >= logits.numel():
            raise UsageError(f"token id: got {self._highest}, the model's vocabulary has {logits.numel()}")
        logits = penalize(logits, torch.tensor(list(self._seen), dtype=torch.int64), params.repeat_penalty)
        if self._counts:
            ids, counts = _pairs(self._counts.items())
            logits = logits.index_add(0, ids, -(params.frequency_penalty * counts + params.presence_penalty))
        if self._biased.numel():
            logits = logits.index_add(0, self._biased, self._biases)
        if self._constraint is not None and (allowed := self._constraint.allowed()) is not None:
            logits = constrain(logits, allowed)
        if params.temperature == 0:
            token_id = int(logits.argmax())
        else:
            ids, probs = candidates(logits, params)
            uniform = torch.rand((), dtype=torch.float64, generator=self._generator).item()
            token_id = int(ids[draw(probs, uniform)])
        if params.repeat_penalty != 1:
            self._seen[token_id] = None
        if params.frequency_penalty or params.presence_penalty:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if self._constraint is not None:
            self._constraint.push(token_id)
        return token_id


def _pairs(pairs: Iterable[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    """ids [N] int64 and their values [N] fp32."""
    found = list(pairs)
    return (torch.tensor([token_id for token_id, _ in found], dtype=torch.int64),
            torch.tensor([value for _, value in found], dtype=torch.float32))


def check_logits(logits: Tensor) -> Tensor:
    """logits as [V] fp32 on the CPU; QmixError where one is NaN or infinite."""
    assert logits.dim() == 1 and logits.numel() > 0
    logits = logits.detach().to("cpu", torch.float32)
    if not torch.isfinite(logits).all():
        bad = int(torch.nonzero(~torch.isfinite(logits))[0])
        raise QmixError(f"the model's output is not a number: logit {bad} is {logits[bad].item()}",
                        "the store may be damaged: check it with `qmix verify --deep`")
    return logits


def logprob(logits: Tensor, token_id: int) -> float:
    """Natural logarithm of the model's own probability of token_id, before penalty, temperature and cuts.
    logits [V]."""
    logits = logits.double()
    value = (logits[token_id] - torch.logsumexp(logits, 0)).item()
    assert not math.isnan(value)
    return value


def likeliest(logits: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable ids with the natural logarithms of their probabilities, as of `logprob`; the most
    probable first, the lower id first among equals. logits [V]."""
    logits = logits.double()
    total = torch.logsumexp(logits, 0)
    ids = _largest(logits, min(count, logits.numel()))
    ordered = ids[logits[ids].sort(descending=True, stable=True).indices]
    return tuple((int(i), (logits[i] - total).item()) for i in ordered)

"""Which tokens of a pass chose which expert.

T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.offload.workspace import EXPERT_CHUNK

Piece = tuple[int, Tensor | None, Tensor]  # an expert, tokens of its own (None: the only one), their places


@dataclass(slots=True)
class Group:
    """The tokens of a pass that chose one expert (None: the one token there is), and their places among the T * K
    outputs: token * top_k + rank."""

    tokens: Tensor | None
    places: Tensor
    top_k: int

    @property
    def ranks(self) -> Tensor:
        return self.places % self.top_k

    def chunks(self) -> Iterator[tuple[Tensor | None, Tensor]]:
        """(tokens, their places), EXPERT_CHUNK at a time."""
        if self.tokens is None or len(self.tokens) <= EXPERT_CHUNK:
            yield self.tokens, self.places
        else:
            yield from zip(self.tokens.split(EXPERT_CHUNK), self.places.split(EXPERT_CHUNK), strict=True)


def groups_of(ids: Tensor, experts: int, device: torch.device) -> dict[int, Group]:
    """{expert: its tokens}, in order of rank for one token, else of expert. ids [T, K] int64 on the host; the tokens go
    to `device`, all at once."""
    top_k = ids.shape[1]
    if len(ids) == 1:
        places = torch.arange(top_k, device=device)
        return {expert: Group(None, places[rank:rank + 1], top_k) for rank, expert in enumerate(ids[0].tolist())}
    # One sort instead of a search per expert: the places of an expert become adjacent.
    flat = ids.reshape(-1)
    places = torch.argsort(flat, stable=True).to(device)
    tokens, groups, start = places // top_k, {}, 0
    for expert, count in enumerate(torch.bincount(flat, minlength=experts).tolist()):
        if count:
            groups[expert] = Group(tokens[start:start + count], places[start:start + count], top_k)
        start += count
    return groups


def pieces_of(groups: Mapping[int, Group], most: int) -> Iterator[list[Piece]]:
    """All tokens of all groups, in order, as lists of pieces with `most` tokens at most. most: EXPERT_CHUNK or more."""
    some: list[Piece] = []
    count = 0
    for expert, group in groups.items():
        for tokens, places in group.chunks():
            if count + len(places) > most:
                yield some
                some, count = [], 0
            some.append((expert, tokens, places))
            count += len(places)
    if some:
        yield some

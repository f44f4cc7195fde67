"""The gated delta rule in chunks beside the same one token by token in float64."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from bounds import delta_in_chunks
from torch import Tensor

from qmix.kernels.delta_rule import CHUNK, Rows, chunked, stepwise, unit

HEADS, EACH, KEY, VALUE = 2, 3, 12, 10


def rows_of(tokens: int, kind: str) -> Rows:
    random = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    k, q, v = unit(randn(tokens, HEADS, KEY)), unit(randn(tokens, HEADS, KEY)) * KEY**-0.5, randn(
        tokens, HEADS * EACH, VALUE)
    beta, log_decay = torch.sigmoid(2 * randn(tokens, HEADS * EACH)), -torch.exp(3 * randn(tokens, HEADS * EACH) - 2)
    if kind == "alike":  # every key nearly the same, nothing forgotten: each token overwrites the last one's value
        k, beta, log_decay = unit(k[:1] + 1e-3 * k), 1 - 1e-4 * beta, 1e-6 * log_decay
    if kind == "forgetful":  # from one token to the next, or altogether
        log_decay *= 1e4
        log_decay[::7] = -torch.inf
    return Rows(q, k, v, log_decay, beta)


def in_float64(rows: Rows, state: Tensor) -> tuple[Tensor, Tensor]:
    wide = Rows(*(getattr(rows, field.name).double() for field in fields(Rows)))
    return stepwise(wide, wide.log_decay.exp(), state.double())


@pytest.mark.parametrize("kind", ["random", "alike", "forgetful"])
@pytest.mark.parametrize("tokens", [9, CHUNK, CHUNK + 1, 4 * CHUNK + 30])
def test_chunks_are_the_rule_token_by_token(tokens: int, kind: str) -> None:
    rows = rows_of(tokens, kind)
    state = torch.randn(HEADS * EACH, KEY, VALUE, generator=torch.Generator().manual_seed(5))
    found, want = chunked(rows, state), in_float64(rows, state)
    size = torch.cat([x.double().flatten() for x in (*want, rows.v, state)]).norm()
    error = torch.cat([(one - other).flatten() for one, other in zip(found, want, strict=True)]).norm()
    assert found[0].isfinite().all() and error < delta_in_chunks(tokens, KEY) * size


def test_calls_that_meet_between_chunks_give_the_bits_of_one() -> None:
    rows = rows_of(3 * CHUNK + 5, "random")
    state = torch.zeros(HEADS * EACH, KEY, VALUE)
    whole, after = chunked(rows, state)
    parts = []
    for part in (slice(0, CHUNK), slice(CHUNK, 3 * CHUNK), slice(3 * CHUNK, None)):
        out, state = chunked(rows[part], state)
        parts.append(out)
    assert torch.equal(torch.cat(parts), whole) and torch.equal(state, after)

"""Sessions of models with recurrent states: what takes them back, and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward_models import plain_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_forward_eager import ATTENTION, DELTA, MOE, NORM, random_weights
from torch import Tensor

from qmix.config import Step
from qmix.forward import passes, run_eager
from qmix.forward.kv_cache import SessionCache
from qmix.forward.recurrent import RecurrentLayer
from qmix.forward.run_eager import Eager
from qmix.forward.snapshots import TAIL, Snapshot, Snapshots
from qmix.kernels.kv_size import SNAPSHOTS, kv_bytes, recurrent_bytes
from qmix.kernels.op import FEW
from qmix.kernels.torch_ops import PlainWeights
from qmix.spec import Layer, Model, Norms

SPEC = Model("test", 32, 96, 512, tuple(Layer(mixer, MOE, Norms(NORM, NORM)) for mixer in (DELTA, ATTENTION, DELTA)),
             NORM, "float32")
CAPACITY = 160
Pass = tuple[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def model() -> Eager:
    w = PlainWeights(random_weights(SPEC), torch.float32)
    return Eager(SPEC, w, plain_experts(SPEC, w))


def run(model: Eager, cache: SessionCache, done: Pass) -> Tensor:
    kind, ids = done
    if kind == "back":
        cache.rewind(ids[0])
        return torch.empty(0)
    return model.forward(torch.tensor(ids), [cache], Step("prefill" if kind == "prompt" else "decode"), True)


def states(cache: SessionCache) -> list[Tensor]:
    return [tensor for layer in cache.layers if isinstance(layer, RecurrentLayer) for tensor in layer.save(False)]


token = st.integers(0, 95)
steps = st.one_of(
    st.tuples(st.just("prompt"), st.lists(token, min_size=1, max_size=50)),
    st.tuples(st.just("decode"), st.lists(token, min_size=1, max_size=1)),
    st.tuples(st.integers(1, FEW), st.lists(token, min_size=2, max_size=FEW)),  # a pass with drafts: how many stay
    st.tuples(st.just("back"), st.floats(0, 1)))


@settings(max_examples=40, deadline=None)
@given(st.lists(steps, min_size=2, max_size=9))
def test_whatever_a_session_did_it_goes_on_as_a_fresh_one(model: Eager, taken: list[tuple[Any, Any]]) -> None:
    """To the bit. A fresh session runs what is left: drafts that stayed one by one; a prompt that was cut within at the
    mark, whole, and then goes back."""
    cache = model.new_cache(CAPACITY)
    left: list[tuple[int, Pass]] = []  # (length before it, pass)
    for kind, what in taken:
        before = cache.length
        if kind == "back":
            wanted = round(what * before)
            reached = cache.reachable(wanted)
            assert cache.rewind(wanted) == reached == cache.length <= wanted
            left = [(start, done) for start, done in left if start < reached]
            if reached and left[-1][0] + len(left[-1][1][1]) > reached:
                assert left[-1][1][0] == "prompt"
                left.append((reached, ("back", (reached,))))
        elif before + len(what) <= CAPACITY:
            run(model, cache, ("decode" if isinstance(kind, int) else kind, tuple(what)))
            if isinstance(kind, int):
                what = what[:kind]
                assert cache.rewind(before + len(what)) == before + len(what)
                left += [(before + at, ("decode", (one,))) for at, one in enumerate(what)]
            else:
                left.append((before, (kind, tuple(what))))
    fresh = model.new_cache(CAPACITY)
    for _, done in left:
        run(model, fresh, done)
    assert fresh.length == cache.length
    assert all(map(torch.equal, states(cache), states(fresh)))
    if cache.length < CAPACITY:
        assert torch.equal(*(run(model, one, ("decode", (7,))) for one in (cache, fresh)))


def test_a_mark_within_a_prompt_is_the_state_of_its_tokens(model: Eager) -> None:
    """Of a prompt of several blocks too. The products of a longer prompt have other last bits."""
    ids = tuple(torch.randint(0, 96, (90,), generator=torch.Generator().manual_seed(2)).tolist())
    with pytest.MonkeyPatch.context() as patch:
        for module in (run_eager, passes):
            patch.setattr(module, "BLOCK", 32)
        cache, short = model.new_cache(CAPACITY), model.new_cache(CAPACITY)
        run(model, cache, ("prompt", ids))
        run(model, short, ("prompt", ids[:90 - TAIL]))
    assert cache.rewind(89) == 90 - TAIL
    for one, other in zip(states(cache), states(short), strict=True):
        assert (one - other).norm() < 1e-5 * other.norm() > 0


def test_places_to_go_back_to(model: Eager) -> None:
    """The beginning of each prompt and TAIL before its end, within the last pass of a few tokens anywhere, and 0."""
    cache = model.new_cache(CAPACITY)
    for size in (30, 1, 1, 40):  # up to 72
        run(model, cache, ("prompt" if size > 1 else "decode", (5,) * size))
    assert [cache.reachable(at) for at in (13, 14, 31, 32, 55, 56, 71, 72)] == [0, 14, 14, 32, 32, 56, 56, 72]
    run(model, cache, ("decode", (5,) * 4))
    assert [cache.reachable(at) for at in range(71, 77)] == [56, 72, 73, 74, 75, 76]
    assert cache.rewind(74) == 74 and cache.rewind(73) == 73
    assert cache.reachable(72) == 72 and cache.reachable(71) == 56
    run(model, cache, ("decode", (5,)))
    assert cache.reachable(73) == 56


def test_a_pass_that_fails_keeps_every_place(model: Eager, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.new_cache(CAPACITY)
    run(model, cache, ("prompt", (5,) * 30))
    before = [x.clone() for x in states(cache)]
    monkeypatch.setattr(model, "experts", lambda *_: 1 / 0)
    for size in (4, 40):
        with pytest.raises(ZeroDivisionError):
            run(model, cache, ("decode" if size < FEW else "prompt", (5,) * size))
        assert cache.length == 30 and all(map(torch.equal, states(cache), before))
        assert cache.reachable(29) == 14 and not cache.can_trim(29)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_few_snapshots_are_kept_and_those_that_save_most(sizes: list[int]) -> None:
    kept, length = Snapshots(), 0
    for size in sizes:
        begin, marks = length, kept.prepare(Snapshot(length, 0, ()), size)
        length += size
        assert marks == ((length - TAIL,) if size > TAIL else ())
        for mark in marks:
            kept.add(Snapshot(mark, 0, ()))
        places = {kept.best(at) for at in range(length + 1)}
        assert len(places) <= SNAPSHOTS + 1 and {begin, *marks} <= places  # 0 needs none
    kept.cut(length // 2)
    assert kept.best(length) <= length // 2


def test_a_long_beginning_stays() -> None:
    """Going back to 5000 instead of 5016 costs 16 tokens; without 5000, 4960."""
    kept = Snapshots()
    for length, count in ((40, 4976), (5016, 400), (5416, 100)):
        for mark in kept.prepare(Snapshot(length, 0, ()), count):
            kept.add(Snapshot(mark, 0, ()))
    assert [length for length in range(6000) if kept.best(length) == length] == [0, 5000, 5400, 5416, 5500]


def test_the_plan_counts_them(model: Eager) -> None:
    """All that is kept, and all that a view would keep alive."""
    cache = model.new_cache(CAPACITY)
    for done in (("prompt", (5,) * 60), ("decode", (5,) * 3), ("prompt", (5,) * 40), ("prompt", (5,) * 40)):
        run(model, cache, done)
    kept = [*states(cache), *(x for one in cache._snapshots._snapshots for layer in one.layers for x in layer)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert len(storages) == 2 * 2 * (1 + SNAPSHOTS)
    assert sum(storages.values()) <= 2 * (SNAPSHOTS + 2) * recurrent_bytes(DELTA)
    assert cache.nbytes == kv_bytes(SPEC, CAPACITY, 4)
    state = DELTA.value_heads * DELTA.key_dim * DELTA.value_dim + 3 * (2 * 2 * 8 + 4 * 8)
    keys = 2 * 2 * 8 * CAPACITY * 4
    assert kv_bytes(SPEC, CAPACITY, 4) - keys >= 2 * (SNAPSHOTS + 2) * state * 4

"""The choice of formats: against trying everything, and what it promises of bytes and kinds."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from mixtrals import mixtral

from qmix.config import ExpertKey, QuantConfig
from qmix.quantize.mix import FORMATS, MOST_KINDS, choose
from qmix.sizes import record_layouts

NAMES = ("a", "b", "c")
KINDS = [(x, y) for x in NAMES for y in NAMES]


def problem(seed: int, experts: int) -> tuple[dict, dict]:
    """Random sizes, and damages that fall, not always evenly, as bytes grow."""
    dice = random.Random(seed)
    of = {name: 10 * (i + 1) + dice.randrange(6) for i, name in enumerate(NAMES)}
    sizes = {kind: 2 * of[kind[0]] + of[kind[1]] for kind in KINDS}
    damages = {ExpertKey(0, e): {m: {name: dice.random() * 4 ** -i for i, name in enumerate(NAMES)}
                                 for m in ("w13", "w2")} for e in range(experts)}
    return damages, sizes


def damage_of(damages: dict, key: ExpertKey, kind: tuple[str, str]) -> float:
    return damages[key]["w13"][kind[0]] + damages[key]["w2"][kind[1]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.floats(0.9, 3.5))
def test_within_a_record_of_the_best_of_all(seed: int, experts: int, share: float) -> None:
    """Greedy leaves less than one record's room unused: with that much less room the very best is no better."""
    damages, sizes = problem(seed, experts)
    room = int(share * experts * min(sizes.values()))
    found = choose(damages, sizes, room, most=9)
    if room < experts * min(sizes.values()):
        assert found is None
        return
    assert found is not None and found.nbytes == sum(sizes[kind] for kind in found.of.values()) <= room
    total = sum(damage_of(damages, key, kind) for key, kind in found.of.items())
    assert abs(total - found.damage) < 1e-9

    def best(room: int) -> float:
        every = itertools.product(KINDS, repeat=experts)
        return min((sum(map(damage_of, itertools.repeat(damages), damages, kinds)) for kinds in every
                    if sum(map(sizes.__getitem__, kinds)) <= room), default=float("inf"))

    assert best(room) - 1e-9 <= total <= best(room - max(sizes.values()) + min(sizes.values())) + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(1.0, 2.2), st.integers(1, 5))
def test_few_kinds_within_the_room(seed: int, share: float, most: int) -> None:
    damages, sizes = problem(seed, 20)
    room = int(share * 20 * min(sizes.values()))
    found = choose(damages, sizes, room, most)
    assert found is not None and len(found.kinds) <= most and found.nbytes <= room
    assert set(found.of.values()) == set(found.kinds)
    free = choose(damages, sizes, room + max(sizes.values()), 9)  # a record's room may be left over
    assert free is not None and free.damage <= found.damage + 1e-9


def test_what_is_used_often_gets_the_bits() -> None:
    """Two experts alike but for how much their errors weigh."""
    config = mixtral(64, 256, 512, 1, 4, 2, 64, 2, 1, 1e4, 1e-5, 64)
    kinds = tuple((a, b) for a in FORMATS for b in FORMATS)
    sizes = {kind: record_layouts(config, QuantConfig("mixed", kinds=(kind,), mix=("00",)))[0].nbytes
             for kind in kinds}
    base = {name: 4.0 ** -float(name[3]) * int(name[5:]) / 64 for name in FORMATS}
    damages = {ExpertKey(0, e): {m: {n: d * weight for n, d in base.items()} for m in ("w13", "w2")}
               for e, weight in enumerate((1.0, 100.0))}
    room = 2 * sizes["int3g64", "int3g64"]
    found = choose(damages, sizes, room)
    assert found is not None and sizes[found.of[ExpertKey(0, 1)]] > sizes[found.of[ExpertKey(0, 0)]]
    uniform = sum(damage_of(damages, key, ("int3g64", "int3g64")) for key in damages)
    assert found.damage < 0.7 * uniform and len(found.kinds) <= MOST_KINDS
    quant = QuantConfig("mixed", kinds=found.kinds, mix=found.lines(config))
    assert [quant.kinds[quant.kind_of(key)] for key in config.expert_keys] == [found.of[k] for k in damages]

"""The parts of `qmix eval`: windows as Hugging Face cuts them, divergence as its definition says, the tally, what
scoring takes of memory, and the journal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import UNQUANTIZED
from hypothesis import given
from hypothesis import strategies as st
from test_plan import MIXTRAL

from qmix.config import QuantConfig
from qmix.errors import DoesNotFit, QmixError, UsageError
from qmix.evaluate.journal import Journal
from qmix.evaluate.memory import share, taken
from qmix.evaluate.score import Scores, continuations, score
from qmix.evaluate.tally import EDGES, Tally
from qmix.evaluate.windows import Window, split_windows
from qmix.offload.needs import Needs
from qmix.offload.plan import RESERVE, plan
from qmix.offload.workspace import SCORED_PIECE

MIB = 2**20


# --- windows ---

def huggingface_losses(ids: int, window: int, stride: int) -> list[tuple[int, list[int]]]:
    """(begin, scored ids) of the loop in transformers' "Perplexity of fixed-length models", labels shifted as its
    models do: of the labelled ids, all that have one before them in the window."""
    found, before = [], 0
    for begin in range(0, ids, stride):
        end = min(begin + window, ids)
        labelled = range(end - (end - before), end)
        found.append((begin, [i for i in labelled if i > begin]))
        before = end
        if end == ids:
            break
    return [(begin, scored) for begin, scored in found if scored]


@given(st.integers(2, 300), st.integers(2, 80), st.data())
def test_windows_are_those_of_huggingface(ids: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    found = split_windows(ids, window, stride)
    assert [(w.begin, list(range(w.first, w.end))) for w in found] == huggingface_losses(ids, window, stride)
    assert all(w.end - w.begin <= window for w in found)
    if stride < window:
        assert [i for w in found for i in range(w.first, w.end)] == list(range(1, ids))
    most = data.draw(st.integers(1, 300))
    limited = split_windows(ids, window, stride, most)
    flat = [[i for w in ws for i in range(w.first, w.end)] for ws in (limited, found)]
    assert flat[0] == flat[1][:most]
    assert all(w.scored > 0 for w in limited)


def test_windows_of_the_docstring() -> None:
    assert split_windows(10, 4, 4) == [Window(0, 1, 4), Window(4, 5, 8), Window(8, 9, 10)]
    assert split_windows(10, 4, 2)[:3] == [Window(0, 1, 4), Window(2, 4, 6), Window(4, 6, 8)]
    assert split_windows(10, 4, 4, most=5)[-1] == Window(4, 5, 7)


@pytest.mark.parametrize(("args", "names"), [
    ((10, 1, 1), "--ctx-size 1"), ((10, 4, 5), "--stride 5"), ((10, 4, 0), "--stride 0"), ((1, 4, 4), "1 token:"),
    ((0, 4, 4), "0 tokens"), ((10, 4, 4, 0), "--max-tokens 0"), ((10, 4, 4, -2), "--max-tokens -2")])
def test_windows_that_make_no_sense(args: tuple[int, ...], names: str) -> None:
    with pytest.raises(UsageError, match=names):
        split_windows(*args)


# --- scores ---

def random_logits(rows: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, 50, generator=torch.Generator().manual_seed(seed)) * spread


def test_scores_are_their_definitions() -> None:
    ours, theirs = random_logits(53, 1), random_logits(53, 1) + 0.1 * random_logits(53, 2)
    targets = torch.arange(53) % 50
    found = score(iter(ours.split(20)), targets, iter(theirs.split(20)))
    for row in range(53):
        q, p = ([math.exp(v) for v in logits[row].double().tolist()] for logits in (ours, theirs))
        q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
        assert found.loss[row] == pytest.approx(-math.log(q[targets[row]]), rel=1e-6)
        assert found.reference_loss[row] == pytest.approx(-math.log(p[targets[row]]), rel=1e-6)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found.kl[row] == pytest.approx(kl, rel=1e-5)
        assert found.agree[row] == (max(range(50), key=q.__getitem__) == max(range(50), key=p.__getitem__))
    alone = score(iter([ours]), targets)
    assert torch.equal(alone.loss, found.loss) and len(alone.kl) == 0


def test_likelihoods_of_continuations() -> None:
    logits = random_logits(37, 3)
    best = logits.argmax(1)
    other = (best + 1) % 50
    targets = torch.stack([best, other, torch.where(torch.arange(37) == 36, other, best)], 1)
    likely, greedy = continuations(iter(logits.split(30)), targets)
    want = logits.double().log_softmax(1).gather(1, targets).sum(0)
    assert torch.allclose(likely, want, rtol=1e-12)
    assert greedy.tolist() == [True, False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["the model", "the reference"])
def test_what_is_not_a_number_is_an_error(bad: float, whose: str) -> None:
    ours, theirs = random_logits(9, 1), random_logits(9, 2)
    (ours if whose == "the model" else theirs)[7, 3] = bad
    with pytest.raises(QmixError, match=whose):
        score(iter([ours]), torch.zeros(9, dtype=torch.int64), iter([theirs]))


def test_the_tally_adds_up() -> None:
    windows = split_windows(3000, 1200, 700)
    size = sum(w.scored for w in windows)
    values = torch.rand(4, size, generator=torch.Generator().manual_seed(5))
    tally, done = Tally(windows, compared=True), 0
    for w in windows:
        tally.add(w, Scores(*values[:, done:done + w.scored]))
        done += w.scored
    found = tally.results()
    loss, reference, kl, agree = values.double().tolist()
    assert found["perplexity"] == pytest.approx(math.exp(sum(loss) / size)) == tally.perplexity
    assert found["reference_perplexity"] == pytest.approx(math.exp(sum(reference) / size))
    assert found["top1"] == pytest.approx(sum(agree) / size)
    assert sum(v <= found["kl_p99"] for v in kl) == math.ceil(0.99 * size)
    places = [i - w.begin for w in windows for i in range(w.first, w.end)]
    for row in found["positions"]:
        inside = [i for i, place in enumerate(places) if row["first"] <= place <= row["last"]]
        assert row["first"] in EDGES and row["tokens"] == len(inside)
        assert row["kl_mean"] == pytest.approx(sum(kl[i] for i in inside) / len(inside))
    assert sum(row["tokens"] for row in found["positions"]) == size


# --- memory ---

def test_what_scoring_takes_is_in_the_plan() -> None:
    for context in (100, 4096):
        more = (Needs.of(MIXTRAL, UNQUANTIZED, context, scoring=True).workspace -
                Needs.of(MIXTRAL, UNQUANTIZED, context).workspace)
        rows = min(context, SCORED_PIECE)
        # a piece as bf16 and as fp32, and every token's residual
        assert more > rows * MIXTRAL.vocab * (2 + 4) + context * MIXTRAL.hidden * 4
        assert more < 400 * MIB


@given(st.integers(0, 120 * 2**30), st.integers(0, 2**29), st.sampled_from([256, 4096]))
def test_two_models_fit_where_one_budget_says_so(budget: int, base: int, context: int) -> None:
    first, second = (Needs.of(MIXTRAL, quant, context, scoring=True) for quant in (UNQUANTIZED, QuantConfig()))
    least = sum(n.dense + n.kv + n.workspace + n.least_slots * n.record for n in (first, second))
    try:
        granted = share(first, second, budget, base)
    except DoesNotFit:
        assert budget < base + max(RESERVE, budget // 50) + least
        return
    reference = plan(first, granted, base)
    model = plan(second, budget, taken(reference.ram))
    assert model.ram.total <= budget
    assert model.ram.total >= base + first.dense + second.dense + reference.ram.experts + model.ram.experts
    if not (reference.resident and model.resident):
        room = budget - model.ram.total
        assert room < max(first.record, second.record) + 2 * MIB + budget // 1000  # nothing lies idle
        if min(reference.slots, model.slots) > 64:
            assert reference.slots == pytest.approx(model.slots, rel=0.2)


# --- the journal ---

def some_scores(sizes: list[int], compared: bool = True) -> list[Scores]:
    random = torch.Generator().manual_seed(1)
    return [Scores(*(torch.rand(n if compared or c == 0 else 0, generator=random) for c in range(4))) for n in sizes]


def opened(folder: Path, arguments: dict[str, Any], sizes: list[int], fresh: bool = False) -> Journal:
    return Journal.open(folder, arguments, sizes, fresh=fresh, say=lambda line: pytest.fail(line))


@pytest.mark.parametrize("compared", [True, False])
def test_a_journal_remembers_what_is_whole(tmp_path: Path, compared: bool) -> None:
    sizes = [7, 7, 3]
    scores = some_scores(sizes, compared)
    with opened(tmp_path, {"a": 1}, sizes) as journal:
        assert journal.done == []
        for one in scores:
            journal.append(one)
        path = journal.path
    data = path.read_bytes()
    record = (len(data) - data.index(b"\n") - 1 - 48) // 4 // 17  # columns of 17 numbers, 3 heads and sums of 16 bytes
    assert record == (4 if compared else 1)

    def kept(data: bytes) -> int:
        """How many windows are known, each as it was; and the file ends behind them."""
        path.write_bytes(data)
        with opened(tmp_path, {"a": 1}, sizes) as journal:
            for got, want in zip(journal.done, scores, strict=False):
                assert all(torch.equal(g, w) for g, w in zip(got.columns, want.columns, strict=True))
            for one in scores[len(journal.done):]:
                journal.append(one)
            found = len(journal.done)
        assert path.read_bytes() == whole
        return found

    whole = data
    assert kept(data) == 3
    assert [kept(data[:-n]) for n in (1, 8, 12)] == [2, 2, 2]
    assert kept(data[:data.index(b"\n") + 1]) == 0
    assert kept(data[:20]) == 0
    assert kept(data + b"torn") == 3
    middle = data.index(b"\n") + 20
    assert kept(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]) == 0
    with opened(tmp_path, {"a": 2}, sizes) as journal:
        assert journal.done == [] and journal.path != path
        with pytest.raises(UsageError, match="another process"):
            opened(tmp_path, {"a": 2}, sizes)
    with opened(tmp_path, {"a": 1}, sizes, fresh=True) as journal:
        assert journal.done == []

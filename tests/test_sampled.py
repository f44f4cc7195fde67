"""Sensitivities on a sample: against the full measure where all is sampled, and within their own noise where not."""

from __future__ import annotations

import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import write_tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from qmix import demo
from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.quantize import extent, sampled
from qmix.quantize.calibration import Calibration
from qmix.quantize.extent import Extent, interpolated, sampled_rows, spread
from qmix.quantize.fit import Wanted, bits_of, mixed, sensitivity
from qmix.quantize.mix import FORMATS, Choice
from qmix.quantize.progress_file import ProgressFile
from qmix.quantize.sampled import measure_sampled, rounded
from qmix.quantize.sensitivity import Sensitivity, measure
from qmix.tokenizer import load

LAYERS, EXPERTS = 3, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("sampled") / "tiny", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def text() -> Calibration:
    return Calibration(torch.randint(0, 128, (9, 40), generator=torch.Generator().manual_seed(3)))


def sampled_by(source: Path, text: Calibration, threads: int, method: str = "rtn") -> Sensitivity:
    torch.set_num_threads(1)
    with Checkpoint.open(source) as checkpoint, ThreadPoolExecutor(threads) as pool:
        return measure_sampled(checkpoint, text, method, 32, pool)


def test_where_all_rows_and_tokens_are_taken_w2_is_measured_as_in_full(source: Path, text: Calibration,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion, within a layer: the two divide by the damage of different perturbations."""
    for module, name, value in ((extent, "ONE_IN", 1), (extent, "SHARE", 10**6), (sampled, "ROWS", 10**6)):
        monkeypatch.setattr(module, name, value)
    found = sampled_by(source, text, 2)
    with Checkpoint.open(source) as checkpoint, ThreadPoolExecutor(2) as pool:
        want = measure(checkpoint, text, "rtn", 32, pool)
    assert found.tokens == want.tokens
    for layer in range(LAYERS):
        ratios = [found.damages[key]["w2"][name] / want.damages[key]["w2"][name]
                  for key in found.damages if key.layer == layer for name in FORMATS]
        assert max(ratios) == pytest.approx(min(ratios), rel=1e-3)  # differences of fp32 products, as test_sensitivity
        assert 0.2 < found.layers[layer] / want.layers[layer] < 5  # int3 both, one rounded between extremes, the other
        # with zero points in bf16


def test_no_bit_depends_on_threads_or_on_an_interruption(source: Path, text: Calibration, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "TOGETHER", 1)  # so small a model is tried in one piece, behind its last layer
    whole = sampled_by(source, text, 1)
    assert sampled_by(source, text, 2) == whole
    said: list[str] = []
    file = ProgressFile(tmp_path / "there" / "x.partial", said.append)

    def stop(done: int, total: int, label: str) -> None:
        if done * LAYERS > 2 * total:
            raise KeyboardInterrupt

    seen: list[int] = []
    with Checkpoint.open(source) as checkpoint, ThreadPoolExecutor(2) as pool:
        with pytest.raises(KeyboardInterrupt):
            measure_sampled(checkpoint, text, "rtn", 32, pool, stop, file, every=1)
        assert (tmp_path / "there" / "x.partial").is_file()
        again = measure_sampled(checkpoint, text, "rtn", 32, pool, lambda done, total, label: seen.append(done), file)
    assert again == whole and len(seen) == EXPERTS and not said, "only the last layer was left"


@pytest.mark.parametrize("damage", ["bytes", "state", "rows", "unwritable"])
def test_a_progress_file_that_is_no_good_is_said(source: Path, text: Calibration, tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    path = tmp_path / "x.partial"
    if damage == "unwritable":
        path = tmp_path / "file" / "x.partial"
        (tmp_path / "file").write_text("")
    elif damage == "bytes":
        path.write_bytes(b"no such file")
    else:
        good = json.dumps({"layer": 0, "damages": [1.0], "found": {"layers": [], "experts": []}})
        ProgressFile(path, said.append).save(json.loads(good) if damage == "rows" else {}, torch.zeros(2, 64))
    file = ProgressFile(path, said.append)
    with Checkpoint.open(source) as checkpoint, ThreadPoolExecutor(1) as pool:
        assert measure_sampled(checkpoint, text, "rtn", 32, pool, file=file, every=1) == sampled_by(source, text, 1)
    assert str(path) in said[0] and ("could not be kept" if damage == "unwritable" else "starts over") in said[0]


def test_the_cache_has_the_result_and_not_how_far_it_got(source: Path, text: Calibration, tmp_path: Path) -> None:
    quant = QuantConfig("mixed", method="rtn", block=32, kinds=(("int4g64", "int4g64"),), mix=("0" * EXPERTS,) * LAYERS)
    said: list[str] = []
    with Checkpoint.open(source) as checkpoint:
        first, again, full = (sensitivity(checkpoint, text, quant, 1, tmp_path, said.append, lambda *_: None, in_full)
                              for in_full in (False, False, True))
    assert first == again != full
    assert [line.split()[0] for line in said] == ["measuring", "sensitivities:", "measuring"]
    assert "sample" in said[0] and "in full" in said[2]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json"]


@pytest.mark.parametrize("group", [64, 40])
def test_rounded_is_between_extremes(group: int) -> None:
    weight = torch.randn(6, 64 + group, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[2] = 0.5
    before, found = weight.clone(), rounded(weight)
    assert torch.equal(weight, before) and torch.equal(found[2], weight[2].float())
    for columns in (slice(0, 64), slice(64, None)):
        w = weight[:, columns].float()
        step = (w.amax(1) - w.amin(1)) / 7
        off = (found[:, columns] - w).abs()
        assert (off <= step[:, None] * (0.5 + 2**-20)).all()  # a few fp32 roundings of numbers below 7 steps
        assert all(len(row.unique()) <= 8 for row in found[:, columns])


@given(st.integers(1, 3000), st.integers(1, 100), st.integers(0, 600))
def test_spread_is_within_and_apart(count: int, most: int, turn: int) -> None:
    found = spread(count, most, turn).tolist()
    assert len(set(found)) == len(found) == min(count, most) and found[0] >= 0 and found[-1] < count
    assert all(b - a <= 2 * count / len(found) for a, b in pairwise(found))


def test_samples_by_hand() -> None:
    assert spread(8, 2).tolist() == [0, 4] and spread(8, 2, 1).tolist() == [2, 6]
    assert [sampled_rows(n) for n in (4, 256, 4096, 14336)] == [4, 8, 32, 112] and sampled_rows(512, 2) == 16
    assert interpolated({0: 1.0, 4: 16.0}, 2) == pytest.approx(4) and interpolated({0: 1.0, 4: 16.0}, 9) == 16
    assert interpolated({0: 0.0, 4: 16.0}, 1) == 4 and interpolated({3: 2.0}, 0) == 2


def test_the_extent_is_that_of_the_model(source: Path) -> None:
    """So many tokens an expert, and as many for the copies of all probed layers."""
    with Checkpoint.open(source) as checkpoint:
        model = checkpoint.model
    share = extent.SHARE * EXPERTS // model.top_k
    found = Extent.of(model, Calibration(torch.zeros(64, 512, dtype=torch.int64)))
    assert found.text.tokens == share and found.text.length == extent.LENGTH
    assert found.layers == (0, 1, 2) and share < found.rows <= share + 3 * extent.LENGTH
    assert extent.probed(range(32)) == (0, 2, 6, 12, 19, 25, 29, 31)
    short = Extent.of(model, Calibration(torch.zeros(1, 7, dtype=torch.int64)))
    assert short.text.tokens == short.copied == 7


def test_the_choice_costs_less_than_the_sample_is_uncertain() -> None:
    """On the trained demo: the mix chosen by a sample, judged by the full measure on the whole text, is worse than the
    best mix by less than two standard errors of a sample's prediction for it, which three samples of the text show, and
    is better than any one format of no more bits."""
    from qmix.bench.text import recorded_text

    with Checkpoint.open(demo.CHECKPOINT) as checkpoint:
        model = checkpoint.model
        tokenizer = load(checkpoint.folder, model.vocab)
        text = Calibration.of_text(tokenizer.encode("", bos=True), tokenizer.encode(recorded_text(), bos=False),
                                   3072, extent.LENGTH)
        samples = [Calibration(text.ids[i::3]) for i in range(3)]
        torch.set_num_threads(1)
        with ThreadPoolExecutor(2) as pool:
            whole = measure(checkpoint, text, "hqq", 64, pool)
            found = [measure_sampled(checkpoint, part, "hqq", 64, pool) for part in samples]

    def predicted(by: Sensitivity, choice: Choice) -> float:
        return sum(by.damages[key]["w13"][kind[0]] + by.damages[key]["w2"][kind[1]] for key, kind in choice.of.items())

    for bits in (3.0, 3.5, 4.0):
        best = mixed(model, QuantConfig(), whole, Wanted(bits=bits))[1]
        uniform = {n: sum(d[m][n] for d in whole.damages.values() for m in d) for n in FORMATS if bits_of(n) <= bits}
        choices = [mixed(model, QuantConfig(), one, Wanted(bits=bits))[1] for one in found]
        worse = [predicted(whole, choice) - predicted(whole, best) for choice in choices]
        noise = [statistics.stdev(predicted(one, choice) for one in found) for choice in choices]
        print(f"{bits}: best {best.damage:.5f}, chosen {worse} worse, noise {noise}")
        assert min(worse) >= 0 and statistics.mean(worse) < 2 * statistics.mean(noise)
        assert max(worse) + best.damage < min(uniform.values())

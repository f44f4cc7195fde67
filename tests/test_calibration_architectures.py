"""Calibration of every architecture that runs: what its matrices read against float64, stores, resuming, sizes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from calibrated_models import CONFIGS, Float64, expert_names, write
from test_calibration import check, through
from test_quantize_calibrated import files, run, stop_after
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey, QuantConfig
from qmix.errors import CheckpointError, Interrupted
from qmix.formats import unpack
from qmix.quantize.calibration import Calibration
from qmix.quantize.fit import Wanted, mixed
from qmix.quantize.sensitivity import measure
from qmix.store import Store, StoreLayout

TEXT = Calibration(torch.randint(3, 128, (11, 40), generator=torch.Generator().manual_seed(0)))
GPTQ = QuantConfig(dense="int4", method="gptq", group_size=32, block=32)
ALL = sorted(CONFIGS)


@pytest.fixture(scope="module", params=ALL)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("calibration") / request.param, request.param)


def test_sums_are_those_of_a_pass_in_float64(source: Path) -> None:
    """Of every matrix of the model that is a product: none is left out, and none is measured for another."""
    with Checkpoint.open(source) as checkpoint:
        want = Float64(checkpoint, TEXT.ids)
        _, found, forward = through(checkpoint, TEXT, measure=True)
        torch.testing.assert_close(forward.residual.double(), want.residual, rtol=1e-4, atol=1e-4)
        measured = set()
        for group, inputs in found.items():
            for name, one in inputs.items():
                names = (name,) if group.endswith(".dense") else names_of(checkpoint, group)[name]
                x = torch.cat(want.reads[names[0]])
                assert one.count == len(x)
                check(one, x, torch.cat([want.weight(each) for each in names]))
                measured |= set(names)
        check(forward.head(checkpoint.dense("head")), torch.cat(want.reads["head"]), want.weight("head"))
        quantized = {t.name for t in checkpoint.model.tensors() if t.role in ("linear", "mlp", "head")}
        unmet = {name for key in checkpoint.model.expert_keys if found[str(key)] == {}
                 for each in expert_names(checkpoint.model, key).values() for name in each}
        assert measured | {"head"} == set(want.reads) >= quantized and not unmet & measured


def names_of(checkpoint: Checkpoint, group: str) -> dict[str, tuple[str, ...]]:
    key = next(key for key in checkpoint.model.expert_keys if str(key) == group)
    return expert_names(checkpoint.model, key)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(source, out, GPTQ, TEXT)
    return out


def test_outputs_on_the_text_are_nearer_than_hqqs(source: Path, whole: Path, tmp_path: Path) -> None:
    """Of all matrices together, on what they read in float64; the manifest says for each how far it is off."""
    run(source, tmp_path / "hqq", QuantConfig(dense="int4", group_size=32, block=32), None)
    with Checkpoint.open(source) as checkpoint, Store.open(whole) as ours, Store.open(tmp_path / "hqq") as theirs:
        want = Float64(checkpoint, TEXT.ids)
        ratios = []
        for name, entry in ours.manifest.dense.items():
            if entry.format != "int4":
                continue
            assert entry.calibrated.method == "gptq" and entry.calibrated.tokens == TEXT.tokens
            x, weight = torch.cat(want.reads[name]), want.weight(name)
            mine, other = (off(x, unpack(store.dense(name)), weight) for store in (ours, theirs))
            assert entry.calibrated.output_error["all"] == pytest.approx(mine, rel=0.02)
            ratios.append(mine / other)
        for key, entry in ours.manifest.records.items():
            if entry.calibrated.method != "gptq":
                assert entry.calibrated.tokens < 32
                continue
            for matrix, names in expert_names(checkpoint.model, key).items():
                x, weight = torch.cat(want.reads[names[0]]), torch.cat([want.weight(name) for name in names])
                mine, other = (off(x, record(store, key)[matrix == "w2"], weight) for store in (ours, theirs))
                assert entry.calibrated.output_error[matrix] == pytest.approx(mine, rel=0.02)
                ratios.append(mine / other)
    assert sum(ratios) / len(ratios) < 0.97 and sum(ratio < 1 for ratio in ratios) > 0.8 * len(ratios)


def off(x: Tensor, got: Tensor, want: Tensor) -> float:
    return float((x @ (got.double() - want).T).norm() / (x @ want.T).norm())


def record(store: Store, key: ExpertKey) -> list[Tensor]:
    buffer = torch.empty(store.layout.record_bytes, dtype=torch.uint8)
    store.read_record(key, buffer)
    return [unpack(matrix) for matrix in store.expert(key, buffer)]


@pytest.mark.parametrize("regions", [4, 17])
def test_a_broken_run_resumes_to_the_same_bytes(source: Path, whole: Path, tmp_path: Path, regions: int) -> None:
    with pytest.raises(Interrupted):
        run(source, tmp_path / "out", GPTQ, TEXT, progress=stop_after(regions))
    assert run(source, tmp_path / "out", GPTQ, TEXT, threads=2).resumed > 0
    assert files(tmp_path / "out") == files(whole)


def test_a_mix_is_chosen_within_its_size(source: Path, tmp_path: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        model = checkpoint.model
        torch.set_num_threads(1)
        with ThreadPoolExecutor(2) as pool:
            found = measure(checkpoint, TEXT, "rtn", 32, pool)
        assert set(found.damages) == set(model.expert_keys)
        assert [value > 0 for value in found.layers] == [model.experts_in(i) > 0 for i in range(model.num_layers)]
        sizes = [StoreLayout.of(model, QuantConfig(name, method="rtn", group_size=64, block=32)).nbytes
                 for name in ("int2", "int4")]
        wish = sum(sizes) // 2
        quant, choice = mixed(model, QuantConfig(method="gptq", block=32), found, Wanted(nbytes=wish))
        assert StoreLayout.of(model, quant).nbytes <= wish and len(choice.kinds) >= 1
    run(source, tmp_path / "out", quant, TEXT)
    with Store.open(tmp_path / "out") as store:
        assert store.verify(deep=True) == []
        assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) <= wish


@pytest.mark.parametrize(("architecture", "name"), [
    ("qwen3_moe", "layers.1.mlp.down"), ("olmoe", "layers.0.attention.k_norm"), ("mistral", "layers.2.experts.0.up"),
    ("qwen3_moe", "layers.2.router.weight"), ("mistral", "embedding")])
def test_damaged_weights_are_named_as_the_checkpoint_names_them(tmp_path: Path, architecture: str, name: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = write(tmp_path / "bad", architecture)
    with Checkpoint.open(folder) as checkpoint:
        published = checkpoint.published(name)
    tensors = load_file(folder / "model.safetensors")
    tensors[published].view(-1)[3] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=published.replace(".", r"\.")):
        run(folder, tmp_path / "out", QuantConfig(method="gptq", group_size=32, block=32), TEXT)

"""`qmix eval --against CHECKPOINT`: the figures are those that transformers gives by itself, whatever lies on disk."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from helpers import UNQUANTIZED, write_tiny_checkpoint
from test_cli import qmix
from test_evaluate import document, in_fp32, make_store, refused, sentencepiece_ids
from tokenizer_files import spm_model

from qmix.bench import recorded_text
from qmix.config import Cancel, QuantConfig
from qmix.demo import CHECKPOINT
from qmix.engine import load
from qmix.errors import DoesNotFit, Interrupted, QmixError, UsageError
from qmix.evaluate import reference
from qmix.evaluate.reference import Original
from qmix.evaluate.reference_memory import largest_part, workspace
from qmix.evaluate.reference_weights import Weights
from qmix.evaluate.windows import split_windows

MIB = 2**20
RTN = QuantConfig(method="rtn")  # the fastest, where the method is not the point


def theirs(source: Path, dtype: torch.dtype) -> Any:
    from transformers import MixtralForCausalLM
    return MixtralForCausalLM.from_pretrained(source, dtype=dtype).eval()


def their_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(CHECKPOINT, tmp_path_factory.mktemp("reference") / "int4", QuantConfig())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(recorded_text(), encoding="utf-8")
    return path


@pytest.mark.parametrize(("tied", "shards", "dtype"), [
    (False, 1, torch.bfloat16), (True, 2, torch.float32), (False, 3, torch.float16)])
def test_every_tensor_and_logit_is_that_of_transformers(tmp_path: Path, tied: bool, shards: int,
                                                        dtype: torch.dtype) -> None:
    """Bit for bit, with everything in RAM, with some of it and with nothing: where weights lie changes no bit."""
    path = write_tiny_checkpoint(tmp_path, dtype=dtype, shards=shards, tie_word_embeddings=tied)
    model, said = theirs(path, dtype), []
    ids = list(range(3, 103))
    want = their_logits(model, ids)[7:]
    for room in (2**30, 300_000, 0):
        with Original.open(path, said.append) as original:
            if room:
                assert Weights(original._checkpoint).keys() == model.state_dict().keys()
                for name, tensor in model.state_dict().items():
                    assert torch.equal(Weights(original._checkpoint)[name], tensor), name
            original.plan(original.least_bytes(100) + room, 100)
            original.session().trim(0)
            pieces = list(original.read(ids, 7))
            assert torch.equal(torch.cat(pieces), want)
            assert torch.equal(torch.cat(list(original.read(ids, 7))), want)
    assert ["all its weights in RAM" in line for line in said] == [True, False, False]
    assert all(str(dtype).removeprefix("torch.") in line for line in said)


@pytest.mark.parametrize("tied", [False, True])
def test_between_gpu_ram_and_disk_no_bit_changes(tmp_path: Path, tied: bool) -> None:
    """accelerate's map for a GPU, RAM and disk; the CPU computes in the GPU's place, and what the map does not give it
    is brought in by hooks, as on a GPU."""
    path = write_tiny_checkpoint(tmp_path, dtype=torch.float32, num_hidden_layers=4, tie_word_embeddings=tied)
    ids, said = list(range(3, 63)), []
    want = their_logits(theirs(path, torch.float32), ids)
    device = torch.device("cpu")
    with Original.open(path, lambda line: None) as original:
        layer, nbytes = largest_part(original.model), original.weight_bytes
    for vram, ram, held in ((nbytes, 0, {0}), (layer, layer, {0, "cpu", "disk"}), (0, nbytes, {"cpu"}),
                            (0, 0, {"disk"}), (layer, 0, {0, "disk"})):
        with Original.open(path, said.append) as original:
            original.plan(original.least_beside(60) + ram, 60, original.least_bytes(60) + vram, device)
            assert original._memory() == {0: layer + vram, "cpu": layer + ram}
            device_map = infer_auto_device_map(original._model, original._memory(), original._model._no_split_modules,
                                               original.model.dtype)
            assert set(device_map.values()) == held
            assert torch.equal(torch.cat(list(original.read(ids))), want)
            assert torch.equal(torch.cat(list(original.read(ids))), want)
            held_in_ram = sum(tensor.nbytes for tensor in original._weights._held.values())
            assert held_in_ram <= ram and bool(held_in_ram) == ("cpu" in held)
    said = [line.partition("; ")[2] for line in said]
    assert said[0] == "all its weights in VRAM"
    assert ["from RAM to the GPU" in line for line in said] == [False, True, True, False, False]
    assert ["from the checkpoint" in line for line in said] == [False, True, False, True, True]


def test_a_gpu_that_gives_less_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    with Original.open(CHECKPOINT, lambda line: None) as original:
        original.plan(original.least_beside(64), 64, 2**30, torch.device("cpu"))
        list(original.read([1, 5, 6]))
        monkeypatch.setattr(original._model.model, "forward", full)
        with pytest.raises(DoesNotFit, match="more VRAM than planned: CUDA out of memory") as refusal:
            original.read([1, 5, 6])
        assert "--device cpu" in refusal.value.cure


def test_pieces_are_those_of_a_session() -> None:
    with Original.open(CHECKPOINT, lambda line: None) as original:
        original.plan(original.least_bytes(1300) + 2**30, 1300)
        ids = list(range(3, 1303))
        pieces = list(original.read(ids, 100))
        assert [len(piece) for piece in pieces] == [512, 512, 176] and pieces[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_figures_are_those_of_transformers(int4: Path, text: Path, tmp_path: Path, dtype: str) -> None:
    """Perplexity, KL and agreement from transformers' logits and the engine's, over the vocabulary at once in fp64."""
    source = CHECKPOINT if dtype == "bfloat16" else in_fp32(CHECKPOINT, tmp_path / "source")
    # The number of threads decides last bits: one, as below.
    found = document(int4, "-f", text, "-c", 128, "--stride", 90, "-n", 400, "-t", 1, "--against", source)
    ids, loss, kl, agree = sentencepiece_ids(CHECKPOINT, text.read_text(encoding="utf-8")), [], [], []
    model = theirs(source, getattr(torch, dtype))
    with load(int4, threads=1, context=128, scoring=True) as ours:
        for w in split_windows(len(ids), 128, 90, 400):
            q = torch.cat(list(ours.session().read(ids[w.begin:w.end - 1], w.first - 1 - w.begin)))
            p = their_logits(model, ids[w.begin:w.end - 1])[w.first - 1 - w.begin:]
            agree.append(q.argmax(1) == p.argmax(1))
            p, q = p.double().log_softmax(1), q.double().log_softmax(1)
            kl.append((p.exp() * (p - q)).sum(1))
            loss.append(-p.gather(1, torch.tensor(ids[w.first:w.end])[:, None])[:, 0])
    # The journal keeps fp32, so each token's number is off by 2^-24 of itself.
    assert found["kl_mean"] == pytest.approx(float(torch.cat(kl).mean()), rel=2**-23)
    assert math.log(found["reference_perplexity"]) == pytest.approx(float(torch.cat(loss).mean()), rel=2**-23)
    assert found["top1"] == pytest.approx(float(torch.cat(agree).double().mean()))
    assert found["reference"]["run_by"]["computed_in"] == dtype == found["reference"]["dtype"]
    assert found["reference"]["bits_per_weight"] == (16 if dtype == "bfloat16" else 32)


def moved_by(kl: float, distance: float) -> float:
    """How far KL(p || q) can move when each log p moves by `distance` at most: of the sum of p log(p / q), p moves by
    a factor e^distance, log p by distance, and sum p |log(p / q)| <= kl + sqrt(2 kl) (Pinsker)."""
    return math.expm1(distance) * (kl + math.sqrt(2 * kl)) + distance * math.exp(distance)


def compare_with_unquantized(store: Path, source: Path, unquantized: Path, text: Path,
                             flags: tuple[object, ...]) -> None:
    """Against the checkpoint and against its `keep` store the figures differ by no more than the two do."""
    by_us = document(store, "-f", text, *flags, "--against", unquantized)
    by_them = document(store, "-f", text, *flags, "--against", source)
    assert by_us["perplexity"] == by_them["perplexity"]
    window = by_us["window"]
    ids = sentencepiece_ids(source, text.read_text(encoding="utf-8"))
    model, distance = theirs(source, torch.float32), 0.0
    with load(unquantized, threads=1, context=window, scoring=True) as ours:
        for w in split_windows(len(ids), window, window, by_us["tokens"]):
            q = torch.cat(list(ours.session().read(ids[w.begin:w.end - 1]))).double().log_softmax(1)
            p = their_logits(model, ids[w.begin:w.end - 1]).double().log_softmax(1)
            distance = max(distance, float((p - q).abs().max()))
    assert distance < 0.01, "two programs in fp32"
    assert abs(by_us["kl_mean"] - by_them["kl_mean"]) <= moved_by(by_us["kl_mean"], distance)
    losses = [math.log(found["reference_perplexity"]) for found in (by_us, by_them)]
    assert abs(losses[0] - losses[1]) <= distance


def test_an_unquantized_store_is_as_good_a_reference(int4: Path, text: Path, tmp_path: Path) -> None:
    source = in_fp32(CHECKPOINT, tmp_path / "source")
    unquantized = make_store(source, tmp_path / "keep", UNQUANTIZED)
    compare_with_unquantized(int4, source, unquantized, text, ("-c", 128, "-n", 300))


@pytest.mark.models  # the bundled model above is held to the same
def test_a_keep_store_of_a_trained_model(wiki_moe: Path, text: Path, tmp_path: Path) -> None:
    source = in_fp32(wiki_moe, tmp_path / "source")
    store, keep = make_store(source, tmp_path / "int4", RTN), make_store(source, tmp_path / "keep", UNQUANTIZED)
    compare_with_unquantized(store, source, keep, text, ("-c", 200, "-n", 400))


def test_within_a_budget_that_leaves_the_weights_on_disk(wiki_moe: Path, text: Path, tmp_path: Path) -> None:
    """In a process of its own, with as little as it says it needs. Where weights lie changes no figure, the process
    stays within the budget, and nothing is left in the folder for temporary files."""
    store = make_store(wiki_moe, tmp_path / "int4", RTN)
    (tmp_path / "tmp").mkdir()

    def run(ram: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qmix", "eval", str(store), "-f", str(text), "-c", "128", "-n", "130",
                   "--against", str(wiki_moe), "-t", "1", "--json", "--fresh", "--ram", ram]
        return subprocess.run(command, capture_output=True, text=True, check=False,
                              env={**os.environ, "TMPDIR": str(tmp_path / "tmp")})

    refusal = run("300M")
    least = re.search(r"both models need (\d+) MiB", refusal.stderr)
    assert refusal.returncode == 3 and least is not None, refusal.stderr
    budget = int(least[1]) + 12  # the program takes a few MiB more or less each time it starts
    done = run(f"{budget}M")
    roomy = qmix("eval", store, "-f", text, "-c", 128, "-n", 130, "--against", wiki_moe, "-t", 1, "--json", "--fresh")
    assert done.returncode == 0 and roomy.returncode == 0, done.stderr + roomy.stderr
    assert "each window reads" in done.stderr and "all its weights in RAM" in roomy.stderr
    assert json.loads(done.stdout) == json.loads(roomy.stdout)
    peak = re.search(r"peak memory (\d+) MiB", done.stderr)
    assert peak is not None and int(peak[1]) <= budget
    assert not [p for p in (tmp_path / "tmp").rglob("*") if p.is_file()]  # torch makes an empty folder there
    print(f"peak {peak[1]} of {budget} MiB")


def test_it_resumes_and_says_what_it_is(int4: Path, text: Path) -> None:
    args = (int4, "-f", text, "-c", 64, "-n", 200, "--against", CHECKPOINT)
    first, done = document(*args), qmix("eval", *args)
    assert "resumed: 4 of 4 windows" in done.stderr and document(*args) == first
    assert "unquantized, by transformers" in done.stdout
    assert f"(reference {first['reference_perplexity']:.4f})" in done.stdout
    other = qmix("eval", *args[:-1], int4)
    assert "resumed" not in other.stderr


def test_an_interrupt_ends_a_window(text: Path) -> None:
    with Original.open(CHECKPOINT, lambda line: None) as original:
        cancel, layers = Cancel(), 0
        original.plan(original.least_bytes(64), 64)
        list(original.read([1, 5, 6], 0, cancel))

        def stop(*inputs: object) -> None:
            nonlocal layers
            layers += 1
            cancel.set()

        original._model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(Interrupted):
            list(original.read([1, 5, 6], 0, cancel))
        assert layers == 1


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)


def old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    monkeypatch.setattr(transformers, "__version__", "4.57.1")


@pytest.mark.parametrize(("change", "words"), [
    (lambda patch: without(patch, "accelerate"), "accelerate is not installed"),
    (lambda patch: without(patch, "transformers"), "transformers is not installed"),
    (old_transformers, "4.57.1 is installed")])
def test_what_is_not_installed_is_said_with_the_cure(int4: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
                                                     change: Callable[[pytest.MonkeyPatch], None], words: str) -> None:
    change(monkeypatch)
    refused(qmix("eval", int4, "-f", text, "--against", CHECKPOINT), 2, words, "pip install 'qmix[reference]'")


def test_checkpoints_that_cannot_be_a_reference(int4: Path, text: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", vocab_size=4096)
    (other / "tokenizer.model").write_bytes(spm_model())
    refused(qmix("eval", int4, "-f", text, "--against", other), 2, "vocabulary", str(other))
    (other / "model.safetensors").unlink()
    refused(qmix("eval", int4, "-f", text, "--against", other), 4, "model.safetensors: missing")
    with pytest.raises(UsageError, match="accelerate"), pytest.MonkeyPatch.context() as patch:
        without(patch, "accelerate")
        Original.open(CHECKPOINT, lambda line: None)


def test_another_layout_of_transformers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = reference.skeleton

    def renamed(*args: Any) -> Any:
        model = honest(*args)
        model.model.layers[0].mlp.experts.renamed = model.model.layers[0].mlp.experts.down_proj
        return model

    monkeypatch.setattr(reference, "skeleton", renamed)
    with pytest.raises(QmixError, match=r"layers\.0\.mlp\.experts\.renamed"):
        Original.open(CHECKPOINT, lambda line: None)


def test_the_workspace_grows_with_the_window() -> None:
    from test_plan import MIXTRAL
    sizes = [workspace(MIXTRAL, n) for n in (256, 1024, 2048)]
    assert sizes == sorted(sizes) and 500 * MIB < sizes[-1] < 1800 * MIB

"""`qmix eval`: perplexity as transformers has it, divergence from logits that each model gives by itself, and a killed
run that goes on. Stores are real; the reference of a figure is never qmix's own arithmetic."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from helpers import UNQUANTIZED, write_checkpoint, write_tiny_checkpoint
from safetensors.torch import load_file
from test_cli import Done, qmix
from tokenizer_files import spm_model
from warm_python import WarmPython

from qmix import paths
from qmix.bench import recorded_text
from qmix.checkpoint import Checkpoint
from qmix.config import Cancel, QuantConfig
from qmix.demo import CHECKPOINT
from qmix.engine import Engine, load
from qmix.errors import Interrupted
from qmix.evaluate.windows import Window, split_windows
from qmix.quantize import quantize_checkpoint

MIB = 2**20


def make_store(source: Path, out: Path, quant: QuantConfig = UNQUANTIZED) -> Path:
    with Checkpoint.open(source) as checkpoint:
        quantize_checkpoint(checkpoint, out, quant, threads=1)
    return out


def in_fp32(source: Path, path: Path) -> Path:
    """The checkpoint with the same weights, exact in fp32."""
    raw = json.loads((source / "config.json").read_text())
    tensors = {name: t.float() for name, t in load_file(source / "model.safetensors").items()}
    write_checkpoint(path, {**raw, "torch_dtype": "float32"}, tensors)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (path / name).write_bytes((source / name).read_bytes())
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model: its int4, its bf16 as it is, and in fp32."""
    folder = tmp_path_factory.mktemp("evaluate")
    return {"int4": make_store(CHECKPOINT, folder / "int4", QuantConfig()),
            "keep": make_store(CHECKPOINT, folder / "keep"),
            "fp32": make_store(in_fp32(CHECKPOINT, folder / "source"), folder / "fp32")}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(recorded_text(), encoding="utf-8")
    return path


def document(*args: object) -> dict[str, Any]:
    done = qmix("eval", *args, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- the engine's side ---

@pytest.fixture(scope="module")
def engine(stores: dict[str, Path]) -> Iterator[Engine]:
    with load(stores["int4"], threads=1, context=1500, scoring=True) as found:
        yield found


def test_reading_gives_the_logits_of_every_token(engine: Engine) -> None:
    ids = engine.tokenizer.encode(recorded_text())[:1300]
    session = engine.session()
    pieces = list(session.read(ids, 100))
    assert [len(piece) for piece in pieces] == [512, 512, 176] and session.ids == ids
    assert all(piece.dtype == torch.float32 for piece in pieces)
    after = session.decode(5)
    session.trim(0)
    found = torch.cat(pieces)
    for count in (101, 700, 1300):  # cut differently the same token has other roundings: no other row is as near
        session.trim(0)
        assert int((found - session.prefill(ids[:count])).norm(dim=1).argmin()) == count - 101
    assert torch.equal(session.decode(5), after)


def test_reading_has_the_bits_of_a_pass_that_returns_all(engine: Engine) -> None:
    from qmix.config import Step
    ids = engine.tokenizer.encode(recorded_text())[:1300]
    model, session = engine._model, engine.session()
    want = model.forward(torch.tensor(ids), torch.arange(1300), [model.new_cache(1300)], Step("prefill"), True)
    assert torch.equal(torch.cat(list(session.read(ids))), want)


def test_an_interrupted_reading_leaves_the_session(engine: Engine) -> None:
    session, cancel = engine.session(), Cancel()
    list(session.read([1, 5, 6]))
    cancel.set()
    with pytest.raises(Interrupted):
        session.read([7, 8], 0, cancel)
    assert session.ids == [1, 5, 6] and session.cache.length == 3


def transformers_loss(source: Path, dtype: torch.dtype, ids: list[int], windows: list[Window]) -> float:
    from transformers import MixtralForCausalLM
    model = MixtralForCausalLM.from_pretrained(source, dtype=dtype).eval()
    losses = []
    with torch.inference_mode():
        for w in windows:
            logits = model(torch.tensor([ids[w.begin:w.end]])).logits[0, :-1].double()
            likely = logits.log_softmax(1).gather(1, torch.tensor(ids[w.begin + 1:w.end])[:, None])[:, 0]
            losses.append(-likely[w.first - w.begin - 1:])
    return float(torch.cat(losses).mean())


def sentencepiece_ids(source: Path, text: str) -> list[int]:
    import sentencepiece
    return [1, *sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model")).encode(text)]


@pytest.mark.parametrize("stride", [0, 60])
def test_the_perplexity_is_that_of_transformers(stores: dict[str, Path], text: Path, stride: int) -> None:
    """Of fp32, an fp32 store to more than 4 digits. A bf16 one computes in bf16, so its loss is off by the rounding."""
    ids = sentencepiece_ids(CHECKPOINT, text.read_text(encoding="utf-8"))
    windows = split_windows(len(ids), 200, stride or 200, 900)
    want = math.exp(transformers_loss(CHECKPOINT, torch.float32, ids, windows))
    args = ("-f", text, "-c", 200, "--stride", stride, "-n", 900)
    found = document(stores["fp32"], *args)
    assert (found["tokens"], found["windows"], found["text_tokens"]) == (900, len(windows), len(ids))
    assert found["perplexity"] == pytest.approx(want, rel=2e-5)
    assert document(stores["keep"], *args)["loss"] == pytest.approx(math.log(want), rel=2e-3)


@pytest.mark.models  # the bundled model above is held to the same
def test_the_trained_model_has_the_perplexity_that_transformers_gives(wiki_moe: Path, tmp_path: Path) -> None:
    text = wiki_moe.parents[1] / "data" / "wikitext2-test.txt"
    if not text.is_file():
        pytest.skip("wikitext2-test.txt is not here")
    ids = sentencepiece_ids(wiki_moe, text.read_text(encoding="utf-8"))
    windows = split_windows(len(ids), 256, 256, 2000)
    want = math.exp(transformers_loss(wiki_moe, torch.float32, ids, windows))
    store = make_store(in_fp32(wiki_moe, tmp_path / "source"), tmp_path / "store")
    found = document(store, "-f", text, "-c", 256, "-n", 2000)["perplexity"]
    assert f"{found:.4g}" == f"{want:.4g}" and found == pytest.approx(want, rel=2e-5)
    rounded = document(make_store(wiki_moe, tmp_path / "bf16"), "-f", text, "-c", 256, "-n", 2000)["perplexity"]
    assert rounded == pytest.approx(want, rel=3e-3)


def test_against_itself_a_store_is_at_no_distance(stores: dict[str, Path], text: Path) -> None:
    found = document(stores["int4"], "-f", text, "-c", 128, "-n", 600, "--against", stores["int4"])
    assert (found["kl_mean"], found["kl_p99"], found["top1"]) == (0, 0, 1)
    assert found["perplexity"] == found["reference_perplexity"]


def test_against_the_unquantized_model(stores: dict[str, Path], text: Path) -> None:
    """KL and agreement from logits that each engine gives by itself, over the whole vocabulary at once."""
    found = document(stores["int4"], "-f", text, "-c", 128, "-n", 500, "--against", stores["fp32"])
    ids, kl, agree = sentencepiece_ids(CHECKPOINT, text.read_text(encoding="utf-8")), [], []
    with load(stores["int4"], threads=1, context=128, scoring=True) as ours, \
            load(stores["fp32"], threads=1, context=128, scoring=True) as theirs:
        for w in split_windows(len(ids), 128, 128, 500):
            q, p = (torch.cat(list(e.session().read(ids[w.begin:w.end - 1]))).double().softmax(1)
                    for e in (ours, theirs))
            kl.append(torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(1))
            agree.append(q.argmax(1) == p.argmax(1))
    assert found["kl_mean"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5)
    assert found["top1"] == pytest.approx(float(torch.cat(agree).double().mean()))
    assert 0 < found["kl_mean"] < found["kl_p99"] and 0.5 < found["top1"] < 1
    assert found["reference"]["bits_per_weight"] > found["model"]["bits_per_weight"]
    assert [row["first"] for row in found["positions"]] == [1, 16, 64]


def test_the_table_has_what_the_document_has(stores: dict[str, Path], text: Path) -> None:
    args = (stores["int4"], "-f", text, "-c", 128, "-n", 300, "--against", stores["keep"])
    found, done = document(*args), qmix("eval", *args)
    for words in (f"perplexity: {found['perplexity']:.4f}", f"{100 * found['top1']:.2f} %", "300 tokens in 3 windows",
                  "by position", "16 to 63"):
        assert words in done.stdout, done.stdout
    assert "resumed: 3 of 3 windows" in done.stderr


def test_a_killed_run_goes_on_and_ends_the_same(stores: dict[str, Path], text: Path, warm_python: WarmPython) -> None:
    args = [str(stores["int4"]), "-f", str(text), "-c", "32", "--stride", "8", "-n", "600", "--against",
            str(stores["keep"]), "-t", "1"]
    journals = paths.evaluations_folder()
    for end, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        before = sum(p.stat().st_size for p in journals.glob("*")) if journals.exists() else 0
        with warm_python.start("-m", "qmix", "eval", *args, "--json", stdout=PIPE, stderr=PIPE) as process:
            until = time.monotonic() + 60
            while time.monotonic() < until and process.poll() is None:
                if sum(p.stat().st_size for p in journals.glob("*")) > before + 2500:
                    break
                time.sleep(0.01)
            process.send_signal(end)
            out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, ""), errors
    assert "the same command continues" in errors and "Traceback" not in errors
    (journal,) = journals.glob("*.scores")
    with journal.open("ab") as file:
        file.write(b"\x08\x00\x00\x00\x04")  # a record that was being written
    done = qmix("eval", *args, "--json")
    assert done.returncode == 0, done.stderr
    assert "resumed: " in done.stderr
    fresh = qmix("eval", *args, "--json", "--fresh")
    assert "resumed" not in fresh.stderr
    assert fresh.stdout == done.stdout


def test_another_thread_count_or_text_is_another_evaluation(stores: dict[str, Path], tmp_path: Path) -> None:
    for name, words in (("a", "the fox and the owl"), ("b", "the fox or the owl")):
        (tmp_path / name).write_text(words)
        assert "resumed" not in qmix("eval", stores["int4"], "-f", tmp_path / name).stderr
    for flags in (("-c", 8), ("-c", 8, "--stride", 2), ("--kv-cache", "int8"), ("-n", 2), ("--activations", "bf16"),
                  ("--against", stores["keep"])):
        done = qmix("eval", stores["int4"], "-f", tmp_path / "a", *flags)
        assert done.returncode == 0 and "resumed" not in done.stderr, done.stderr
    assert "resumed: 1 of 1" in qmix("eval", stores["int4"], "-f", tmp_path / "a").stderr


def test_an_output_that_is_not_a_number_names_the_window(stores: dict[str, Path], text: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from qmix.forward.runner import Runner
    honest, count = Runner.logits, itertools.count()
    monkeypatch.setattr(Runner, "logits", lambda self, residual: honest(self, residual) * (
        math.nan if next(count) == 2 else 1))
    done = qmix("eval", stores["int4"], "-f", text, "-c", 50)
    assert done.returncode == 1 and "tokens 101 to 149" in done.stderr and done.stdout == "", done.stderr
    assert "resumed: 2 of" in qmix("eval", stores["int4"], "-f", text, "-c", 50).stderr


@pytest.mark.parametrize(("args", "code", "words"), [
    ((), 2, ("-f FILE", "--tasks")),
    (("-f", "{tmp}/none"), 2, ("none", "No such file")),
    (("-f", "{tmp}/empty"), 2, ("empty",)),
    (("-f", "{tmp}/latin"), 2, ("not UTF-8", "byte 3")),
    (("-f", "{text}", "-c", "1"), 2, ("--ctx-size 1",)),
    (("-f", "{text}", "-c", "2049"), 2, ("--ctx-size 2049", "2048")),
    (("-f", "{text}", "-c", "64", "--stride", "65"), 2, ("--stride 65", "64")),
    (("-f", "{text}", "--stride", "-1"), 2, ("--stride",)),
    (("-f", "{text}", "-n", "0"), 2, ("--max-tokens 0",)),
    (("-f", "{text}", "--against", "{tmp}"), 4, ("{tmp}",)),
    (("-f", "{text}", "--against", "{tmp}/nothing"), 2, ("nothing",)),
    (("-f", "{text}", "--against", "{other}"), 2, ("vocabulary", "{other}")),
    (("-f", "{text}", "--limit", "5"), 2, ("--limit", "--tasks")),
    (("--tasks", "x", "--fresh"), 2, ("--fresh", "-f FILE")),
    (("--tasks", "x", "--against", "{tmp}"), 2, ("--against",)),
    (("-f", "{text}", "--ram", "10M"), 3, ("RAM",)),
    (("-f", "{text}", "--ram", "10M", "--against", "{keep}"), 3, ("both models", "RAM")),
    (("-f", "{text}", "--ram", "8G", "--margin", "1G", "--against", "{keep}"), 2, ("--margin",)),
])
def test_what_makes_no_sense_is_refused(stores: dict[str, Path], text: Path, other: Path, tmp_path: Path,
                                        args: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    places = {"tmp": tmp_path, "text": text, "other": other, "keep": stores["keep"]}
    refused(qmix("eval", stores["int4"], *(a.format(**places) for a in args)), code,
            *(w.format(**places) for w in words))


def refused(done: Done, code: int, *words: str) -> None:
    assert done.returncode == code and done.stdout == "", done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with Mixtral's 32000 rows of vocabulary, and little else."""
    folder = tmp_path_factory.mktemp("other")
    source = write_tiny_checkpoint(folder / "source", vocab_size=32000)
    (source / "tokenizer.model").write_bytes(spm_model())
    return make_store(source, folder / "store")


def test_two_models_stay_within_one_budget(other: Path, text: Path) -> None:
    """In a process of its own, with as little as it says it needs: a piece of logits is 64 MiB here, four times the
    models."""
    command = [sys.executable, "-m", "qmix", "eval", str(other), "-f", str(text), "-c", "512", "-n", "1100",
               "--against", str(other), "-t", "1", "--ram"]
    refusal = subprocess.run([*command, "300M"], capture_output=True, text=True, check=False)
    least = re.search(r"both models need (\d+) MiB", refusal.stderr)
    assert refusal.returncode == 3 and least is not None, refusal.stderr
    done = subprocess.run([*command, f"{int(least[1]) + 4}M"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = re.search(r"peak memory (\d+) MiB", done.stderr)
    assert peak is not None and int(peak[1]) <= int(least[1]) + 4
    print(f"peak {peak[1]} of {int(least[1]) + 4} MiB")

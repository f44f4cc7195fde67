"""`qmix eval --tasks`: the lm-eval harness drives a store, on tasks of ours and without a network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the lm-eval harness (extra eval) is not installed")

from lm_eval.tasks import TaskManager
from test_cli import qmix

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.demo import CHECKPOINT
from qmix.engine import Engine, load
from qmix.errors import StoreError, UsageError
from qmix.evaluate.tasks import HarnessModel, prepare, rows, sampling
from qmix.quantize import quantize_checkpoint

CHOOSE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
metadata: {{version: 1.0}}
doc_to_text: "{{{{question}}}}"
"""
CHOICES = CHOOSE + """
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWERS = CHOOSE + """
output_type: generate_until
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: [" the"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = ("Once upon a time there was a fox who", "The owl asked where", "The rain came and the lantern")
WORDS = (" was", " had", " lived in", " xylophone")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "store"
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        quantize_checkpoint(checkpoint, out, QuantConfig(method="rtn"), threads=1)
    return out


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness does not look through its own thousands of tasks, which takes ten seconds."""
    monkeypatch.setattr("qmix.evaluate.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture
def engine(store: Path) -> Iterator[Engine]:
    with load(store, threads=1, context=96, scoring=True) as found:
        yield found


@pytest.fixture
def model(engine: Engine) -> HarnessModel:
    return HarnessModel(engine.tokenizer, lambda: engine, lambda line: None)


def ask(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def likelihood(engine: Engine, read: list[int], then: list[int]) -> tuple[float, bool]:
    """Token by token, each after a prefill of all before it."""
    total, greedy = 0.0, True
    for i, token in enumerate(then):
        logits = engine.session().prefill([*read, *then[:i]]).double()
        total += float(logits.log_softmax(0)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


def test_likelihoods_are_those_of_single_prefills(engine: Engine, model: HarnessModel) -> None:
    requests = [ask(question, word) for question in QUESTIONS for word in WORDS]
    for request, (found, greedy) in zip(requests, model.loglikelihood(requests), strict=True):
        context = engine.tokenizer.encode(request.args[0])
        whole = engine.tokenizer.encode("".join(request.args))
        want, best = likelihood(engine, context, whole[len(context):])
        assert found == pytest.approx(want, abs=0.1)  # the bf16 head rounds one row and several differently
        assert greedy == best


def test_a_text_is_scored_whole_however_long(engine: Engine, model: HarnessModel) -> None:
    text = "The fox carried a lantern through the dark forest. " * 12
    ids = engine.tokenizer.encode(text, bos=False)
    assert len(ids) > engine.plan.context
    (found,) = model.loglikelihood_rolling([ask(text)])
    whole = [engine.tokenizer.bos_id, *ids]
    context, want, at = 96, 0.0, 1
    while at < len(whole):
        end = min(len(whole), at + context)
        begin = max(0, end - 1 - context)
        logits = torch.cat(list(engine.session().read(whole[begin:end - 1]))).double().log_softmax(1)
        want += float(sum(logits[i - 1 - begin, whole[i]] for i in range(at, end)))
        at = end
    assert found == pytest.approx(want, rel=5e-3)


def test_answers_are_greedy_and_end_before_the_stop(engine: Engine, model: HarnessModel) -> None:
    from qmix.config import SamplingParams
    full = "".join(t.text for t in engine.generate(QUESTIONS[0], SamplingParams(temperature=0, max_tokens=20)))
    assert model.generate_until([ask(QUESTIONS[0], {"until": [], "max_gen_toks": 20})]) == [full]
    stop = full[7:10]
    cut = full[:full.index(stop)]
    assert model.generate_until([ask(QUESTIONS[0], {"until": stop, "max_gen_toks": 20})]) == [cut]


def test_what_does_not_fit_is_cut_and_said(engine: Engine) -> None:
    said: list[str] = []
    model = HarnessModel(engine.tokenizer, lambda: engine, said.append)
    long = "The fox carried a lantern. " * 40
    model.loglikelihood([ask(long, " Then"), ask("The fox", " ran")])
    assert len(said) == 1 and "1 prompts" in said[0] and "--ctx-size" in said[0]
    with pytest.raises(UsageError, match="200 tokens"):
        model.generate_until([ask("The fox", {"max_gen_toks": 200})])
    with pytest.raises(UsageError, match="continuation"):
        model.loglikelihood([ask("The fox", long)])


def test_a_wish_that_is_not_known_is_an_error() -> None:
    assert sampling({"until": "x", "temperature": 0.5}).temperature == 0
    drawn = sampling({"do_sample": True, "temperature": 0.5, "top_k": 3, "max_new_tokens": 9})
    assert (drawn.temperature, drawn.top_k, drawn.max_tokens, drawn.seed) == (0.5, 3, 9, 1234)
    with pytest.raises(UsageError, match="num_beams"):
        sampling({"num_beams": 4})


def test_results_become_rows() -> None:
    found = {"results": {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1.0,
                               "f1_stderr,strict": "N/A"}},
             "versions": {"a": 2}, "n-shot": {"a": 3}, "n-samples": {"a": {"original": 9, "effective": 4}}}
    both = {"task": "a", "version": 2, "shots": 3, "samples": 4}
    assert list(rows(found)) == [{**both, "filter": "none", "metric": "acc", "value": 0.5, "stderr": 0.1},
                                 {**both, "filter": "strict", "metric": "f1", "value": 1.0, "stderr": None}]


@pytest.fixture
def tasks(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two local tasks. Right answers: for the first question the choice that the model finds likeliest, for the others
    the least likely one; what it says greedily, but for the last question."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a task of ours needs no network"))
    model, lines = HarnessModel(engine.tokenizer, lambda: engine, lambda line: None), []
    for i, question in enumerate(QUESTIONS):
        likely = [one for one, _ in model.loglikelihood([ask(question, word) for word in WORDS])]
        (said,) = model.generate_until([ask(question, {"until": [" the"], "max_gen_toks": 12})])
        answer = (max if i == 0 else min)(range(len(WORDS)), key=likely.__getitem__)
        lines.append({"question": question, "choices": WORDS, "answer": answer, "said": said if i < 2 else said + "!"})
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, yaml in (("qmix_choices", CHOICES), ("qmix_answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(yaml.format(name=name, data=data))
    return folder


def test_local_tasks_run_offline(store: Path, tasks: Path, only_ours: None) -> None:
    args = ("eval", store, "--tasks", "qmix_choices,qmix_answers", "--include-path", tasks, "-c", 96)
    done = qmix(*args, "--json")
    assert done.returncode == 0, done.stderr
    found = {row["task"]: row for row in json.loads(done.stdout)["tasks"]}
    choices, answers = found["qmix_choices"], found["qmix_answers"]
    assert (choices["metric"], choices["samples"], choices["shots"], choices["version"]) == ("acc", 3, 0, 1.0)
    assert choices["value"] == pytest.approx(1 / 3)
    assert (answers["metric"], answers["value"]) == ("exact_match", pytest.approx(2 / 3))
    assert math.isfinite(choices["stderr"])
    limited = qmix(*args, "--limit", 1)
    assert limited.returncode == 0, limited.stderr
    assert "acc" in limited.stdout and "qmix_answers" in limited.stdout


@pytest.mark.parametrize(("args", "words"), [
    (("--tasks", "no_such_task"), ("no_such_task",)),
    (("--tasks", ","), ("names no task",)),
    (("--tasks", "qmix_broken", "--include-path", "{tmp}"), ("qmix_broken", "cannot prepare")),
    (("--tasks", "x", "--include-path", "{tmp}/none"), ("none", "no such folder")),
])
def test_tasks_that_there_are_not(store: Path, tmp_path: Path, only_ours: None, args: tuple[str, ...],
                                  words: tuple[str, ...]) -> None:
    (tmp_path / "broken.yaml").write_text(CHOICES.format(name="qmix_broken", data=tmp_path / "missing.jsonl"))
    done = qmix("eval", store, *(a.format(tmp=tmp_path) for a in args))
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr


WISHES = CHOOSE + """
output_type: generate_until
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: [" the"], {wish}}}
"""


@pytest.mark.parametrize(("wish", "words"), [
    ("max_gen_toks: 4, num_beams: 5", ("task qmix_wishes", "num_beams")),
    ("max_gen_toks: 96", ("task qmix_wishes", "96 tokens", "--ctx-size")),
])
def test_what_a_later_task_cannot_have_is_refused_before_the_first_runs(
        store: Path, tasks: Path, only_ours: None, wish: str, words: tuple[str, ...],
        monkeypatch: pytest.MonkeyPatch) -> None:
    (tasks / "qmix_wishes.yaml").write_text(WISHES.format(name="qmix_wishes", data=tasks / "data.jsonl", wish=wish))
    monkeypatch.setattr("qmix.engine.load", lambda *args, **how: pytest.fail("nothing is to be loaded"))
    text = tasks / "text.txt"
    text.write_text("The fox carried a lantern. " * 20)
    done = qmix("eval", store, "--tasks", "qmix_choices,qmix_wishes", "--include-path", tasks, "-c", 96, "-f", text)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    for word in words:
        assert word in done.stderr


def test_figures_are_printed_though_a_later_task_fails(store: Path, tasks: Path, only_ours: None,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: HarnessModel, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise StoreError("experts-00.safetensors: checksum differs")

    monkeypatch.setattr(HarnessModel, "generate_until", fail)
    text = tasks / "text.txt"
    text.write_text("The fox carried a lantern. " * 20)
    done = qmix("eval", store, "--tasks", "qmix_choices,qmix_answers", "--include-path", tasks, "-c", 96, "--json",
                "-f", text)
    assert done.returncode == 4 and "error: task qmix_answers: experts-00.safetensors" in done.stderr
    document = json.loads(done.stdout)
    assert [row["task"] for row in document["tasks"]] == ["qmix_choices"] and document["perplexity"] > 1


def test_a_task_named_twice(store: Path, tasks: Path, only_ours: None) -> None:
    """Once is enough; and a plain string is one name, not its letters."""
    found = prepare("qmix_choices", store, 96, tasks)
    assert [name for name, _ in found._items] == ["qmix_choices"]
    assert len(prepare(["qmix_choices", "qmix_choices"], store, 96, tasks)._items) == 1
    (tasks / "group.yaml").write_text("group: qmix_group\ntask: [qmix_choices]\n")
    with pytest.raises(UsageError, match="part of qmix_group and of qmix_choices"):
        prepare(["qmix_group", "qmix_choices"], store, 96, tasks)

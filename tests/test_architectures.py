"""Every architecture that runs, with real files from end to end: the logits of transformers, and each promise once.

What runs comes from checkpoint.RUN, the configurations from model_configs.py: a new architecture is tested by itself.
The whole matrix of formats is in test_architectures_formats.py.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FIRST, RUNNING, quantized, random_model, write
from helpers import UNQUANTIZED
from model_configs import RUN, ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import Done, qmix
from torch import Tensor

from qmix.bench.roofline import Peaks
from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig, SamplingParams
from qmix.engine import Engine, load
from qmix.errors import CheckpointError
from qmix.kernels import native
from qmix.kernels.kv_size import kv_bytes
from qmix.models import choose_layout, layouts
from qmix.offload.needs import Needs
from qmix.offload.one_token import OneToken
from qmix.offload.plan import RESERVE
from qmix.offload.router_stats import RouterStats
from qmix.offload.trace import read_trace
from qmix.spec import Model
from qmix.store import Store

IDS = torch.randint(3, 500, (60,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPT = 33  # longer than the windows


def logits(engine: Engine, prompt: int = PROMPT, count: int = 13) -> Tensor:
    """[T, V] of the prompt in one pass, then token by token."""
    session = engine.session()
    found = [*session.read(IDS[:prompt])] if engine.plan.needs.scoring else [session.prefill(IDS[:prompt])[None]]
    return torch.cat([*found, *(session.decode(token)[None] for token in IDS[prompt:prompt + count])])


def test_each_has_at_least_four_configurations() -> None:
    kinds = [raw["model_type"] for raw in RUNNING]
    assert all(kinds.count(kind) >= 4 for kind in RUN)


@pytest.mark.parametrize("at", range(len(RUNNING)), ids=[ids(raw) for raw in RUNNING])
def test_the_logits_are_those_of_transformers(at: int, tmp_path: Path) -> None:
    """In fp32: within 1e-4, and the same token wherever the reference's gap exceeds 2e-4."""
    raw = RUNNING[at]
    at -= [other["model_type"] for other in RUNNING].index(raw["model_type"])  # whatever other architectures there are
    model = random_model(raw, seed=at)
    with torch.inference_mode():
        # Gemma4 fails with shared keys unless it is asked for more than logits (transformers 5.23).
        want = model(torch.tensor([IDS[:46]]), use_cache=False, output_hidden_states=True).logits[0]
    source = write(model, raw, tmp_path / "source", published=at % 2 == 0)
    with load(quantized(source, tmp_path / "store", UNQUANTIZED), threads=1, context=64, scoring=True) as engine:
        got = logits(engine)
    assert want.std() > 1  # flat logits would agree by themselves
    assert (got - want).abs().max() < 1e-4
    best = want.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2e-4
    assert sure.sum() > 40
    assert torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])


# --- each promise once ---

@dataclass(frozen=True)
class Files:
    """A checkpoint in bf16, its stores, and the model of transformers that it was made of."""

    source: Path
    int4: Path
    keep: Path
    theirs: Any

    @property
    def model(self) -> Model:
        with Store.open(self.int4) as store:
            return store.model


@pytest.fixture(scope="module", params=RUN)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = random_model(FIRST[request.param], torch.bfloat16)
    source = write(theirs, FIRST[request.param], folder / "source")
    return Files(source, quantized(source, folder / "int4", QuantConfig()),
                 quantized(source, folder / "keep", UNQUANTIZED), theirs)


@pytest.fixture(scope="module")
def want(files: Files) -> Tensor:
    """The logits with everything resident."""
    with load(files.int4, threads=1, context=64) as engine:
        assert engine.plan.resident
        return logits(engine)


def paged(store: Path, **how: Any) -> Engine:
    """Loaded with the fewest slots that qmix runs with."""
    base = 2**28
    with Store.open(store) as opened:
        needs = Needs.of(opened.model, opened.quant, 64, how.get("kv", "bf16"))
    tight = base + RESERVE + needs.dense + needs.kv + needs.workspace + needs.least_bytes
    return load(store, threads=1, context=64, ram=tight, base=base, **how)


@pytest.mark.parametrize("prefetch", ["off", "ahead", "transitions", "both"])
def test_paged_equals_resident(files: Files, want: Tensor, prefetch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that had to be read is computed by way of OneToken, with all that it has: biases too."""
    one_by_one: list[int] = []
    down = OneToken.down
    monkeypatch.setattr(OneToken, "down", lambda self, some: (one_by_one.append(len(some)), down(self, some)))
    with paged(files.int4, prefetch=prefetch) as engine:
        assert not engine.plan.resident
        for _ in range(2):  # the second time with statistics
            assert torch.equal(logits(engine), want)
        figures = engine.stats()["offload"]
    model = files.model
    assert figures["decode"]["chosen"] == 26 * model.chosen
    assert figures["decode"]["hits"] < figures["decode"]["chosen"]
    assert one_by_one or not native.wanted_levels()
    if prefetch != "off":  # without a router there is nothing to guess: the next layers' records are certain
        assert figures["prefetcher"]["issued"] > 0


def test_native_equals_eager(files: Files, want: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(files.int4, threads=1, context=64) as engine:
        logits(engine)
        runs = engine._model.single_tokens
        attends = native.wanted_levels()[:1] not in ([], ["portable"])  # these leave attention to torch
        assert not attends or runs == "native"
    monkeypatch.setattr("qmix.forward.runner.unsupported", lambda *_: "not asked for")
    with load(files.int4, threads=1, context=64) as engine:
        assert torch.equal(logits(engine), want)
        assert engine._model.single_tokens == "not asked for"


def test_drafts_are_exact(files: Files, want: Tensor) -> None:
    for engine in (load(files.int4, threads=1, context=64), paged(files.int4)):
        with engine:
            session = engine.session()
            found = [session.prefill(IDS[:PROMPT])[None]]
            for at in range(PROMPT, PROMPT + 12, 4):
                found.append(session.verify([*IDS[at:at + 4], 3, 4])[:4])  # two that turn out wrong
                session.trim(at + 4)
            assert torch.equal(torch.cat(found), want[:13])
            # Back into the prompt, and on again: where a recurrent state was kept, that is 16 tokens before its end.
            reached = session.reachable(PROMPT - 2)
            session.trim(PROMPT - 2)
            assert session.length == reached == (PROMPT - 16 if session.cache.recurrent else PROMPT - 2)
            again = session.prefill(IDS[reached:PROMPT])
            assert torch.nn.functional.cosine_similarity(again, want[0], dim=0) > 0.98


def test_a_dropped_session_frees_its_cache_at_once(files: Files) -> None:
    """A budget has room for one cache, and the next session needs it."""
    gc.collect()
    gc.disable()
    try:
        with load(files.int4, threads=1, context=64) as engine:
            session = engine.session()
            session.prefill(IDS[:4])
            session.decode(5)
            session.verify([6, 7])
            cache = weakref.ref(session.cache)
            del session
            assert cache() is None
    finally:
        gc.enable()


def test_sessions_in_turns_and_together(files: Files, want: Tensor) -> None:
    with load(files.int4, threads=1, context=64) as engine:
        one, other = engine.session(), engine.session()
        assert torch.equal(one.prefill(IDS[:PROMPT]), want[0])
        other.prefill(IDS[10:50])
        for at in range(6):
            assert torch.equal(one.decode(IDS[PROMPT + at]), want[1 + at])
            other.decode(IDS[50 + at])
        for at in range(6, 9):
            both = engine.step([one, other], [[IDS[PROMPT + at]], [IDS[at]]], "decode")
            assert torch.equal(both[0], want[1 + at])


def test_keys_and_values_in_int8(files: Files, want: Tensor) -> None:
    """Paged as resident to the bit; of the cache in bf16 the logits keep what int8 leaves of them."""
    with load(files.int4, threads=1, context=64, kv="int8") as engine:
        got, nbytes = logits(engine), engine.session().cache.nbytes
    with paged(files.int4, kv="int8") as engine:
        assert torch.equal(logits(engine), got)
        model = engine.model
    states = kv_bytes(model, 0)  # which are no keys
    with load(files.int4, threads=1, context=64) as engine:
        assert nbytes - states < 0.8 * (engine.session().cache.nbytes - states)
    assert not torch.equal(got, want) and model.num_layers
    near = torch.nn.functional.cosine_similarity(got, want, dim=1)
    assert near.min() > 0.98


# --- what is refused ---

def without(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def narrower(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:, 1:].contiguous()


def of_another_dtype(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].float()


def one_more(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}_scale"] = torch.ones(4)


@pytest.mark.parametrize(("change", "words"), [
    (without, "{}: missing (1 of "), (narrower, "{}: got shape "), (of_another_dtype, "{}: got float32, want bfloat16"),
    (one_more, "{}_scale: not a tensor of this model")])
def test_a_checkpoint_that_is_not_of_its_config(files: Files, tmp_path: Path, words: str,
                                                change: Callable[[dict[str, Tensor], str], None]) -> None:
    """A matrix of each kind that the model has, by the name that the file has for it."""
    model = files.model
    with safe_open(files.source / "model.safetensors", "pt") as file:
        table, roles = choose_layout(layouts(model), file.keys()), {}
    for tensor in (*model.tensors(), *model.expert_tensors(model.expert_keys[-1])):
        if len(tensor.shape) == 2:
            roles[tensor.name.rpartition(".")[2]] = table[tensor.name].name
    for at, name in enumerate(roles.values()):
        folder = tmp_path / str(at)
        folder.mkdir()
        (folder / "config.json").write_bytes((files.source / "config.json").read_bytes())
        tensors = load_file(files.source / "model.safetensors")
        change(tensors, name)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError) as refusal:
            Checkpoint.open(folder)
        assert words.format(name) in refusal.value.message and "\n" not in refusal.value.message
        assert refusal.value.cure


# --- commands ---

def good(*args: object, **env: str) -> Done:
    done = qmix(*args, **env)
    assert done.returncode == 0, done.stderr
    return done


def document(*args: object, **env: str) -> Any:
    return json.loads(good(*args, "--json", **env).stdout)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path / "state"


def test_statistics_count_layers_with_records(files: Files, state: Path) -> None:
    """What a run gathers is saved, and added to what the next one gathers."""
    model = files.model
    for runs in (1, 2):
        done = document("generate", files.int4, "--raw", "-p", "the fox and the owl", "-n", 9, "--temp", 0, "--draft",
                        0)
        tokens = runs * len(done["token_ids"])
        found = document("stats", files.int4)
        assert (found["layers"], found["experts"]) == (len(model.record_layers), model.num_experts)
        decode = found["decode"]
        assert [row["layer"] for row in decode["by layer"]] == list(model.record_layers)
        assert tokens - 2 <= decode["tokens"] <= tokens
        for phase in ("prefill", "decode"):
            for row in found[phase]["by layer"]:
                assert sum(row["counts"]) == found[phase]["tokens"] * model.top_k
    saved = next(state.rglob("*.json"))
    with Store.open(files.int4) as store:
        RouterStats.from_json(json.loads(saved.read_text()), len(model.record_layers), model.num_experts)
        assert store.identity in saved.name
    good("stats", files.int4, "--reset")
    assert document("stats", files.int4)["decode"]["tokens"] == 0


def test_the_routing_of_a_text(files: Files, tmp_path: Path) -> None:
    model = files.model
    (tmp_path / "text").write_text("The fox carried a lantern through the dark forest. " * 4)
    found = document("stats", files.int4, "-f", tmp_path / "text", "-c", 64)
    assert (found["layers"], found["experts"], found["chosen"]) == (
        len(model.record_layers), model.num_experts, model.top_k)
    (text,) = found["texts"]
    assert [row["layer"] for row in text["by_layer"]] == list(model.record_layers)
    for layer in range(model.num_layers + 1):
        plots = ("--plot", tmp_path / "plots") if layer == model.record_layers[0] else ()  # of all layers at once
        done = qmix("stats", files.int4, "-f", tmp_path / "text", "-c", 64, "--view", layer, *plots)
        assert done.returncode == (0 if layer in model.record_layers else 2), done.stderr
        assert bool(done.stdout) == (layer in model.record_layers)
    assert all(f">{layer}</option>" in (tmp_path / "plots" / "text.html").read_text() for layer in model.record_layers)


def test_a_trace_is_the_routing_and_replays(files: Files, tmp_path: Path) -> None:
    model = files.model
    with load(files.keep, threads=1, context=64, trace=tmp_path / "trace") as engine:
        logits(engine)
    trace = read_trace(tmp_path / "trace", pytest.fail)
    header = trace.header
    assert (header.layers, header.experts, header.top_k) == (len(model.record_layers), model.num_experts, model.top_k)
    assert [one.tokens for one in trace.passes] == [PROMPT, *[1] * 13]
    found = document_of_replay(tmp_path / "trace", files.keep)
    assert found["decoded tokens"] == 13 and found["layers"] == header.layers
    assert found["policies"]


def document_of_replay(trace: Path, store: Path) -> Any:
    return json.loads(good("replay", trace, "--model", store, "-o", "json").stdout)


def test_the_plan_of_a_config_is_that_of_the_store(files: Files) -> None:
    how = ("--ram", "1G", "--disk", 2, "--ram-speed", 30, "--device", "cpu", "-c", 128)
    by_config = document("plan", files.source / "config.json", *how)
    by_checkpoint = document("plan", files.source, *how)
    by_store = document("plan", files.int4, *how)
    for found in (by_config, by_checkpoint):
        assert {k: v for k, v in found.items() if k not in NAMES} == {
            k: v for k, v in by_store.items() if k not in NAMES}
    assert by_store["records"] == len(files.model.expert_keys)


NAMES = {"model", "source", "store", "name"}


def parameters_of(model: Any) -> int:
    """And the buffers that it writes, such as a router's bias."""
    buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    return sum(p.numel() for p in model.parameters()) + sum(model.get_buffer(name).numel() for name in buffers)


def test_show_counts_as_transformers_does(files: Files) -> None:
    """Parameters; those that a token meets: all but the experts that it does not choose."""
    found, model = document("show", files.int4), files.model
    whole = parameters_of(files.theirs)
    experts = sum(p.numel() for name, p in files.theirs.named_parameters() if ".experts." in name)
    assert found["parameters"] == whole
    idle = experts * (model.num_experts - model.top_k) // model.num_experts if model.moe_layers else 0
    assert found["active_parameters"] == whole - idle
    good("show", files.int4, "--experts")
    good("verify", files.int4)


def test_eval(files: Files, tmp_path: Path) -> None:
    """Perplexity, and the distance from the store of the same weights and from the checkpoint as transformers runs it.
    In bf16 the two with the same weights are apart by their order of summation, which differs by processor; so it is in
    fp32 that they are held to be the same model."""
    (tmp_path / "text").write_text("The fox carried a lantern through the dark forest, and the owl asked. " * 3)
    how = ("-f", tmp_path / "text", "-c", 48, "-n", 90)
    alone = document("eval", files.int4, *how)
    by_store = document("eval", files.int4, *how, "--against", files.keep)
    by_theirs = document("eval", files.int4, *how, "--against", files.source)
    raw = FIRST[files.model.architecture]
    exact = write(random_model(raw), raw, tmp_path / "fp32")
    itself = document("eval", quantized(exact, tmp_path / "keep", UNQUANTIZED), *how, "--against", exact)
    assert alone["perplexity"] == by_store["perplexity"] == by_theirs["perplexity"]
    assert itself["kl_mean"] < 0.1 * by_theirs["kl_mean"]
    assert by_store["kl_mean"] > 0


def test_bench(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.bench.roofline.measure", lambda *_: Peaks(10.0, 100.0, "bfloat16", None))
    monkeypatch.setattr(native.NativeProducts, "peak", lambda self, threads: 1e11)
    found = json.loads(good("bench", files.int4, "-p", 16, "-n", 4, "-r", 1, "-o", "json").stdout)
    assert found


def test_an_answer_with_drafts_is_the_answer_without(files: Files) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    with paged(files.int4) as engine:
        plain, drafted = ([token.id for token in engine.generate("the fox the fox the fox", params, draft=draft)]
                          for draft in (0, 7))
    assert plain == drafted

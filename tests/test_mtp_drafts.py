"""Drafts of a multi-token-prediction head change nothing but the number of passes: resident and paged, greedy and
sampled, in several formats, over two turns; right where the head is right; and what failures leave."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FIRST, quantized
from helpers import UNQUANTIZED
from model_configs import with_keys
from mtp_models import add_tensors, write_with_head
from safetensors.torch import load_file, save_file
from test_mtp import CONTEXT, IDS

from qmix import hardware
from qmix.commands import oneshot
from qmix.commands.plan.report import Machine, describe, find_model
from qmix.config import Cancel, ExpertKey, QuantConfig, SamplingParams
from qmix.device import StandIn
from qmix.engine import Engine, Placement, Session, device_choice, load
from qmix.errors import DoesNotFit, Interrupted
from qmix.generate import common_prefix, generate
from qmix.offload.needs import Needs
from qmix.offload.plan import PROGRAM, RESERVE
from qmix.speculation import MtpPace, Pace
from qmix.speculation import passes as passes_module
from qmix.store import Store

KINDS = ("qwen3_next", "qwen3_5_moe")
FORMATS = {"int4": (torch.bfloat16, QuantConfig()), "keep": (torch.float32, UNQUANTIZED),
           "nf4": (torch.bfloat16, QuantConfig("nf4", "int8", "", 0, 0))}


class Always(MtpPace):
    """As many ids as `lengths` says in turn, whatever they cost."""

    def __init__(self, pace: Pace, lengths: Sequence[int]):
        super().__init__(pace)
        self._lengths, self._turn = lengths, 0

    def length(self, most: int) -> int:
        self._turn += 1
        return min(most, self._lengths[self._turn % len(self._lengths)])


@pytest.fixture(autouse=True)
def no_other_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module.Lookup, "draft", lambda self, longest: None)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder, found = tmp_path_factory.mktemp("mtp"), {}
    for kind in KINDS:
        for name, (dtype, quant) in FORMATS.items():
            if (kind, name) == ("qwen3_next", "nf4"):
                continue
            _, source = write_with_head(FIRST[kind], folder / f"{kind} {name} source", kind == "qwen3_5_moe", dtype)
            found[kind, name] = quantized(source, folder / f"{kind} {name}", quant)
    return found


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token depends on the last one, for the most part, and a head that knows that: what its layer
    adds is nothing, and its projection takes the embedding as it is."""
    folder = tmp_path_factory.mktemp("right")
    raw = FIRST["qwen3_5_moe"]
    _, source = write_with_head(raw, folder / "source", True)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("mtp."):
            continue
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")):
            tensor *= 0.02
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    hidden = raw["text_config"]["hidden_size"]
    quiet = {name: torch.zeros_like(t) for name, t in tensors.items() if name.startswith("mtp.") and name.endswith(
        ("o_proj.weight", "down_proj.weight", "down_proj", "pre_fc_norm_embedding.weight"))}
    final = next(t for name, t in tensors.items() if name.endswith("model.norm.weight"))
    add_tensors(source, {**quiet, "mtp.fc.weight": torch.eye(hidden, 2 * hidden), "mtp.norm.weight": final})
    return quantized(source, folder / "store", UNQUANTIZED)


def loaded(store: Path, lengths: Sequence[int], mtp: bool = True, **how: Any) -> Engine:
    engine = load(store, threads=1, context=CONTEXT, mtp=mtp, **how)
    pace = engine.pace(7)
    assert pace is not None and (pace.mtp is not None) == mtp
    if mtp:
        engine._mtp = pace.mtp = Always(pace, lengths)
    return engine


def paged(store: Path, slots: int, monkeypatch: pytest.MonkeyPatch, lengths: Sequence[int], **how: Any) -> Engine:
    monkeypatch.setattr(hardware, "resident_bytes", lambda: 0)
    # So small a model would fit into the memory that its head's dense part takes.
    monkeypatch.setattr(device_choice, "needs_without_head", lambda store, needs: needs)
    with Store.open(store) as opened:
        needs = Needs.of(opened.model, opened.quant, CONTEXT)
    engine = loaded(store, lengths, ram=fixed(needs) + slots * needs.record, **how)
    assert engine.plan.slots == slots and not engine.plan.resident
    return engine


def fixed(needs: Needs) -> int:
    return RESERVE + needs.dense + needs.kv + needs.workspace


def talk(engine: Engine, seed: int = 0) -> Iterator[Any]:
    """Summaries of a greedy answer, of a sampled one to the next turn, and of another try at it."""
    session, pace = engine.session(), engine.pace(7)
    prompt = IDS[seed:seed + 12]
    for params in (SamplingParams(0.0, max_tokens=40, repeat_penalty=1.05),
                   SamplingParams(0.6, seed=seed, max_tokens=30), SamplingParams(0.9, seed=seed + 7, max_tokens=9)):
        session.trim(common_prefix(prompt, session.ids))
        tokens = list(generate(session, prompt, params, engine.tokenizer, pace=pace))
        summary = tokens[-1].summary
        assert summary is not None and session.ids == [*prompt, *summary.ids[:-1]]
        yield summary
        if len(prompt) == 12:
            prompt = [*prompt, *summary.ids, *IDS[40:45]]


def counted(engine: Engine) -> tuple[Any, int]:
    return engine._offload.stats.total(), engine.stats()["offload"]["decode"]["tokens"]


@pytest.mark.parametrize(("kind", "name", "seed"), [
    ("qwen3_next", "int4", 0), ("qwen3_5_moe", "int4", 3), ("qwen3_next", "keep", 3), ("qwen3_5_moe", "nf4", 0)])
def test_answers_and_statistics_are_the_same(stores: dict[tuple[str, str], Path], kind: str, name: str, seed: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(stores[kind, name], (), mtp=False) as engine:
        want, figures = list(talk(engine, seed)), counted(engine)
        assert engine.session().mtp is None and engine.session().draft(5, 3) == []
    with loaded(stores[kind, name], (2, 0, 3, 1)) as engine:
        assert engine.plan.resident
        got = list(talk(engine, seed))
        assert [one.ids for one in got] == [one.ids for one in want] and counted(engine) == figures
        assert sum(one.timings.drafted for one in got) > 20
    for slots, prefetch in ((26, "both"), (9, "off")):
        with paged(stores[kind, name], slots, monkeypatch, (1, 3), prefetch=prefetch) as engine:
            assert [one.ids for one in talk(engine, seed)] == [one.ids for one in want]
            assert counted(engine) == figures


def test_logits_of_a_prompt_are_the_same_bits(stores: dict[tuple[str, str], Path]) -> None:
    """The head wants the hidden states of all tokens of a prompt, and nothing else that comes out changes for it."""
    rows = []
    for mtp in (False, True):
        with loaded(stores["qwen3_5_moe", "int4"], (3,), mtp) as engine:
            session = engine.session()
            rows.append(torch.stack([session.prefill(IDS[:70]), session.prefill(IDS[70:71]), session.decode(IDS[71])]))
    assert torch.equal(*rows)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_head_that_is_right_saves_passes(right: Path, temperature: float) -> None:
    """Greedy, most of what it says is accepted; sampled, what the sampler would have said too."""
    params, found = SamplingParams(temperature, seed=4, max_tokens=100), []
    for mtp in (False, True):
        with loaded(right, (3,), mtp) as engine:
            tokens = list(generate(engine.session(), IDS[:10], params, engine.tokenizer, pace=engine.pace(7)))
            found.append(tokens[-1].summary)
    alone, drafted = found
    assert alone is not None and drafted is not None and alone.ids == drafted.ids
    share = drafted.timings.accepted / drafted.timings.drafted
    assert share > 0.9 if temperature == 0 else share > 0.1
    assert drafted.timings.decode_passes < (0.4 if temperature == 0 else 0.9) * alone.timings.decode_passes


def test_what_is_cut_back_and_run_again_leaves_only_gaps(stores: dict[tuple[str, str], Path]) -> None:
    """The head goes on after a trim, and says nothing where it has not seen the last token."""
    with loaded(stores["qwen3_next", "keep"], (3,)) as engine:
        session = engine.session()
        assert session.draft(5, 3) == []
        session.prefill(IDS[:30])
        assert len(session.draft(IDS[30], 3)) == 3 and session.draft(IDS[30], 3) == []  # seen, and taken
        session.decode(IDS[30])
        session.trim(session.reachable(20))
        assert session.draft(IDS[session.length], 2) == []
        session.prefill(IDS[session.length:session.length + 3])
        assert len(session.draft(IDS[session.length], 2)) == 2
        assert session.mtp is not None and session.mtp.positions == sorted(set(session.mtp.positions))
        assert session.mtp.positions[-1] == session.length - 1
        full = CONTEXT - session.length
        session.prefill((IDS * 2)[:full - 1])
        assert session.draft(7, 3) == []  # no room behind the next token


def test_cancelled_while_the_head_works(stores: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment that looks whether it is: the session is as it was, and goes on as one that nobody cancelled."""
    class Later(Cancel):
        def __init__(self, left: int):
            super().__init__()
            self.left = left

        def __bool__(self) -> bool:
            self.left -= 1
            return self.left < 0

    works: list[Callable[[Session, Cancel], Any]] = [lambda s, cancel: s.draft(IDS[40], 3, cancel),
                                                     lambda s, cancel: s.prefill(IDS[40:60], cancel)]
    with loaded(stores["qwen3_5_moe", "int4"], (3,)) as engine, \
            paged(stores["qwen3_5_moe", "int4"], 9, monkeypatch, (3,)) as other:
        alone = engine.session()
        alone.prefill(IDS[:40])
        want = alone.decode(IDS[40])
        for one in (engine, other):
            session = one.session()
            for work in works:
                looks = Later(10**6)
                session.trim(0)
                session.prefill(IDS[:40])
                work(session, looks)
                count = 10**6 - looks.left
                assert count > 4
                # A paged engine looks while it waits for a record too, which is not as often each time.
                last = count if one is engine else count // 2
                for left in sorted({*range(0, last, max(1, last // 8)), last - 1}):
                    session.trim(0)
                    session.prefill(IDS[:40])
                    with pytest.raises(Interrupted):
                        work(session, Later(left))
                    assert session.length == 40 and session.mtp is not None
                    assert all(p < 40 for p in session.mtp.positions) and session.mtp.end in (0, 40)
                    assert session.mtp.cache.length == len(session.mtp.positions)
                    assert torch.equal(session.decode(IDS[40]), want)
                    assert len(session.draft(IDS[41], 2)) == 2


def test_the_plan_counts_the_head_and_leaves_it_out_where_it_does_not_pay(stores: dict[tuple[str, str], Path],
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    store = stores["qwen3_5_moe", "int4"]
    monkeypatch.setattr(hardware, "resident_bytes", lambda: 0)
    with Store.open(store) as opened:
        whole, model = Needs.of(opened.model, opened.quant, CONTEXT), opened.model
        opened.leave_out_mtp_head()
        trunk = Needs.of(opened.model, opened.quant, CONTEXT)
        assert opened.kind_of(ExpertKey(3, 7)) == 0
    assert whole.records - trunk.records == whole.mtp == model.num_experts and whole.layers == trunk.layers
    assert whole.dense > trunk.dense and whole.dense - whole.embedding == trunk.dense - trunk.embedding
    assert whole.kv > trunk.kv and whole.workspace > trunk.workspace
    with loaded(store, (2,)) as engine:
        state = engine.session().mtp
        assert engine.plan.needs == whole and state is not None
        assert state.cache.nbytes + engine._model.new_cache(CONTEXT).nbytes == whole.kv
        weights = engine._model._weights.dense
        parts = {t.data_ptr(): t.nbytes for m in weights.matrices.values() for t in m.tensors.values()}  # once each
        held = sum(t.nbytes for t in weights.tensors.values()) + sum(parts.values())
        assert held <= whole.dense and held > trunk.dense

    said: list[str] = []
    ram = fixed(whole) + whole.records * whole.record - 1
    with load(store, threads=1, context=CONTEXT, ram=ram, mtp=True, say=said.append) as engine:
        assert engine.plan.resident and engine.session().mtp is None
    assert [line for line in said if "head" in line] == [
        "the multi-token-prediction head is left out: without it all experts are in memory"]
    del said[:]
    ram = fixed(trunk) + trunk.least_bytes
    with load(store, threads=1, context=CONTEXT, ram=ram, mtp=True, say=said.append) as engine:
        session = engine.session()
        assert session.mtp is None and len(session.prefill(IDS[:20])) > 0
    assert "the multi-token-prediction head is left out: there is no room for it" in said
    with pytest.raises(DoesNotFit):
        load(store, threads=1, context=CONTEXT, ram=ram - 1, mtp=True)


def test_sessions_that_decode_together_go_without(stores: dict[tuple[str, str], Path]) -> None:
    with loaded(stores["qwen3_5_moe", "keep"], (2,)) as engine:
        pair = [engine.session(), engine.session()]
        for one in pair:
            one.prefill(IDS[:20])
        engine.step(pair, [[5], [6]], "decode")
        assert [one.draft(7, 2) for one in pair] == [[], []]
        for one in pair:
            one.decode(8)
        assert all(len(one.draft(7, 2)) == 2 for one in pair)


def test_a_plan_with_a_head_and_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose experts are most of it: the head stays where the others are paged too; `qmix plan` says what
    `load` does, in every case."""
    raw = with_keys(FIRST["qwen3_5_moe"], {"num_experts": 32, "moe_intermediate_size": 128})
    _, source = write_with_head(raw, tmp_path / "source", True, torch.bfloat16)
    store = quantized(source, tmp_path / "store", QuantConfig())
    with Store.open(store) as opened:
        needs, trunk = (Needs.of(model, opened.quant, CONTEXT) for model in (opened.model, opened.model.trunk))
    with load(store, threads=1, context=CONTEXT) as engine:
        want = [one.ids for one in talk(engine)]
    kept = []
    for ram in (fixed(trunk) + trunk.least_bytes, fixed(trunk) + trunk.expert_bytes // 2,
                fixed(trunk) + trunk.expert_bytes, fixed(needs) + needs.expert_bytes):
        said: list[str] = []
        with load(store, threads=1, context=CONTEXT, ram=ram, base=0, mtp=True, say=said.append) as engine:
            pace = engine.pace(7)
            assert pace is not None
            if pace.mtp is not None:
                engine._mtp = pace.mtp = Always(pace, (1, 3))
            got = list(talk(engine))
            plan, slots = engine.plan, engine.plan.slots
        assert [one.ids for one in got] == want
        kept.append((plan.needs.mtp > 0, plan.resident, sum(one.timings.drafted for one in got) > 0))
        told: list[str] = []
        planned = describe(find_model(store, None, None, told.append), CONTEXT, Machine(ram=ram + PROGRAM), None,
                           told.append)
        assert planned["in_memory"] == slots and planned.get("mtp_records", 0) == plan.needs.mtp
        assert planned["plan"][-1:] == plan.lines()[-1:]
        assert [line for line in told if "prediction head" in line] == [
            line for line in said if "prediction head" in line]
    assert kept == [(False, False, False), (True, False, True), (False, True, False), (True, True, True)]


@pytest.mark.parametrize("nbytes", [2**20, 2**34])
def test_a_gpu_costs_the_head_only_where_it_is_used(stores: dict[tuple[str, str], Path], nbytes: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Where --device auto falls back to the CPU, that computes it."""
    monkeypatch.setattr("qmix.engine.machine._any", lambda say: StandIn(nbytes=nbytes))
    monkeypatch.setattr("qmix.engine.machine.TINY", 0)
    said: list[str] = []
    with load(stores["qwen3_next", "int4"], threads=1, context=CONTEXT, placement=Placement("auto"), mtp=True,
              say=said.append) as engine:
        assert (engine.device is None) == (nbytes == 2**20) == (engine.session().mtp is not None)
        assert len(engine.session().prefill(IDS[:20])) > 0
    assert sum("head is left out" in line for line in said) == (engine.device is not None)
    assert any(line.startswith("not on ") for line in said) == (engine.device is None)


def test_reading_late_and_guessing_are_apart(stores: dict[tuple[str, str], Path]) -> None:
    """`catch_up` leaves what a draft takes along, and changes no guess; what prompts cost is counted."""
    with loaded(stores["qwen3_5_moe", "keep"], (3,)) as engine:
        one, other = engine.session(), engine.session()
        assert one.catch_up() is None and one.draft(5, 3) == []
        guessed = []
        for session in (one, other):
            before = engine._mtp._spent if engine._mtp is not None else -1.0
            session.prefill(IDS[:20])
            assert engine._mtp is not None and engine._mtp._spent > before
            before = engine._mtp._spent
            for token in IDS[20:33]:
                session.decode(token)
            assert engine._mtp._spent == before and session.mtp is not None
            waiting = len(session.mtp)
            if session is one:
                session.catch_up()
                assert waiting > 8 and len(session.mtp) == 1
            guessed.append(session.draft(IDS[33], 3))
        assert guessed[0] == guessed[1] and len(guessed[0]) == 3


def test_the_line_comes_behind_the_answer(stores: dict[tuple[str, str], Path]) -> None:
    written: list[str] = []

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    with loaded(stores["qwen3_5_moe", "int4"], (2,)) as engine:
        pace = engine.pace(7)
        assert pace is not None
        pace.mtp = MtpPace(pace, lambda line: written.append(f"say {line}"))
        pace.mtp._switch_off("it loses")
        code = oneshot.run(engine, "a b c", SamplingParams(0.0, max_tokens=9), raw=True, draft=7, stdout=Out())
    (at,) = (i for i, text in enumerate(written) if text.startswith("say "))
    assert code == 0 and at > 2 and written[at - 1].endswith("\n") and not "".join(written[at + 1:]).strip()

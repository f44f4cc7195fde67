"""Drafts on real models: the logits of a pass with several tokens of one session are, bit for bit, those of single
passes, in every format, resident and paged; the statistics count what came true; the KV cache serves the next turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import UNQUANTIZED, write_tiny_checkpoint
from test_paging import page
from test_speculation import Eager
from tokenizer_files import DEMO_TEMPLATE, spm_model

from qmix.checkpoint import Checkpoint
from qmix.config import Cancel, QuantConfig, SamplingParams
from qmix.engine import Engine, Session, load
from qmix.errors import Interrupted
from qmix.formats import nf4
from qmix.formats.packed import Packed
from qmix.generate import common_prefix, generate
from qmix.kernels import bnb, cpu, reference
from qmix.kernels.router import router_logits
from qmix.kernels.rows import bound_formats
from qmix.kernels.table import KernelTable, select
from qmix.quantize import quantize_checkpoint
from qmix.sizes import MatrixSpec
from qmix.speculation import Draft
from qmix.speculation import passes as passes_module
from qmix.tokenizer import Message

QUANTS = {
    "int4": QuantConfig(), "int8": QuantConfig("int8", "int8", "", 0, 0), "int3": QuantConfig("int3", group_size=32),
    "int4 32": QuantConfig("int4", "int4", "rtn", 32, 32), "keep": UNQUANTIZED,
    "nf4": QuantConfig("nf4", "int8", "", 0, 0), "fp4": QuantConfig("fp4", "bf16", "", 0, 0, True),
    "int4, dense bf16": QuantConfig("int4", "bf16", "rtn"), "int4, dense keep": QuantConfig("int4", "keep", "rtn"),
}
# name: (dtype of the checkpoint, format, what else the model has)
MODELS: dict[str, tuple[torch.dtype, str, dict[str, Any]]] = {
    **{name: (torch.bfloat16, name, {}) for name in QUANTS},
    "bf16 by fp32": (torch.float32, "int4, dense keep", {}),
    "keep fp32": (torch.float32, "keep", {}), "keep fp16": (torch.float16, "keep", {}),
    "window": (torch.float32, "keep", {"sliding_window": 7}),
    "window int4": (torch.bfloat16, "int4", {"sliding_window": 5}),
    "odd": (torch.float32, "keep", {"hidden_size": 60, "head_dim": 24, "intermediate_size": 50, "num_local_experts": 5,
                                    "num_experts_per_tok": 3}),
    "mha": (torch.bfloat16, "int4", {"num_key_value_heads": 4}),
}
CONTEXT = 160
IDS = torch.randint(3, 500, (150,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("drafts"), {}
    for name, (dtype, quant, overrides) in MODELS.items():
        source = write_tiny_checkpoint(folder / f"{name} source", dtype=dtype, **{
            "vocab_size": 512, "num_local_experts": 8, **overrides})
        (source / "tokenizer.model").write_bytes(spm_model())
        (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": DEMO_TEMPLATE}))
        with Checkpoint.open(source) as checkpoint:
            quantize_checkpoint(checkpoint, folder / name, QUANTS[quant], threads=1)
        found[name] = folder / name
    return found


def singles(session: Session, ids: Sequence[int]) -> torch.Tensor:
    return torch.stack([session.decode(i) for i in ids])


def verified(session: Session, ids: Sequence[int]) -> torch.Tensor:
    """The same ids in passes of 2 to 8, the last of each followed by wrong drafts that are forgotten."""
    found, done, size = [], 0, 2
    while done < len(ids):
        part = list(ids[done:done + size - size // 3])
        rows = session.verify([*part, *(400 + i for i in range(size - len(part)))])
        session.trim(session.length - (size - len(part)))
        found.append(rows[:len(part)])
        done, size = done + len(part), size % 8 + 1 if size % 8 else 2
    return torch.cat(found)


@pytest.mark.parametrize(("name", "threads"), [*((name, 1) for name in MODELS), ("int4", 2), ("keep fp32", 2)])
def test_rows_have_the_bits_of_single_passes(stores: dict[str, Path], name: str, threads: int) -> None:
    try:
        with load(stores[name], threads=threads, context=CONTEXT) as engine:
            alone, together = engine.session(), engine.session()
            assert torch.equal(alone.prefill(IDS[:20]), together.prefill(IDS[:20]))
            end = 120 if threads == 1 else 50  # two threads on so small a model take long where others compute too
            assert torch.equal(singles(alone, IDS[20:end]), verified(together, IDS[20:end]))
            assert alone.ids == together.ids
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("prefetch", ["off", "both"])
@pytest.mark.parametrize("slots", [23, 12, 4])
@pytest.mark.parametrize("name", ["int4", "keep fp32"])
def test_paged_rows_have_them_too(stores: dict[str, Path], name: str, slots: int, prefetch: str,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    with load(stores[name], threads=1, context=CONTEXT) as engine:
        session = engine.session()
        session.prefill(IDS[:20])
        want = singles(session, IDS[20:80])
    with page(monkeypatch, stores[name], slots, prefetch=prefetch, context=CONTEXT) as engine:
        session = engine.session()
        session.prefill(IDS[:20])
        assert torch.equal(verified(session, IDS[20:80]), want)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cols", [64, 100, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_rows_are_independent_and_right(dtype: torch.dtype, cols: int, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        weight, x = torch.randn(1500, cols).to(dtype), torch.randn(8, cols).to(dtype)
        got = cpu.few_rows(x, weight)
        for count in range(1, 9):
            assert torch.equal(cpu.few_rows(x[:count].clone(), weight), got[:count])
            assert torch.equal(cpu.few_rows(x[count - 1:count].clone(), weight)[0], got[count - 1])
        want = x.double() @ weight.double().T
        assert (got.double() - want).norm() <= (2**-8 if dtype == torch.bfloat16 else 1e-6) * want.norm()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_few_rows_of_4_bit_floats_too(name: str) -> None:
    m = nf4.pack(torch.randn(300, 192), MatrixSpec(name, 300, 192))
    for x in (torch.randn(8, 192), torch.randn(8, 192).bfloat16()):
        alone = torch.cat([bnb.linear(row.clone(), m) for row in x.split(1)])
        assert torch.equal(bnb.linear(x, m), alone)


def test_few_tokens_are_routed_as_alone() -> None:
    """Sums that cancel, so that every bit of the fp64 product shows in fp32."""
    half, column = torch.randn(8, 500), torch.randn(4, 500).double()
    x, router = torch.cat([half, half], 1), torch.cat([column, -column], 1)
    order = torch.randperm(1000)
    x, router = x[:, order].contiguous(), router[:, order].contiguous()
    for count in range(1, 9):
        got = router_logits(x[:count], router)
        assert torch.equal(got, torch.cat([router_logits(row.clone(), router) for row in x[:count].split(1)]))


# --- where rows depend on each other ---

def test_this_machine_keeps_rows_apart() -> None:
    assert bound_formats(select({"int4", "int8", "nf4", "bf16"}, say=lambda line: None)) == []


def test_a_kernel_whose_rows_depend_on_each_other_forbids_drafts(stores: dict[str, Path],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def bound(x: torch.Tensor, m: Packed) -> torch.Tensor:
        y = reference.packed_linear(x, m)
        return y + (2**-7 * y.abs().max() if len(x) == 5 else 0)

    table = KernelTable({("int8", 0): bound, ("int4", 64): reference.packed_linear, ("bf16", 0): bound}, {})
    assert bound_formats(table) == ["int8"]
    said: list[str] = []
    with load(stores["int4"], threads=1, context=CONTEXT) as engine:
        assert engine.pace(0, said.append) is None and said == []
        assert engine.pace(3) is not None
        monkeypatch.setattr(engine, "_kernels", table)
        assert engine.pace(7, said.append) is None
    assert len(said) == 1 and "no drafts: here a row of int8 depends" in said[0]


def test_no_drafts_in_a_trace(stores: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    with load(stores["int4"], threads=1, context=CONTEXT, trace=tmp_path / "trace") as engine:
        assert engine.pace(7, said.append) is None
    assert said == ["no drafts while a trace is recorded: it shows one token a pass"]


# --- whole answers ---

def answer(engine: Engine, session: Session, prompt: Sequence[int], pace: Eager | None, **params: Any) -> Any:
    session.trim(common_prefix(prompt, session.ids))
    tokens = list(generate(session, prompt, SamplingParams(**params), engine.tokenizer, pace=pace))
    assert session.ids == [*prompt, *tokens[-1].summary.ids[:-1]]  # type: ignore[union-attr]
    return tokens[-1].summary


@pytest.mark.parametrize("name", ["int4", "keep", "nf4", "window"])
def test_answers_and_statistics_are_the_same(stores: dict[str, Path], name: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled, over two turns; what routers chose is counted for the tokens that stayed, and no other.
    Random weights repeat nothing, so the drafts are the plain run's answers with every fourth id wrong."""
    found: list[Any] = []

    class Oracle:
        def __init__(self, ids: Sequence[int]):
            self._ids = list(ids)

        def push(self, token_id: int) -> None:
            self._ids.append(token_id)

        def draft(self, longest: int) -> Draft:
            first, second = found[0][0][:2]
            prompt = [*IDS[:12], *first, *IDS[20:25]]
            whole = [*prompt, *second] if self._ids[:len(prompt)] == prompt else [*IDS[:12], *first]
            at = len(self._ids)
            return Draft(tuple((i + (n % 4 == 0)) % 512 for n, i in enumerate(whole[at:at + longest], at)) or (7,), 3)

    monkeypatch.setattr(passes_module, "Lookup", Oracle)
    for drafts in (False, True):
        with load(stores[name], threads=1, context=CONTEXT) as engine:
            session, pace = engine.session(), Eager((7, 2, 4)) if drafts else None
            first = answer(engine, session, IDS[:12], pace, temperature=0.0, max_tokens=60, repeat_penalty=1.05)
            prompt = [*IDS[:12], *first.ids, *IDS[20:25]]
            second = answer(engine, session, prompt, pace, temperature=0.4, seed=5, max_tokens=50)
            assert second.timings.cached_tokens == 12 + len(first.ids) - 1
            counts = engine._offload.stats.total("decode")
            figures = engine.stats()["offload"]["decode"]
            found.append(((first.ids, second.ids, counts), figures["tokens"], figures["passes"], first.timings))
    (want, tokens, passes, _), (got, drafted_tokens, drafted_passes, timings) = found
    assert got == want
    assert tokens == drafted_tokens == passes > drafted_passes
    assert timings.drafted > timings.accepted >= timings.passes_saved > 0


def test_cancelled_inside_a_verified_pass(stores: dict[str, Path]) -> None:
    class Later(Cancel):
        left = 5

        def __bool__(self) -> bool:
            self.left -= 1
            return self.left < 0

    with load(stores["int4"], threads=1, context=CONTEXT) as engine:
        session, alone = engine.session(), engine.session()
        for one in (session, alone):
            one.prefill(IDS[:9])
        with pytest.raises(Interrupted):
            session.verify(IDS[9:13], Later())
        assert session.ids == IDS[:9]
        assert torch.equal(session.decode(IDS[9]), alone.decode(IDS[9]))
        assert engine._offload.stats.total("decode").tokens == 2


@pytest.mark.parametrize("drafts", [False, True])
def test_a_conversation_is_computed_once(stores: dict[str, Path], drafts: bool) -> None:
    """The whole earlier conversation is in the KV cache when the next question comes: all but what is new, the last
    id of the answer and the end of the turn, is cached; also after an undo and a second try."""
    with load(stores["int4"], threads=1, context=CONTEXT) as engine:
        session, pace, encode = engine.session(), Eager() if drafts else None, engine.tokenizer.encode_chat
        talk = [Message("user", "the fox")]
        one = answer(engine, session, encode(talk), pace, temperature=0.0, max_tokens=20)
        held = list(session.ids)
        assert one.answer_ids is not None
        talk += [Message("assistant", engine.tokenizer.decode(one.answer_ids), one.answer_ids), Message("user", "why?")]
        two = answer(engine, session, encode(talk), pace, temperature=0.5, seed=1, max_tokens=20)
        assert two.timings.cached_tokens == len(held) == common_prefix(held, encode(talk))
        again = answer(engine, session, encode(talk), pace, temperature=0.5, seed=2, max_tokens=20)  # /regen
        assert again.timings.cached_tokens == len(encode(talk)) - 1
        talk[-1] = Message("user", "where?")  # /undo, another question
        other = answer(engine, session, encode(talk), pace, temperature=0.0, max_tokens=20)
        assert other.timings.cached_tokens >= len(held)



"""The bundled model: small, a plain Mixtral to transformers, and able to hold its short conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import UNQUANTIZED

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig, SamplingParams
from qmix.demo import CHECKPOINT, demo_store
from qmix.engine import Engine, load
from qmix.quantize import quantize_checkpoint
from qmix.store import Store
from qmix.tokenizer import Message


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    said: list[str] = []
    out = demo_store(tmp_path_factory.mktemp("demo") / "models" / "demo", said.append)
    assert said
    with load(out, threads=1) as engine:
        yield engine


def answer(engine: Engine, *messages: Message) -> str:
    params = SamplingParams(temperature=0, max_tokens=300)
    return "".join(token.text for token in engine.generate(list(messages), params))


def test_it_is_small() -> None:
    assert sum(p.stat().st_size for p in CHECKPOINT.iterdir()) <= 12_000_000
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        assert (checkpoint.model.num_experts, checkpoint.model.top_k) == (8, 2)
        assert checkpoint.skipped == ()


@pytest.mark.parametrize("character", ["fox", "dragon"])
def test_it_tells_the_story_that_was_asked_for(engine: Engine, character: str) -> None:
    story = answer(engine, Message("user", f"Tell me a story about a {character} and a lantern."))
    assert character in story and "lantern" in story
    assert story.count(".") >= 5 and story[-1] in ".!?\"”"


def test_it_knows_what_it_is_part_of(engine: Engine) -> None:
    assert "expert" in answer(engine, Message("user", "What is a Mixture-of-Experts model?")).lower()
    assert "qmix quantize" in answer(engine, Message("user", "How do I quantize a model?"))


def test_it_stays_in_the_conversation(engine: Engine) -> None:
    question = Message("user", "Tell me a story about an owl.")
    story = Message("assistant", answer(engine, question))
    another = answer(engine, question, story, Message("user", "Another one, please."))
    assert len(another.split()) > 30 and another != story.content


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, experts_implementation="eager")
    wide = tmp_path / "fp32"
    model.save_pretrained(wide)
    (wide / "tokenizer.model").write_bytes((CHECKPOINT / "tokenizer.model").read_bytes())
    (wide / "tokenizer_config.json").write_bytes((CHECKPOINT / "tokenizer_config.json").read_bytes())
    with Checkpoint.open(wide) as checkpoint:
        quantize_checkpoint(checkpoint, tmp_path / "store", UNQUANTIZED)
    with load(tmp_path / "store", threads=1) as engine:
        ids = engine.tokenizer.encode_chat([Message("user", "Tell me a story about a fox.")])
        with torch.inference_mode():
            want = model(torch.tensor([ids])).logits[0, -1]
        got = engine.session().prefill(ids)
    assert (got - want).abs().max() <= 1e-4


def test_a_store_of_another_checkpoint_or_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    said: list[str] = []
    out = demo_store(tmp_path / "demo", said.append)
    assert len(said) == 1
    demo_store(out, said.append)
    assert len(said) == 1, "the second time finds it"
    manifest = json.loads((out / "qmix.json").read_text())
    manifest["format_version"] = 99
    (out / "qmix.json").write_text(json.dumps(manifest))
    demo_store(out, said.append)
    assert len(said) == 2
    with Store.open(out) as store:
        assert store.quant == QuantConfig(block=store.quant.block)

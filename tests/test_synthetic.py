"""The synthetic models of benchmarks/: a store that loads, and a GGUF that the package gguf reads, with the same
embedding, routers and norms."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import synthetic  # noqa: E402
import synthetic_gguf  # noqa: E402
from synthetic_recipe import RECIPES, VOCAB, Qwen3Recipe, Recipe, tokens_of  # noqa: E402

from qmix.config import ExpertKey  # noqa: E402
from qmix.demo import CHECKPOINT  # noqa: E402
from qmix.engine import load  # noqa: E402
from qmix.store import Store  # noqa: E402


class Small(Qwen3Recipe):
    @property
    def vocab(self) -> int:
        """A few more than the vocabulary of the tokens has, as with the whole model."""
        return VOCAB + 300


TINY = Small(2, hidden=512, inner=256)


def test_a_small_qwen3_loads_and_routes_to_eight_of_128(tmp_path: Path) -> None:
    nbytes = synthetic.write_store(TINY, tmp_path / "store", tokenizer=CHECKPOINT / "tokenizer.model")
    with Store.open(tmp_path / "store") as store:
        model = store.model
        assert nbytes == store.layout.nbytes
        assert (len(store.layout.records), model.num_experts, model.top_k) == (2 * 128, 128, 8)
        first, second = (torch.empty(store.layout.record_bytes, dtype=torch.uint8) for _ in range(2))
        store.read_record(ExpertKey(0, 0), first)
        store.read_record(ExpertKey(0, 1), second)
        assert not torch.equal(first, second)
    with load(tmp_path / "store", threads=1, context=64) as engine:
        session = engine.session()
        assert session.prefill(tokens_of("uniform", 20)).isfinite().all()
        assert session.decode(700).isfinite().all()
        chosen = engine.stats()["offload"]["decode"]["chosen"]
    assert chosen == 2 * 8


def test_its_gguf_is_read_by_gguf_and_has_the_stores_embedding_routers_and_norms(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    pytest.importorskip("mistral_common", reason="the vocabulary of the file is in mistral-common")
    path = tmp_path / "model.gguf"
    nbytes = synthetic_gguf.write_gguf(TINY, path)
    reader = gguf.GGUFReader(path)
    assert nbytes == path.stat().st_size
    for key, want in (("general.architecture", "qwen3moe"), ("qwen3moe.expert_count", 128),
                      ("qwen3moe.expert_used_count", 8), ("qwen3moe.expert_feed_forward_length", 256),
                      ("qwen3moe.attention.key_length", 128), ("qwen3moe.block_count", 2)):
        assert reader.get_field(key).contents() == want
    tensors = {t.name: t for t in reader.tensors}
    assert {n for n, *_ in synthetic_gguf.drafts(TINY)} == tensors.keys()
    synthetic.write_store(TINY, tmp_path / "store", tokenizer=CHECKPOINT / "tokenizer.model")
    with Store.open(tmp_path / "store") as store:
        def plain(name: str) -> NDArray[np.float32]:
            return store.dense(name).float().numpy()

        assert np.array_equal(np.float16(plain("embedding")), tensors["token_embd.weight"].data)
        for layer in range(2):
            router = next(t.name for t in store.model.tensors() if t.role == "router" and f".{layer}." in t.name)
            assert np.array_equal(plain(router), tensors[f"blk.{layer}.ffn_gate_inp.weight"].data)
            assert (tensors[f"blk.{layer}.attn_q_norm.weight"].data == 1).all()
    # Experts are other numbers of the same deviation: Q4_0's step is rounded to 11 bits, the codes are uniform.
    for name, spread in (("ffn_gate_exps", TINY.spread("w13")), ("ffn_down_exps", TINY.spread("w2"))):
        whole = tensors[f"blk.0.{name}.weight"]
        weights = gguf.dequantize(whole.data, whole.tensor_type)
        assert weights.shape == (128, *((512, 256) if "down" in name else (256, 512)))
        assert weights.std() == pytest.approx(spread, rel=0.01)


@pytest.mark.parametrize(("model", "layers", "store", "peer"), [
    ("qwen3", 48, 18.2e9, 18.3e9), ("qwen3", 24, 9.6e9, 9.6e9), ("mixtral", 32, 27.1e9, 27.2e9)])
def test_how_large_both_files_become(model: str, layers: int, store: float, peer: float) -> None:
    recipe: Recipe = RECIPES[model](layers)
    assert synthetic.layout_of(recipe)[2].nbytes == pytest.approx(store, rel=0.01)
    sizes = [synthetic_gguf.tensor_bytes(kind, shape) for _, kind, shape, _ in synthetic_gguf.drafts(recipe)]
    assert sum(sizes) == pytest.approx(peer, rel=0.01)
    # Neither writer holds more than one tensor of a layer in memory.
    assert max(sizes) < 0.7e9

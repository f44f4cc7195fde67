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

import gguf_blocks  # noqa: E402
import synthetic  # noqa: E402
import synthetic_gguf  # noqa: E402
from synthetic_models import RECIPES, GptOssRecipe, Qwen3Recipe, Qwen35Recipe  # noqa: E402
from synthetic_recipe import VOCAB, Recipe, tokens_of  # noqa: E402

from qmix.config import ExpertKey  # noqa: E402
from qmix.demo import CHECKPOINT  # noqa: E402
from qmix.engine import load  # noqa: E402
from qmix.formats import unpack  # noqa: E402
from qmix.store import Store  # noqa: E402


class SmallQwen3(Qwen3Recipe):
    vocab = VOCAB + 300  # a few more than the vocabulary of the tokens has, as with the whole model


class SmallGptOss(GptOssRecipe):
    vocab = VOCAB + 300


class SmallQwen35(Qwen35Recipe):
    vocab = VOCAB + 300
    experts = 16


TINY = {"qwen3": SmallQwen3(2, hidden=512, inner=256), "gpt-oss": SmallGptOss(2, hidden=384, inner=320),
        "qwen35": SmallQwen35(4, hidden=256, inner=128)}


def in_llama_cpp(name: str, values: NDArray[np.float32], recipe: Recipe) -> NDArray[np.float32]:
    """Qwen3.5's plain tensors as llama.cpp keeps them: value head 2 i + j of key head i stands at i + j key heads."""
    part, keys = name.split(".")[-1], recipe.hidden // 128
    order = [2 * (at % keys) + at // keys for at in range(2 * keys)]
    if part == "conv":
        values[-2 * keys * 128:] = values[-2 * keys * 128:].reshape(2 * keys, 128, -1)[order].reshape(-1, 4)
    elif part in ("a", "b", "a_log", "dt_bias"):
        values = values[order]
    if part == "a_log":
        return -np.exp(values)
    return values + 1 if ("norm" in name and "delta" not in name) or "before" in name else values.squeeze()


@pytest.fixture(scope="module", params=TINY)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe and its store."""
    tiny, path = TINY[request.param], tmp_path_factory.mktemp(request.param) / "store"
    nbytes = synthetic.write_store(tiny, path, tokenizer=CHECKPOINT / "tokenizer.model")
    with Store.open(path) as store:
        assert nbytes == store.layout.nbytes
    return tiny, path


def test_a_small_model_loads_and_routes(written: tuple[Recipe, Path]) -> None:
    tiny, path = written
    with Store.open(path) as store:
        model = store.model
        assert (len(store.layout.records), model.top_k) == (tiny.layers * tiny.experts, tiny.chosen)
        assert store.quant.experts == tiny.expert_format
        first, second = (torch.empty(store.layout.record_bytes, dtype=torch.uint8) for _ in range(2))
        store.read_record(ExpertKey(0, 0), first)
        store.read_record(ExpertKey(0, 1), second)
        assert not torch.equal(first, second)
        for packed, matrix in zip(store.expert(ExpertKey(0, 0), first), ("w13", "w2"), strict=True):
            assert float(unpack(packed).std()) == pytest.approx(tiny.spread(matrix), rel=0.02)
    with load(path, threads=1, context=64) as engine:
        session = engine.session()
        assert session.prefill(tokens_of("uniform", 20)).isfinite().all()
        assert session.decode(700).isfinite().all()
        chosen = engine.stats()["offload"]["decode"]["chosen"]
    assert chosen == tiny.layers * tiny.chosen


def test_its_gguf_is_read_by_gguf_and_has_the_stores_plain_numbers(written: tuple[Recipe, Path],
                                                                   tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    pytest.importorskip("mistral_common", reason="the vocabulary of the file is in mistral-common")
    (tiny, folder), path = written, tmp_path / "model.gguf"
    nbytes = synthetic_gguf.write_gguf(tiny, path)
    reader = gguf.GGUFReader(path)
    assert nbytes == path.stat().st_size
    assert reader.get_field("general.architecture").contents() == tiny.gguf
    for key, want in (("expert_count", tiny.experts), ("expert_used_count", tiny.chosen), ("block_count", tiny.layers),
                      ("expert_feed_forward_length", tiny.inner), ("attention.key_length", tiny.head_dim)):
        assert reader.get_field(f"{tiny.gguf}.{key}").contents() == want
    tensors = {t.name: t for t in reader.tensors}
    assert {n for n, *_ in synthetic_gguf.drafts(tiny)} == tensors.keys()
    with Store.open(folder) as store:
        for tensor in store.model.tensors():  # those that no format packs
            found = tensors[synthetic_gguf.name_of(tiny, tensor)]
            if store.layout.specs[tensor.name] is None:
                values = store.dense(tensor.name).float().numpy()
                if tiny.gguf == "qwen35moe" and tensor.role != "embedding":
                    values = in_llama_cpp(tensor.name, values, tiny)
                assert np.array_equal(np.float16(values) if tensor.role == "embedding" else values, found.data)
    # Experts are other numbers of the same deviation: Q4_0's step is rounded to 11 bits, the codes are uniform.
    for matrix, spread in (("ffn_gate_exps", tiny.spread("w13")), ("ffn_down_exps", tiny.spread("w2"))):
        whole = tensors[f"blk.0.{matrix}.weight"]
        weights = gguf.dequantize(whole.data, whole.tensor_type)
        rows, cols = (tiny.hidden, tiny.inner) if "down" in matrix else (tiny.inner, tiny.hidden)
        assert weights.shape == (tiny.experts, rows, cols)
        assert weights.std() == pytest.approx(spread, rel=0.01)


@pytest.mark.parametrize(("model", "layers", "store", "peer"), [
    ("qwen3", 48, 18.2e9, 18.3e9), ("qwen3", 24, 9.6e9, 9.6e9), ("mixtral", 32, 27.1e9, 27.2e9),
    ("gpt-oss", 24, 12.6e9, 12.6e9), ("qwen35", 10, 6.4e9, 6.5e9)])
def test_how_large_both_files_become(model: str, layers: int, store: float, peer: float) -> None:
    recipe: Recipe = RECIPES[model](layers)
    assert synthetic.layout_of(recipe)[2].nbytes == pytest.approx(store, rel=0.01)
    sizes = [gguf_blocks.tensor_bytes(kind, shape) for _, kind, shape, _ in synthetic_gguf.drafts(recipe)]
    assert sum(sizes) == pytest.approx(peer, rel=0.01)
    # Neither writer holds more than one tensor of a layer, or the embedding, in memory.
    assert max(sizes) < 1.2e9

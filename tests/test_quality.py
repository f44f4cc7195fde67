"""The orderings that docs/quality.md reports: methods at equal bits, mixes beside plain formats at equal size; by
`qmix.evaluate`, against the model unquantized. On the bundled model; `make test-models` has a larger one, where it is
there.

Both are in fp32, which holds their bf16 weights exactly: where a processor has no products of bf16, torch multiplies
fp32 several times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from helpers import UNQUANTIZED
from test_evaluate import in_fp32

from qmix import evaluate
from qmix.bench import recorded_text
from qmix.checkpoint import Checkpoint
from qmix.config import Cancel, QuantConfig
from qmix.demo import CHECKPOINT
from qmix.engine import load
from qmix.quantize import Calibration, quantize_checkpoint
from qmix.quantize.fit import Wanted, mixed
from qmix.quantize.sensitivity import measure
from qmix.store import StoreLayout
from qmix.tokenizer import load as load_tokenizer

Divergence = Callable[..., float]


def grouped(name: str, method: str, group: int = 64) -> QuantConfig:
    return QuantConfig(name, "keep", method, group, 32)


NF4 = QuantConfig("nf4", "keep", "", 0, 0)


def calibration(source: Path, text: str, tokens: int) -> Calibration:
    with Checkpoint.open(source) as checkpoint:
        config = checkpoint.model
    tokenizer = load_tokenizer(source, config.vocab)
    return Calibration.of_text(tokenizer.encode("", bos=True), tokenizer.encode(text, bos=False), tokens,
                               config.max_positions)


def divergence(source: Path, folder: Path, held_out: str, seen: Calibration, most: int, name: str,
               quant: QuantConfig) -> float:
    """Mean KL of a store made as `quant` says, from the unquantized one, on the text held out."""
    for out, how in ((folder / "keep", UNQUANTIZED), (folder / name, quant)):
        if not out.exists():
            with Checkpoint.open(source) as checkpoint:
                quantize_checkpoint(checkpoint, out, how, calibration=seen if how.method == "gptq" else None, threads=2)
    request = evaluate.Request(folder / name, held_out, name, folder / "journals", reference=folder / "keep",
                               window=256, most=most, activations="bf16")
    document = evaluate.run(request, lambda store, context, part: load(
        store, context=context, ram=part.ram[0], base=part.ram[1], threads=1, activations="bf16", scoring=True),
        cancel=Cancel(), say=lambda line: None, progress=lambda done, total, label: None)
    return document["kl_mean"]


def like(source: Path, seen: Calibration, plain: QuantConfig) -> QuantConfig:
    """A mix that takes no more bytes than experts in that plain format do."""
    torch.set_num_threads(1)
    with Checkpoint.open(source) as checkpoint, ThreadPoolExecutor(2) as pool:
        config = checkpoint.model
        found = measure(checkpoint, seen.part(512), "hqq", plain.block, pool)
    layout = StoreLayout.of(config, plain)
    nbytes = sum(layout.record(key).nbytes for key in config.expert_keys)
    weights = 3 * config.hidden * config.expert_inner * len(config.expert_keys)
    quant, choice = mixed(config, plain, found, Wanted(bits=8 * (nbytes + 1) / weights))
    assert choice.nbytes <= nbytes
    return quant


Bundled = tuple[Divergence, Path, Calibration]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Bundled:
    """A text of a kind that the toy does not know: half of it to calibrate on, half held out."""
    text, folder = recorded_text(), tmp_path_factory.mktemp("quality")
    source = in_fp32(CHECKPOINT, folder / "source")
    seen = calibration(source, text[:len(text) // 2], 2048)
    kl = cache(partial(divergence, source, folder, text[len(text) // 2:], seen, -1))
    return kl, source, seen


@pytest.mark.timeout(900)
def test_the_bundled_models_methods(bundled: Bundled) -> None:
    kl, *_ = bundled
    rtn, hqq = (kl(f"int4-{method}", grouped("int4", method)) for method in ("rtn", "hqq"))
    assert hqq < 0.95 * rtn
    assert hqq < kl("nf4", NF4), "at equal bits, 4.5"
    three = kl("int3-hqq", grouped("int3", "hqq"))
    assert kl("int3-gptq", grouped("int3", "gptq")) < 0.95 * three
    assert hqq < three < kl("int2-hqq", grouped("int2", "hqq"))
    assert kl("int8", QuantConfig("int8", "keep", "", 0, 0)) < 0.3 * hqq  # most of it bf16 products


@pytest.mark.timeout(900)
def test_the_bundled_models_mix(bundled: Bundled) -> None:
    kl, source, seen = bundled
    plain = grouped("int3", "hqq")
    assert kl("mixed-like-int3", like(source, seen, plain)) < 0.7 * kl("int3-hqq", plain)


@pytest.mark.models
@pytest.mark.timeout(900)
def test_a_trained_models_methods(wiki_moe: Path, tmp_path: Path) -> None:
    data = wiki_moe.parents[1] / "data"
    source = in_fp32(wiki_moe, tmp_path / "source")
    seen = calibration(source, (data / "c4.txt").read_text()[:200_000], 4096)
    held_out = (data / "wikitext2-test.txt").read_text()[:8_000]
    kl = partial(divergence, source, tmp_path, held_out, seen, 1500)
    rtn, hqq, gptq = (kl(method, grouped("int4", method)) for method in ("rtn", "hqq", "gptq"))
    assert gptq < 0.9 * hqq < 0.9 * rtn
    assert hqq < kl("nf4", NF4)

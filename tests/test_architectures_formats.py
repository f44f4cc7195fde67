"""Every architecture that runs in every format and by every method. `make test-models` runs it, `make test` does not.

keep and int4 g64 hqq are in test_architectures.py.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch
from architectures import FIRST, quantized, random_model, write
from helpers import UNQUANTIZED
from model_configs import RUN, with_keys
from test_architectures import IDS, PROMPT, good, logits, paged
from test_budget import MIB, command, run
from torch import Tensor

from qmix.config import QuantConfig
from qmix.engine import load
from qmix.store import Store

pytestmark = pytest.mark.models

PLAIN = {"method": "", "group_size": 0, "block": 0}
QUANTS = {
    **{f"{bits} g{group} block {block} {method}": QuantConfig(bits, "int8", method, group, block)
       for bits, group, block, method in itertools.product(("int4", "int3", "int2"), (32, 64, 128), (64, 32),
                                                           ("rtn", "hqq"))
       if bits == "int4" or (block == 64 and method == "hqq")},
    **{f"{kind}, dense {dense}": QuantConfig(kind, dense, **PLAIN)
       for kind, dense in itertools.product(("int8", "nf4", "fp4", "mxfp4", "keep"), ("int8", "bf16", "keep"))
       if kind != "keep" or dense != "keep"},
    **{f"int4, dense {dense}": QuantConfig("int4", dense) for dense in ("int4", "bf16", "keep")},
    "nf4 twice": QuantConfig("nf4", double_quant=True, **PLAIN), "nf4, dense int4": QuantConfig("nf4", "int4"),
    "mxfp4, dense int4": QuantConfig("mxfp4", "int4"),
}
# The least cosine of logits with those of `keep`. It shows that a matrix is not another one's, no more: random weights
# are the hardest to quantize, and a router that chooses otherwise changes everything behind it.
LEAST = {"int2": 0.1, "int3": 0.5, "int4": 0.8, "nf4": 0.8, "fp4": 0.8, "mxfp4": 0.8, "int8": 0.95, "keep": 0.95}


@pytest.fixture(scope="module", params=RUN)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(FIRST[request.param], torch.bfloat16)
    return write(model, FIRST[request.param], tmp_path_factory.mktemp("formats") / request.param)


@pytest.fixture(scope="module")
def kept(source: Path) -> Tensor:
    with load(quantized(source, source.parent / "keep", UNQUANTIZED), threads=1, context=64) as engine:
        return logits(engine)


def check(store: Path, least: float, kept: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is whole; paged, by the eager runner and with drafts it gives the same bits; its logits are near those
    of the unquantized weights."""
    with Store.open(store) as opened:
        assert opened.verify(deep=True) == []
    with load(store, threads=1, context=64) as engine:
        want = logits(engine)
        session = engine.session()
        session.prefill(IDS[:PROMPT])
        if engine.pace(7) is not None:
            assert torch.equal(session.verify(IDS[PROMPT:PROMPT + 5]), want[1:6])
    with paged(store, prefetch="ahead") as engine:
        needs = engine.plan.needs  # --bpw may make so few records of a kind that the fewest slots are all
        assert engine.plan.resident == (needs.least_slots == needs.records)
        assert torch.equal(logits(engine), want)
    monkeypatch.setattr("qmix.forward.runner.unsupported", lambda *_: "not asked for")
    with load(store, threads=1, context=64) as engine:
        assert torch.equal(logits(engine), want)
    near = torch.nn.functional.cosine_similarity(want, kept, dim=1).median()
    print(f"cosine {near:.3f}")
    assert near > least


@pytest.mark.parametrize("name", QUANTS)
def test_a_format(source: Path, kept: Tensor, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quant = QUANTS[name]
    check(quantized(source, tmp_path / "store", quant), LEAST[quant.experts], kept, monkeypatch)


def test_a_mixed_store(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of two kinds, in turns, of so many experts that paging has fewer slots of each kind than records; layers
    without records have an empty line."""
    tiny = FIRST[source.name]
    more = {key: 24 for key in ("num_experts", "num_local_experts", "n_routed_experts")
            if key in tiny.get("text_config", tiny)}
    raw = with_keys(tiny, more or {"num_hidden_layers": 8})
    many = write(random_model(raw, torch.bfloat16), raw, tmp_path / "many")
    with load(quantized(many, tmp_path / "keep", UNQUANTIZED), threads=1, context=64) as engine:
        model, kept = engine.model, logits(engine)
    mix = tuple("".join(str((layer + expert) % 2) for expert in range(model.experts_in(layer)))
                for layer in range(model.num_layers))
    quant = QuantConfig("mixed", method="hqq", kinds=(("int4g64", "int4g32"), ("int3g64", "int4g32")), mix=mix)
    check(quantized(many, tmp_path / "store", quant), LEAST["int3"], kept, monkeypatch)


@pytest.mark.parametrize("how", [("--method", "gptq"), ("--method", "gptq", "--dense", "int4"), ("--bpw", "5.5")],
                         ids=" ".join)
def test_what_reads_a_text(source: Path, kept: Tensor, how: tuple[str, ...], tmp_path: Path,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("The lamp at the harbour was lit, and nobody asked who had lit it. " * 60)
    good("quantize", source, tmp_path / "store", *how, "--calibration", tmp_path / "text", "--calibration-tokens", 1000)
    check(tmp_path / "store", LEAST["int3"], kept, monkeypatch)


@pytest.mark.parametrize("kind", RUN)
def test_a_process_stays_within_its_budget(kind: str, tmp_path: Path) -> None:
    """Of a model of many small experts, where the architecture has experts."""
    tiny = FIRST[kind]
    more = {key: 64 for key in ("num_experts", "num_local_experts", "n_routed_experts")
            if key in tiny.get("text_config", tiny)}
    raw = with_keys(tiny, {"hidden_size": 1024, "num_hidden_layers": 12, "max_position_embeddings": 4096, **more})
    source = write(random_model(raw, torch.bfloat16), raw, tmp_path / "source")
    store = quantized(source, tmp_path / "store", QuantConfig(method="rtn"))
    refusal = subprocess.run(command(store, 200 * MIB), capture_output=True, text=True, check=False)
    needs = re.search(r"needs (\d+) MiB", refusal.stderr)
    assert refusal.returncode == 3 and needs is not None, refusal.stderr
    ram = (int(needs[1]) + 4) * MIB  # the program takes a few MiB more or less each time it starts
    found, peak = run(command(store, ram))
    with Store.open(store) as opened:
        records = len(opened.model.expert_keys)
        assert found["offload"]["slots"] < records or records * opened.layout.record_bytes < 4 * MIB
    assert 0.5 * ram < peak <= ram
    print(f"peak {peak / MIB:.0f} of {ram / MIB:.0f} MiB, {found['offload']['slots']} of {records} records")

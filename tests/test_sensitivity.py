"""What formats do to experts, measured: against the same forward pass with doctored weights, and naive sums."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import write_tiny_checkpoint
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey, QuantConfig
from qmix.errors import DoesNotFit
from qmix.formats import unpack
from qmix.quantize.calibration import Calibration
from qmix.quantize.fit import Wanted, mixed, rows_of, sensitivity, sensitivity_text
from qmix.quantize.forward_pass import ForwardPass
from qmix.quantize.methods import quantize
from qmix.quantize.mix import FORMATS
from qmix.quantize.sensitivity import PROBE, SEEN, Sensitivity, measure, specs_of
from qmix.store import StoreLayout

LAYERS, EXPERTS = 3, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("sensitivity") / "tiny", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def text() -> Calibration:
    random = torch.Generator().manual_seed(3)
    return Calibration(torch.randint(0, 128, (5, 24), generator=random))


@pytest.fixture(scope="module")
def found(source: Path, text: Calibration) -> Sensitivity:
    torch.set_num_threads(1)
    with Checkpoint.open(source) as checkpoint, ThreadPoolExecutor(2) as pool:
        return measure(checkpoint, text, "hqq", 32, pool)


def walked(checkpoint: Checkpoint, text: Calibration, change: Callable[[ExpertKey, Tensor, Tensor], Any]) -> Tensor:
    """Log-probabilities [T, V] after the original's forward pass, with the experts that change(key, w13, w2) gives."""
    config = checkpoint.model
    forward = ForwardPass(checkpoint, text)
    for layer in range(config.num_layers):
        forward.enter(layer)
        for expert in range(config.num_experts):
            w1, w2, w3 = checkpoint.expert(ExpertKey(layer, expert))
            forward.expert(ExpertKey(layer, expert), *change(ExpertKey(layer, expert), torch.cat((w1, w3)), w2), False)
    return F.linear(forward.final(slice(0, text.tokens)), checkpoint.dense("head").float()).log_softmax(-1).double()


def test_a_layers_distance_is_that_of_a_model_with_the_probe_there(source: Path, text: Calibration,
                                                                   found: Sensitivity) -> None:
    with Checkpoint.open(source) as checkpoint:
        specs = specs_of(checkpoint, PROBE, 32)
        want = walked(checkpoint, text, lambda key, w13, w2: (w13, w2))
        for layer in range(LAYERS):
            got = walked(checkpoint, text, lambda key, w13, w2, layer=layer: (w13, w2) if key.layer != layer else tuple(
                unpack(quantize(w, spec, "hqq")) for w, spec in zip((w13, w2), specs, strict=True)))
            kl = (want.exp() * (want - got)).sum(-1).mean().item()
            assert found.layers[layer] == pytest.approx(kl, rel=1e-3) and kl > 1e-4


def test_damages_are_what_outputs_lose(source: Path, text: Calibration, found: Sensitivity) -> None:
    """In proportion: of one layer all are turned into nats by the same factor."""
    with Checkpoint.open(source) as checkpoint:
        forward = ForwardPass(checkpoint, text)
        forward.enter(0)
        factors = []
        for expert in range(EXPERTS):
            key = ExpertKey(0, expert)
            rows, rank = (forward.ids == expert).nonzero(as_tuple=True)
            assert found.tokens[key] == len(rows) > SEEN * text.tokens
            x, gain = forward.normed[rows].double(), forward.topk_weights[rows, rank, None].double()
            w1, w2, w3 = (w.double() for w in checkpoint.expert(key))

            def output(w13: Tensor, w2: Tensor, x: Tensor = x, gain: Tensor = gain) -> Tensor:
                gate, up = (x @ w13.T).chunk(2, -1)
                return gain * ((F.silu(gate) * up) @ w2.T)

            w13 = torch.cat((w1, w3))
            for name in FORMATS:
                first, second = specs_of(checkpoint, name, 32)
                for matrix, changed in (("w13", output(unpack(quantize(w13.float(), first, "hqq")).double(), w2)),
                                        ("w2", output(w13, unpack(quantize(w2.float(), second, "hqq")).double()))):
                    damage = (changed - output(w13, w2)).square().sum().item()
                    factors.append(found.damages[key][matrix][name] / damage)
        assert max(factors) == pytest.approx(min(factors), rel=1e-3) and min(factors) > 0


def test_fewer_bits_do_more_damage(found: Sensitivity) -> None:
    for name, better in (("int2g64", "int3g64"), ("int3g64", "int4g64")):
        assert all(damage[m][better] < damage[m][name] for damage in found.damages.values() for m in ("w13", "w2"))
    for name, better in (("int2g64", "int2g32"), ("int4g64", "int4g32")):  # not for each: the range is clipped anew
        assert sum(damage[m][better] - damage[m][name] for damage in found.damages.values() for m in damage) < 0


def test_no_bit_depends_on_threads(source: Path, text: Calibration, found: Sensitivity) -> None:
    with Checkpoint.open(source) as checkpoint, ThreadPoolExecutor(1) as pool:
        assert measure(checkpoint, text, "hqq", 32, pool) == found


def test_an_expert_that_the_text_never_chose_counts_for_a_little(source: Path) -> None:
    """A text of one token over and over: most experts are not chosen, none is free to damage."""
    text = Calibration(torch.full((2, 30), 7))
    with Checkpoint.open(source) as checkpoint, ThreadPoolExecutor(2) as pool:
        found = measure(checkpoint, text, "rtn", 32, pool)
    unseen = [key for key, count in found.tokens.items() if count == 0]
    assert unseen
    for key in unseen:
        seen = [k for k in found.damages if k.layer == key.layer and found.tokens[k]]
        assert 0 < found.damages[key]["w2"]["int3g64"] < max(found.damages[k]["w2"]["int3g64"] for k in seen)


def test_what_was_measured_is_kept_and_read_again(source: Path, text: Calibration, tmp_path: Path) -> None:
    quant, said = QuantConfig("mixed", block=32, kinds=(("int4g64", "int4g64"),), mix=("0" * EXPERTS,) * LAYERS), []
    with Checkpoint.open(source) as checkpoint:
        def run() -> Sensitivity:
            return sensitivity(checkpoint, text, quant, 1, tmp_path / "cache", said.append, lambda *_: None, True)

        first = run()
        assert Sensitivity.from_json(json.loads(json.dumps(first.to_json()))) == first == run()
        assert [line.split()[0] for line in said] == ["measuring", "sensitivities:"]
        (file,) = (tmp_path / "cache").iterdir()
        file.write_text('{"layers": [], "experts": []}')
        del said[:]
        assert run() == first and "ignored" in said[0] and str(file) in said[0]
        other = Calibration(text.ids[:3])
        sensitivity(checkpoint, other, quant, 1, tmp_path / "cache", said.append, lambda *_: None, True)
        assert len(list((tmp_path / "cache").iterdir())) == 2, "another text is measured for itself"


@pytest.mark.parametrize("bits", [2.9, 3.7, 4.4, 9.0])
def test_a_mix_has_the_bits_asked_for_at_most(source: Path, found: Sensitivity, bits: float) -> None:
    with Checkpoint.open(source) as checkpoint:
        config = checkpoint.model
        # Records of so small a model are padded to many bits a weight: asked for is as many more.
        pad = 8 * 16384 / (3 * config.hidden * config.expert_inner)
        quant, choice = mixed(config, QuantConfig(block=32), found, Wanted(bits=pad * bits / 4.5))
    layout = StoreLayout.of(config, quant)
    total = sum(layout.record(key).nbytes for key in config.expert_keys)
    assert total == choice.nbytes and 8 * total <= pad * bits / 4.5 * 3 * config.hidden * \
        config.expert_inner * len(config.expert_keys)
    assert quant.method == "hqq" and quant.experts == "mixed"


def test_a_store_fits_the_bytes_asked_for(source: Path, found: Sensitivity) -> None:
    with Checkpoint.open(source) as checkpoint:
        config = checkpoint.model
        largest = StoreLayout.of(config, mixed(config, QuantConfig(block=32), found, Wanted(nbytes=2**40))[0]).nbytes
        for nbytes in range(largest - 45_000, largest + 10_000, 5_001):
            quant, _ = mixed(config, QuantConfig(block=32), found, Wanted(nbytes=nbytes))
            assert StoreLayout.of(config, quant).nbytes <= nbytes
        with pytest.raises(DoesNotFit, match=r"--fit 1.0 KiB: the smallest mix.*KiB for the rest"):
            mixed(config, QuantConfig(block=32), found, Wanted(nbytes=1024))
        with pytest.raises(DoesNotFit, match=r"--bpw 1: the smallest mix.*bits a weight"):
            mixed(config, QuantConfig(block=32), found, Wanted(bits=1))
        long = Calibration(torch.zeros(128, 512, dtype=torch.int64))
        assert sensitivity_text(config, long, True).tokens == 65536 // (LAYERS + 1)
        assert rows_of(config, long, True) == 65536

"""The calibration's forward pass against transformers, its sums against plain ones, and how a text is cut."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import write_checkpoint, write_tiny_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from qmix.bench.text import recorded_text
from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey
from qmix.errors import UsageError
from qmix.formats import memory
from qmix.models import read_model
from qmix.quantize import forward_pass
from qmix.quantize.calibration import Calibration
from qmix.quantize.forward_pass import ForwardPass
from qmix.quantize.inputs import Inputs
from qmix.tokenizer import load

DEMO = Path(__file__).parents[1] / "qmix" / "demo" / "checkpoint"


def stacked(source: Checkpoint, key: ExpertKey) -> tuple[Tensor, Tensor]:
    w1, w2, w3 = source.expert(key)
    return torch.cat((w1, w3)), w2


def through(source: Checkpoint, text: Calibration, pool: ThreadPoolExecutor | None = None,
            measure: bool = False) -> tuple[list[Tensor], dict[str, dict[str, Inputs]], ForwardPass]:
    """([residual before each layer and after the last], {"1.dense" or an expert's name: its inputs}, the pass)."""
    forward = ForwardPass(source, text, pool)
    states, found = [forward.residual.clone()], {}
    for layer in range(source.model.num_layers):
        forward.enter(layer, measure)
        found[f"{layer}.dense"] = dict(forward.dense_inputs)
        for expert in range(source.model.experts_in(layer)):
            key = ExpertKey(layer, expert)
            found[str(key)] = forward.expert(key, *stacked(source, key), measure)
        states.append(forward.residual.clone())
    return states, found, forward


def demo_text(folder: Path, tokens: int) -> Calibration:
    text = recorded_text()[:4000]
    tokenizer = load(folder, read_model(json.loads((folder / "config.json").read_text())).vocab)
    return Calibration.cut([tokenizer.bos_id], tokenizer.encode(text, bos=False), tokens, 96)


def test_hidden_states_are_those_of_transformers(tmp_path: Path) -> None:
    """On the bundled model, widened to fp32, so that what the experts read is rounded nowhere."""
    transformers = pytest.importorskip("transformers")
    wide = {name: tensor.float() for name, tensor in load_file(DEMO / "model.safetensors").items()}
    raw = json.loads((DEMO / "config.json").read_text())
    folder = write_checkpoint(tmp_path / "wide", raw, wide)
    model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with Checkpoint.open(folder) as source, torch.no_grad():
        text = demo_text(DEMO, 288)
        assert len(text.ids) == 3
        states, _, forward = through(source, text)
        wanted = model(text.ids, output_hidden_states=True).hidden_states
        states[-1] = forward.final(slice(None))
    for got, want in zip(states, wanted, strict=True):
        torch.testing.assert_close(got, want.reshape(got.shape), rtol=1e-4, atol=1e-4)


def test_an_fp32_model_agrees_closely(tmp_path: Path) -> None:
    """A sliding window narrower than a sequence is kept to."""
    transformers = pytest.importorskip("transformers")
    folder = write_tiny_checkpoint(tmp_path / "tiny", seed=2, dtype=torch.float32, sliding_window=7)
    model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, 128, (9, 20), generator=torch.Generator().manual_seed(0))
    with Checkpoint.open(folder) as source, torch.no_grad():
        states, _, _ = through(source, Calibration(ids))
        wanted = model(ids, output_hidden_states=True).hidden_states
    for got, want in zip(states[:-1], wanted, strict=False):
        torch.testing.assert_close(got, want.reshape(got.shape), rtol=1e-4, atol=1e-4)


def test_sums_are_those_of_the_inputs(tmp_path: Path) -> None:
    """By hand in fp64, for one expert, for attention, and for the head."""
    folder = write_tiny_checkpoint(tmp_path / "tiny", seed=2, dtype=torch.float32)
    with Checkpoint.open(folder) as source:
        ids = torch.randint(3, 128, (5, 40), generator=torch.Generator().manual_seed(0))
        _, found, forward = through(source, Calibration(ids), measure=True)
        key = ExpertKey(2, 1)  # of the last layer: what it read is still there
        rows = (forward.ids == 1).any(1).nonzero()[:, 0]
        x = forward.normed[rows].double()
        w1, w2, w3 = (w.double() for w in source.expert(key))
        middle = F.silu(x @ w1.T) * (x @ w3.T)
        inputs = found[str(key)]
        assert inputs["w13"].count == len(rows) == forward.count(1) > 0
        check(inputs["w13"], x, torch.cat((w1, w3)))
        check(inputs["w2"], middle, w2)
        head = source.dense("head").double()
        norm = source.dense("final_norm").double()
        x = F.rms_norm(forward.residual.double(), (64,), norm, source.model.final_norm.eps)
        check(forward.head(head.float()), x, head)

        first = F.rms_norm(source.dense("embedding")[ids.flatten()].double(), (64,),
                           source.dense("layers.0.before_mixer").double(), source.model.final_norm.eps)
        attention = {name[-1]: inputs for name, inputs in found["0.dense"].items()}
        for name in ("q", "k", "v"):
            check(attention[name], first, source.dense(f"layers.0.attention.{name}").double())
        assert attention["k"].factor(None) is attention["v"].factor(None)  # made once
        assert attention["o"].count == 200


def check(inputs: Inputs, x: Tensor, weight: Tensor) -> None:
    factor = inputs.factor(None)
    lower = factor.lower.double().tril(-1) + torch.eye(len(factor.lower))
    want = x.T @ x + factor.damping * torch.eye(len(lower))
    torch.testing.assert_close(lower * factor.pivots.double() @ lower.T, want, rtol=1e-4, atol=1e-4 * want.max().item())
    assert inputs.energy == pytest.approx((x @ weight.T).square().sum().item(), rel=1e-5)


def test_threads_and_other_sizes_of_the_pool_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("CHUNK", 32), ("SEQUENCES", 2), ("ROWS", 40)):  # so that there is something to share out
        monkeypatch.setattr(forward_pass, name, size)
    folder = write_tiny_checkpoint(tmp_path / "tiny", seed=3)
    ids = torch.randint(3, 128, (6, 30), generator=torch.Generator().manual_seed(1))
    with Checkpoint.open(folder) as source, ThreadPoolExecutor(3) as pool:
        alone, found, _ = through(source, Calibration(ids), measure=True)
        shared, found_shared, _ = through(source, Calibration(ids), pool, measure=True)
    for got, want in zip(shared, alone, strict=True):
        assert memory(got).tobytes() == memory(want).tobytes()
    for name, inputs in found.items():
        for matrix, one in inputs.items():
            other = found_shared[name][matrix]
            assert one.energy == other.energy
            assert torch.equal(one.factor(None).lower, other.factor(None).lower)


def test_an_expert_that_no_token_is_sent_to_has_no_inputs(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", seed=3)
    with Checkpoint.open(folder) as source:
        _, found, forward = through(source, Calibration(torch.tensor([[1, 5]])), measure=True)
        unused = [expert for expert in range(4) if not forward.count(expert)]
        assert all(found[str(ExpertKey(2, expert))] == {} for expert in unused)


@pytest.mark.parametrize(("ids", "tokens", "most", "want"), [
    (range(2, 10), 8, 4, [[1, 2, 3, 4], [1, 5, 6, 7]]),  # the rest, 8 and 9, fills no sequence
    (range(2, 14), 8, 4, [[1, 2, 3, 4], [1, 8, 9, 10]]),  # evenly over the text
    (range(2, 5), 100, 512, [[1, 2, 3, 4]]),  # a short text is one sequence
    (range(2, 10), 3, 512, [[1, 2, 3]]),
    (range(2, 10), 1, 512, [[1, 2]]),
])
def test_how_a_text_is_cut(ids: range, tokens: int, most: int, want: list[list[int]]) -> None:
    assert Calibration.cut([1], list(ids), tokens, most).ids.tolist() == want


def test_digest_tells_texts_and_cuts_apart() -> None:
    one, other, flat = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]]), torch.tensor([[1, 2, 3, 4]])
    digests = {Calibration(ids).digest for ids in (one, other, flat)}
    assert len(digests) == 3 and Calibration(one.clone()).digest in digests


def test_what_cannot_be_calibrated_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        Calibration.cut([1], [], 100, 512)
    with Checkpoint.open(write_tiny_checkpoint(tmp_path / "tiny")) as source, pytest.raises(UsageError, match="128"):
        ForwardPass(source, Calibration(torch.tensor([[1, 128]])))

"""GPTQ against a textbook version of it, and the properties that it stands for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from qmix.quantize import gptq
from qmix.quantize.gptq import DegenerateInputs, Moments, Walked, walk


def correlated(n: int, cols: int, seed: int = 0) -> Tensor:
    """Inputs fp32 [n, cols] of a few strong directions and a weak rest, as hidden states are."""
    random = torch.Generator().manual_seed(seed)
    strong = torch.randn(n, 6, generator=random) @ torch.randn(6, cols, generator=random)
    return strong + 0.3 * torch.randn(n, cols, generator=random)


def weights(rows: int, cols: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def fit(bits: int) -> gptq.Fit:
    """The grid from the smallest weight of a group to the largest; float, not bf16, which is the callers' business."""
    def between(x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = x.amin(0), x.amax(0)
        scale = (high - low) / (2**bits - 1)
        return scale, low + scale * 2 ** (bits - 1)

    return between


def factor(x: Tensor) -> gptq.Factor:
    moments = Moments(x.shape[1])
    moments.add(x)
    return moments.factor()


def run(w: Tensor, x: Tensor, group: int = 32, bits: int = 4) -> tuple[Walked, Tensor]:
    """(what the walk found, the decoded weights [N, K])."""
    found = walk(w.T.contiguous(), factor(x), group, bits, fit(bits))
    groups = torch.arange(w.shape[1]) // group
    return found, (found.codes * found.scale[groups] + found.zero[groups]).T


def plain(w: Tensor, group: int = 32, bits: int = 4) -> Tensor:
    """Rounded to nearest on the same kind of grid."""
    half, decoded = 2 ** (bits - 1), torch.empty_like(w)
    for begin in range(0, w.shape[1], group):
        part = w[:, begin:begin + group]
        scale, zero = fit(bits)(part.T)
        codes = ((part - zero[:, None]) / scale[:, None]).round().clamp(-half, half - 1)
        decoded[:, begin:begin + group] = codes * scale[:, None] + zero[:, None]
    return decoded


def damping_of(n: int, cols: int) -> float:
    """Share of the diagonal's mean; the authors have 0.01 however many inputs there are."""
    return max(0.01, 0.3 * cols / n)


def textbook(w: np.ndarray, x: np.ndarray, group: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Frantar et al. 2022, algorithm 1, in fp64, one column after another: the inverse of the damped Hessian, its upper
    Cholesky factor, and every error spread over all columns still to come. Returns (codes, decoded)."""
    cols, half = w.shape[1], 2 ** (bits - 1)
    h = x.T @ x
    h += damping_of(*x.shape) * np.mean(np.diag(h)) * np.eye(cols)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w, codes, decoded = w.copy(), np.empty_like(w), np.empty_like(w)
    for j in range(cols):
        if j % group == 0:
            low, high = w[:, j:j + group].min(1), w[:, j:j + group].max(1)
            scale = (high - low) / (2**bits - 1)
            zero = low + scale * half
        codes[:, j] = np.clip(np.round((w[:, j] - zero) / scale), -half, half - 1)
        decoded[:, j] = codes[:, j] * scale + zero
        error = (w[:, j] - decoded[:, j]) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    return codes, decoded


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("cols", [64, 96])
def test_equals_the_textbook_walked_backwards(cols: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same codes but where fp32 and fp64 fall to different sides of a step, after which a row goes its own way."""
    monkeypatch.setattr(gptq, "TILE", 24)
    w, x = weights(40, cols), correlated(300, cols)
    found, decoded = run(w, x, 32, bits)
    codes, want = textbook(w.flip(1).double().numpy(), x.flip(1).double().numpy(), 32, bits)
    same = (found.codes.T.flip(1).double().numpy() == codes).all(1)
    assert same.mean() >= 0.9
    np.testing.assert_allclose(decoded.flip(1).double().numpy()[same], want[same], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "cols", "group"), [(64, 128, 32), (33, 100, 64), (7, 40, 128)])
def test_outputs_change_less_than_by_rounding(rows: int, cols: int, group: int, bits: int) -> None:
    """On inputs of the same kind that it has not seen."""
    w, x, other = weights(rows, cols), correlated(600, cols), correlated(600, cols)
    found, decoded = run(w, x, group, bits)
    assert found.codes.min() >= -2 ** (bits - 1) and found.codes.max() < 2 ** (bits - 1)
    ours, nearest = ((other @ (w - d).T).norm().item() for d in (decoded, plain(w, group, bits)))
    assert ours < 0.8 * nearest


def test_unrelated_inputs_mean_rounding_to_nearest() -> None:
    """S = identity: no column can make up for another."""
    w = weights(20, 96)
    found, decoded = run(w, torch.eye(96))
    torch.testing.assert_close(decoded, plain(w), rtol=0, atol=1e-6)
    assert found.damage == pytest.approx(1.3 * (w - decoded).square().sum().item(), rel=1e-4)


def test_many_inputs_are_damped_as_the_authors_do() -> None:
    x = correlated(40 * 32, 32)
    assert factor(x).damping == pytest.approx(0.01 * x.square().sum(0).mean().item(), rel=1e-4)


@pytest.mark.parametrize("n", [32, 96])
def test_few_inputs_do_no_harm_on_others(n: int) -> None:
    """On inputs of the same kind that it has not seen, as few inputs as a third of the columns still help."""
    w, other = weights(64, 96), correlated(3000, 96)
    _, decoded = run(w, other[:n])
    ours, nearest = ((other[n:] @ (w - d).T).norm().item() for d in (decoded, plain(w)))
    assert ours < nearest


def test_the_damage_is_what_the_inputs_suffer() -> None:
    w, x = weights(24, 96), correlated(300, 96)
    damping = factor(x).damping
    found, decoded = run(w, x)
    difference = (w - decoded).double()
    squares = difference.square().sum().item()
    want = (x.double() @ difference.T).square().sum().item()
    assert found.sum_sq_err == pytest.approx(squares, rel=1e-4)
    assert found.damage == pytest.approx(want + damping * squares, rel=1e-4)


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    """Their columns can neither do harm nor help, and stay near what they were."""
    w, x = weights(16, 96), correlated(300, 96)
    x[:, 40:50] = 0
    _, decoded = run(w, x)
    scale = fit(4)(w[:, 32:64].T)[0]
    assert ((w - decoded)[:, 40:50].abs() <= 2 * scale[:, None]).all() and decoded.isfinite().all()


@pytest.mark.parametrize("n", [1, 5, 40])
def test_fewer_inputs_than_columns(n: int) -> None:
    w, x = weights(16, 96), correlated(n, 96)
    _, decoded = run(w, x)
    assert decoded.isfinite().all()
    assert (x @ (w - decoded).T).norm() < (x @ (w - plain(w)).T).norm()


def test_batches_and_tiles_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(200, 100)
    want = factor(x)
    monkeypatch.setattr(gptq, "TILE", 32)
    moments = Moments(100)
    for part in x.split(70):
        moments.add(part)
    got = moments.factor()
    torch.testing.assert_close(got.lower.tril(-1), want.lower.tril(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.pivots, want.pivots, rtol=1e-3, atol=1e-3)


def test_the_pool_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "TILE", 32)
    x, factors = correlated(200, 150), []
    with ThreadPoolExecutor(3) as three:
        for pool in (None, three):
            moments = Moments(150)
            moments.add(x, pool)
            factors.append(moments.factor(pool))
    assert torch.equal(factors[0].lower.tril(-1), factors[1].lower.tril(-1))
    assert torch.equal(factors[0].pivots, factors[1].pivots)


def test_a_failed_factorization_is_tried_again_with_more_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made to fail in its last block, when most of S is overwritten already."""
    monkeypatch.setattr(gptq, "TILE", 32)
    x, once, real = correlated(200, 100), [4], torch.linalg.cholesky_ex

    def fails(block: Tensor) -> tuple[Tensor, Tensor]:
        once[0] -= 1
        lower, info = real(block)
        return lower, torch.tensor(1) if once[0] == 0 else info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    got = factor(x)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", real)
    s = x.double().T @ x.double()
    assert got.damping == pytest.approx(10 * damping_of(200, 100) * s.diagonal().mean().item(), rel=1e-4)
    lower = got.lower.double().tril(-1) + torch.eye(100)
    want = s + got.damping * torch.eye(100)
    torch.testing.assert_close(lower * got.pivots.double() @ lower.T, want, rtol=1e-4, atol=1e-4 * want.max().item())


@pytest.mark.parametrize("x", [torch.zeros(5, 40), torch.full((5, 40), float("nan")), torch.full((5, 40), 1e30)])
def test_inputs_without_use_are_refused(x: Tensor) -> None:
    with pytest.raises(DegenerateInputs, match="mean square"):
        factor(x)

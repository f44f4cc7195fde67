"""What a device does to a few tokens number by number or head by head, against float64; on the GPU where there is one,
else under Triton's interpreter."""

from __future__ import annotations

import bounds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda import DEVICE, NO_SHRINKING, needs_triton
from test_cuda_ops import EPS, norm64, random
from torch import Tensor

from qmix.kernels.cuda_ops import TritonOps
from qmix.kernels.delta_rule import Rows, stepwise, unit
from qmix.kernels.device_ops import DeviceOps, TorchDeviceOps
from qmix.kernels.table import KernelTable
from qmix.spec import Activation, DeltaNet, Norm

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:(overflow encountered|All-NaN|invalid value)")]
OPS = pytest.mark.parametrize("ops", [TritonOps(), TorchDeviceOps(KernelTable({}, {}))], ids=["Triton", "reference"])
# Products and quotients of a few roundings, and an exponential function that is off by 2^-22 and rounds its argument, a
# number below 8, to 2^-21.
CLOSE = {"rtol": 2**-19, "atol": 2**-40}


def place_of(ops: DeviceOps) -> torch.device:
    return DEVICE if isinstance(ops, TritonOps) else torch.device("cpu")


class TestHeadNorm:
    @OPS
    @settings(max_examples=10, **NO_SHRINKING)
    @given(size=st.sampled_from([1, 64, 80, 96, 128, 300]), heads=st.integers(1, 5), tokens=st.integers(1, 8),
           weighted=st.booleans(), clip=st.sampled_from([None, 0.75]))
    def test_against_float64(self, ops: DeviceOps, size: int, heads: int, tokens: int, weighted: bool,
                             clip: float | None) -> None:
        """Of columns within something wider, whose other columns stay."""
        wide, weight = random(tokens, heads * size + 7), random(size) if weighted else None
        want = norm64(wide[:, 3:-4].reshape(tokens, heads, size), torch.ones(size) if weight is None else weight)
        want = (want if clip is None else want.clamp(-clip, clip)).flatten(1)
        got = wide.clone().to(place_of(ops))
        ops.head_norm(got[:, 3:-4], size, None if weight is None else weight.to(got.device), EPS, clip)
        torch.testing.assert_close(got[:, 3:-4].cpu().double(), want, rtol=2e-6, atol=1e-7)
        assert torch.equal(got[:, :3].cpu(), wide[:, :3]) and torch.equal(got[:, -4:].cpu(), wide[:, -4:])

    @OPS
    def test_only_clamped_and_nan_stays(self, ops: DeviceOps) -> None:
        x = torch.tensor([[3.0, -3.0, float("nan"), 0.25, float("inf"), 1.5]], device=place_of(ops))
        ops.head_norm(x, 3, None, None, 1.5)
        assert torch.equal(x.nan_to_num(9).cpu(), torch.tensor([[1.5, -1.5, 9, 0.25, 1.5, 1.5]]))

    @OPS
    def test_a_token_has_the_bits_that_it_has_alone_and_a_broken_head_breaks_no_other(self, ops: DeviceOps) -> None:
        x, weight = random(8, 4 * 96).to(place_of(ops)), random(96).to(place_of(ops))
        whole, one = x.clone(), x[5:6].clone()
        x[5, 100] = float("nan")
        for part in (whole, one, x):
            ops.head_norm(part, 96, weight, EPS, 1.0)
        assert torch.equal(one[0], whole[5])
        broken = x.isnan()
        assert broken[5, 96:192].all() and int(broken.sum()) == 96 and torch.equal(x[~broken], whole[~broken])


@OPS
@settings(max_examples=6, **NO_SHRINKING)
@given(size=st.sampled_from([1, 31, 768, 1100]), tokens=st.integers(1, 8))
def test_what_is_computed_number_by_number(ops: DeviceOps, size: int, tokens: int) -> None:
    """Of columns within something wider; the result in place of an operand."""
    x, y = (t.to(place_of(ops)) for t in (random(tokens, 2 * size) * 2, random(tokens, size, seed=1) * 2))
    first, second, by = x[:, :size], x[:, size:], y[:, :1]
    a, b, c = (t.double().cpu() for t in (first, second, y))

    def same(got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got.cpu().double(), want, **CLOSE)

    out = torch.empty_like(y)
    ops.activate(Activation(), first, second, out)
    same(out, a * a.sigmoid() * b)
    ops.activate(Activation(), first, second, first)
    assert torch.equal(first, out) and torch.equal(second.double().cpu(), b)
    for kind, switch in (("sigmoid", c.sigmoid()), ("silu", c * c.sigmoid())):
        for given_by, wanted in ((y, switch), (by, switch[:, :1])):
            got = second.clone()
            ops.gate(got, given_by, kind)
            same(got, b * wanted)
    ops.add(second, y)
    assert torch.equal(second.cpu(), b.float() + c.float())
    for weight, factor in ((y[0], 1.0), (y[0, :1], 0.3), (None, 0.3), (None, 1.0)):
        got = y.clone()
        ops.scale(got, weight, factor)
        want = y.cpu() if weight is None else y.cpu() * weight.cpu()
        assert torch.equal(got.cpu(), want * factor)


@OPS
def test_a_cap(ops: DeviceOps) -> None:
    """tanh by way of an exponential: 1 - 2 / (1 + exp(2 x)) has three roundings of numbers up to 2."""
    x = torch.tensor([[-1e4, -30.0, -0.5, 0.0, 1e-3, 7.5, 1e4, float("nan")] * 200], device=place_of(ops))
    want = 30 * (x.double().cpu() / 30).tanh()
    ops.softcap(x, 30.0)
    torch.testing.assert_close(x.cpu().double(), want, rtol=0, atol=30 * 6 * 2**-24, equal_nan=True)


@OPS
def test_large_and_broken_numbers(ops: DeviceOps) -> None:
    gate = torch.tensor([[-200.0, 200.0, float("nan"), 1.0]], device=place_of(ops))
    up, out = torch.full((1, 4), 2.0, device=gate.device), torch.empty(1, 4, device=gate.device)
    ops.activate(Activation(), gate, up, out)
    assert out[0, :2].tolist() == [0.0, 400.0] and out[0, 2].isnan() and out[0, 3].isfinite()


@OPS
@pytest.mark.parametrize("by", [Activation("geglu"), Activation("swiglu_clamped", 1.702, 2.5)], ids=lambda by: by.kind)
@settings(max_examples=4, **NO_SHRINKING)
@given(size=st.sampled_from([1, 31, 1100]), tokens=st.integers(1, 8))
def test_activations_against_float64(ops: DeviceOps, by: Activation, size: int, tokens: int) -> None:
    """The argument of the exponential is a cubic polynomial for GELU: 8 roundings of a number below 64, where the
    result still counts."""
    gate, up = (t.to(place_of(ops)) for t in random(2, tokens, size) * 2)
    a, b, out = gate.double().cpu(), up.double().cpu(), torch.empty_like(gate)
    ops.activate(by, gate, up, out)
    if by.limit is None:
        want = torch.nn.functional.gelu(a, approximate="tanh") * b
    else:
        a = a.clamp(max=by.limit)
        want = a * (by.alpha * a).sigmoid() * (b.clamp(-by.limit, by.limit) + 1)
    torch.testing.assert_close(out.cpu().double(), want, rtol=2**-15, atol=2**-30)
    ops.activate(by, gate, up, up)
    assert torch.equal(up, out)
    gate[0, 0] = up[-1, -1] = torch.nan
    ops.activate(by, gate, up, out)
    assert out[0, 0].isnan() and out[-1, -1].isnan() and int(out.isnan().sum()) <= 2


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "rows", "hidden"), [(1, 1, 1), (8, 1, 700), (3, 5, 96)])
def test_exact(ops: DeviceOps, tokens: int, rows: int, hidden: int, dtype: torch.dtype) -> None:
    """Summed in fp64: half an ulp of the result, beside roundings of 2^-53. x: columns of something wider."""
    x, weight = random(tokens, hidden + 3)[:, 1:-2], random(rows, hidden, seed=1).to(dtype)
    out = torch.full((tokens, rows), torch.nan, device=place_of(ops))
    ops.exact(x.to(out.device), weight.to(out.device), out)
    want, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert ((out.cpu().double() - want).abs() <= 2**-24 * want.abs() + hidden * 2.0**-52 * terms).all()


@OPS
@pytest.mark.parametrize(("tokens", "k", "hidden"), [(1, 1, 5), (3, 4, 1500), (8, 8, 96)])
def test_combine(ops: DeviceOps, tokens: int, k: int, hidden: int) -> None:
    """In the order of k, and so with the bits that adding to a residual of zeros gives; what is broken stays."""
    rows, weights = random(tokens, k, hidden).to(place_of(ops)), random(tokens, k, seed=1).to(place_of(ops))
    out, residual = torch.empty(tokens, hidden, device=rows.device), torch.zeros(tokens, hidden, device=rows.device)
    ops.combine(rows, weights, out)
    terms = rows.double() * weights.double()[:, :, None]
    assert ((out.double() - terms.sum(1)).abs() <= (k + 0.01) * 2**-24 * terms.abs().sum(1)).all()
    ops.norm(residual, None, EPS, torch.empty_like(residual), rows, weights)
    assert torch.equal(residual, out)
    rows[0, 0, 3] = torch.nan
    ops.combine(rows, weights, out)
    assert out[0, 3].isnan() and int(out.isnan().sum()) == 1


@OPS
def test_a_norm_without_a_weight_and_a_scaled_embedding(ops: DeviceOps) -> None:
    table, which = random(9, 70).half().to(place_of(ops)), torch.tensor([8, 0, 3], device=place_of(ops))
    residual, out = torch.empty(3, 70, device=table.device), torch.empty(3, 70, device=table.device)
    ops.embed(which, table, residual, 8.3)
    assert torch.equal(residual, table[which].float() * 8.3)
    ops.norm(residual, None, EPS, out)
    torch.testing.assert_close(out.cpu().double(), norm64(residual.cpu(), torch.ones(70)), rtol=1e-6, atol=1e-7)
    ops.norm(residual, None, EPS, residual)
    assert torch.equal(residual, out)


@OPS
@pytest.mark.parametrize(("tokens", "side"), [(1, 1), (5, 0)])
def test_a_delta_net_token_by_token(ops: DeviceOps, tokens: int, side: int) -> None:
    """Against float64: the convolution, and the delta rule of what it gives. Sizes that are no powers of two, of
    something wider; the side that is read stays."""
    spec, taps = DeltaNet(2, 4, 12, 40, 4, Norm(1e-5)), random(208, 4)
    wide, a, b = random(tokens, 300), random(tokens, 4), random(tokens, 4, seed=3)
    a_log, dt_bias, pasts, states = random(4), random(4, seed=5), random(2, 3, 208), random(2, 4, 12, 40)
    here = [t.clone().to(place_of(ops)) for t in (wide, taps, pasts, a, b, a_log, dt_bias, states)]
    at = torch.tensor([side], dtype=torch.int32, device=here[0].device)
    mixed, out = here[0].new_zeros(tokens, 208), here[0].new_zeros(tokens, 160)
    ops.conv(here[0][:, :208], here[1], here[2], at, mixed)
    ops.delta(spec, mixed, *here[3:7], here[7], at, out)
    x = torch.cat((pasts[side], wide[:, :208])).double()
    summed = sum(x[j:j + tokens] * taps[:, j].double() for j in range(4))
    torch.testing.assert_close(mixed.cpu().double(), summed * summed.sigmoid(), rtol=2**-18, atol=2**-20)
    assert torch.equal(here[2][1 - side].cpu(), x[-3:].float()) and torch.equal(here[2][side].cpu(), pasts[side])
    q, k, v = (part.view(tokens, -1, size) for part, size in zip(
        mixed.cpu().double().split((24, 24, 160), 1), (12, 12, 40), strict=True))
    decay = -a_log.double().exp() * torch.nn.functional.softplus(a.double() + dt_bias.double())
    rows = Rows(unit(q) * 12**-0.5, unit(k), v, decay, b.double().sigmoid())
    want, state = stepwise(rows, decay.exp(), states[side].double())
    # In fp32 a token's chain of roundings is two sums of 12, a unit vector and some 8 operations.
    bound = bounds.chain(tokens * 40, bounds.FP32) * torch.cat((want.flatten(), state.flatten(), v.flatten())).norm()
    assert (out.cpu().view(want.shape) - want).norm() < bound and (here[7][1 - side].cpu() - state).norm() < bound
    assert torch.equal(here[7][side].cpu(), states[side])

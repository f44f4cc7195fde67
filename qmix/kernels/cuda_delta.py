"""The state of a gated delta net on a GPU: what cuda_ops.TritonOps does with Triton's kernels (cuda_delta_jit.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.kernels.cuda import device_code
from qmix.kernels.device_scratch import power_of_two
from qmix.spec import DeltaNet

CHANNELS = 256  # of a program of the convolution
VALUES = 32     # columns of a state that a program of the rule has: with 128 rows 32 numbers a thread


def conv(x: Tensor, taps: Tensor, pasts: Tensor, side: Tensor, out: Tensor) -> None:
    """device_ops.TorchDeviceOps.conv."""
    (tokens, channels), width = x.shape, taps.shape[1]
    assert x.dtype == out.dtype == taps.dtype == torch.float32 and x.stride(1) == out.stride(1) == 1
    assert taps.is_contiguous() and pasts.is_contiguous() and pasts.shape == (2, width - 1, channels)
    device_code("cuda_delta_jit").conv[-(-channels // CHANNELS),](
        x, taps, pasts, side, out, tokens, channels, x.stride(0), out.stride(0), TAPS=width, SIZE=CHANNELS,
        num_warps=4, enable_fp_fusion=True)


def delta(spec: DeltaNet, x: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, states: Tensor, side: Tensor,
          out: Tensor) -> None:
    """device_ops.TorchDeviceOps.delta."""
    assert all(t.dtype == torch.float32 for t in (x, a, b, a_log, dt_bias, states, out)) and states.is_contiguous()
    assert x.stride(1) == a.stride(1) == b.stride(1) == out.stride(1) == 1
    values = min(VALUES, power_of_two(spec.value_dim))
    device_code("cuda_delta_jit").delta[spec.value_heads, -(-spec.value_dim // values)](
        x, a, b, a_log, dt_bias, states, side, out, len(x), x.stride(0), a.stride(0), b.stride(0), out.stride(0),
        spec.key_heads, spec.value_heads, spec.key_dim, spec.value_dim, spec.key_dim**-0.5,
        KEYS=power_of_two(spec.key_dim), VALUES=values, num_warps=4, enable_fp_fusion=True)

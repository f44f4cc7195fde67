"""fast_interpreter.py changes no number and no refusal of Triton's interpreter: kernels give the same with it and
without it, in processes of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_cuda import DEVICE, needs_triton
from warm_python import WarmPython

CODE = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import json, sys
import torch, triton
import triton.language as tl
from fast_interpreter import quicken

if sys.argv[1:] == ["quick"]:
    quicken()
"""
# Every dtype beside every other in sums, products and quotients; broadcasts, reductions, pointers, a loop, a call.
KERNELS = '''
"""Kernels that Triton reads from a file."""
import torch
import triton
import triton.language as tl

@triton.jit
def twice(x):
    return x + x

@triton.jit
def mixed(a, b, sums, products, quotients, rows, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at, mask=at < N - 3, other=1)
    tl.store(sums + at, (twice(x) + y - 3).to(sums.dtype.element_ty))
    tl.store(products + at, (x * y * 5).to(products.dtype.element_ty))
    tl.store(quotients + at, (x / (y + 1)).to(quotients.dtype.element_ty))
    square, total = x.to(tl.float32)[:, None] * y.to(tl.float32)[None, :], tl.zeros([N], tl.float32)
    for i in range(3):
        total += tl.sum(square, axis=1) * i + tl.program_id(0)
    tl.store(rows + tl.program_id(0) * N + at, total)

@triton.jit
def misfit(a, N: tl.constexpr):
    tl.store(a + tl.arange(0, N), tl.arange(0, N) + tl.arange(0, 2 * N))

@triton.jit
def odd(a, N: tl.constexpr):
    tl.store(a, tl.sum(tl.zeros([N + 1], tl.float32), axis=0))

@triton.jit
def signs(a, N: tl.constexpr):
    x = tl.load(a + tl.arange(0, N)).to(tl.uint32)
    tl.store(a + tl.arange(0, N), (x // tl.arange(0, N)).to(tl.int32))
'''
RUN = """
from kernels import misfit, mixed, odd, signs

N, found = 16, {}
kinds = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8]

def noted(name, work):
    try:
        found[name] = [out.tolist() for out in work()]
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"

def computed(a, b):
    outs = [torch.zeros(N), torch.zeros(N), torch.zeros(N), torch.zeros(2, N)]
    mixed[(2,)](a, b, *outs, N)
    return outs

for first in kinds:
    for second in kinds:
        a, b = torch.arange(1, N + 1).to(first), torch.arange(N, 0, -1).to(second)
        noted(f"{first} {second}", lambda: computed(a, b))
for kernel in (misfit, odd, signs):
    noted(kernel.__name__, lambda: kernel[(1,)](torch.ones(2 * N, dtype=torch.int32), N))
large = torch.full((N,), 2**31 - 1, dtype=torch.int32)
noted("overflow", lambda: computed(large, large))
print(json.dumps(found))
"""


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU: nothing is interpreted")
def test_numbers_and_refusals_are_those_of_tritons_interpreter(warm_python: WarmPython, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    plain, quick = (warm_python.run("-c", CODE + RUN, *how, env={**os.environ, "PYTHONPATH": path})
                    for how in ((), ("quick",)))
    assert plain.returncode == quick.returncode == 0, plain.stderr + quick.stderr
    found = json.loads(plain.stdout)
    assert quick.stdout == plain.stdout and len(found) == 5 * 5 + 4
    assert "incompatible dimensions" in found["misfit"] and "power of 2" in found["odd"]
    assert "different signedness" in found["signs"] and not isinstance(found["overflow"], str)
    assert sum(not isinstance(value, str) for value in found.values()) > 15  # it has no constants in bf16

"""Which kernels run on a device, and that they are cut as they are told."""

from __future__ import annotations

import subprocess
from types import MappingProxyType

import pytest
import torch
from test_cuda import DEVICE, here, matrix, needs_triton, operand
from test_cuda_ops import random

from qmix.kernels import cuda_ops, cuda_prompt
from qmix.kernels.attend import attend_torch
from qmix.kernels.configs import Attention, Configs, Dense, Gemv, Matmul
from qmix.kernels.device_ops import TorchDeviceOps
from qmix.kernels.device_table import choose_device_kernels, does_not_run
from qmix.kernels.table import KernelTable

HOST = KernelTable(MappingProxyType({}), MappingProxyType({}))


def test_the_cpu_stands_in_with_its_own() -> None:
    found = choose_device_kernels(torch.device("cpu"), torch.bfloat16, ["int4"], [64], HOST, False)
    assert found.prompts is found.host is HOST and isinstance(found.ops, TorchDeviceOps)


def test_a_missing_compiler_or_header_is_named_and_not_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = does_not_run("the GPU kernel for int4 does not run here", failed)
    assert "a C compiler" in found.message and "int4" not in found.message and "gcc" in found.cure
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    outer = RuntimeError("could not build the launcher")
    outer.__cause__ = subprocess.CalledProcessError(1, ["gcc"])
    found = does_not_run("the GPU kernel for int4 does not run here", outer)
    assert "Python's headers (/nowhere/Python.h)" in found.message and "C compiler" not in found.message
    other = does_not_run("the GPU kernel for int4 does not run here", ValueError("out of resource\nmore"))
    assert other.message == "the GPU kernel for int4 does not run here: out of resource" and "report" in other.cure


@needs_triton
def test_kernels_are_cut_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bits, and by what reaches the kernels."""
    mine = Configs(Gemv(32, 1), Matmul(16, 64, 4, 1), Dense(8, 32, 2), Attention(16, 16, 4, 1))
    found = choose_device_kernels(DEVICE, torch.float16, ["int4"], [64], HOST, True, mine)
    assert dict(found.prompts.names) == {"int4": "Triton"}
    m, x = here(matrix("int4", 70, 32 * 9, 32, 64)), operand(2, 32 * 9).to(DEVICE)
    got, same, other = torch.empty(3, 2, 70, device=DEVICE)
    found.ops.linear(x, m, got)
    cuda_ops.TritonOps(mine).linear(x, m, same)
    cuda_ops.TritonOps().linear(x, m, other)
    assert torch.equal(got, same) and not torch.equal(got, other)
    seen: list[object] = []
    real = cuda_prompt.cuda.many
    monkeypatch.setattr(cuda_prompt.cuda, "many",
                        lambda *args, config: (seen.append(config), real(*args, config=config)))
    found.prompts.linear(operand(9, 32 * 9).half().to(DEVICE), m)
    assert seen == [mine.matmul]
    if found.attend is attend_torch:  # torch's, which nobody cuts
        return
    q, cache = random(20, 2, 32).half().to(DEVICE), random(2, 1, 40, 32).half().to(DEVICE)
    attended = found.attend(q, cache[0], cache[1], None)
    assert torch.equal(attended, cuda_prompt.attend_many(q, *cache, config=mine.attention))
    assert not torch.equal(attended, cuda_prompt.attend_many(q, *cache))

"""Which kernels run on a device: Triton's on a card, the CPU's where the CPU stands in for one.

A card's kernels are compared with the reference on small random matrices before anything is loaded; one that is wrong
ends the start, since there is nothing to fall back to that would not be a hundred times slower.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.config import GROUPED_BITS
from qmix.errors import QmixError
from qmix.formats import module, nf4
from qmix.formats.packed import Packed, view
from qmix.kernels import reference
from qmix.kernels.attend import Softmax, softmax_attention
from qmix.kernels.configs import Configs, Gemv, built_in, capability
from qmix.kernels.cpu import Kernel
from qmix.kernels.device_ops import DeviceOps, ExpertSlots, TorchDeviceOps
from qmix.kernels.device_scratch import Scratch
from qmix.kernels.prompt_experts import PromptExperts, TorchPromptExperts
from qmix.kernels.table import KernelTable, random_expert, random_matrix
from qmix.sizes import CARRIED, CARRIED_BLOCK, MX_BLOCK, RecordLayout

Attend = Callable[[Tensor, Tensor, Tensor, int | None, Softmax], Tensor]
PROMPTS = {"int8": "Triton, decoded for prompts", "nf4": "bitsandbytes, decoded", "fp4": "bitsandbytes, decoded"}
AGREES = 2**-7  # relative: operands and results rounded to 16 bits


@dataclass(frozen=True, slots=True)
class DeviceKernels:
    """prompts: what computes many tokens on the device; experts: their experts, in the formats that it has; attend:
    their attention; ops: a few tokens; host: the CPU's; configs: how Triton's are cut."""

    prompts: KernelTable
    attend: Attend
    ops: DeviceOps
    host: KernelTable
    experts: PromptExperts
    configs: Configs = field(default_factory=Configs)


def choose_device_kernels(device: torch.device, half: torch.dtype, formats: Iterable[str], blocks: Iterable[int],
                          host: KernelTable, triton: bool, configs: Configs | None = None,
                          scratch_of: Callable[[Gemv], Scratch] | None = None) -> DeviceKernels:
    """formats, blocks: as of table.select. half: what prompts compute in. triton: for a card, or under Triton's
    interpreter; else the CPU's kernels stand in. configs: how kernels are cut, None = as is built in. scratch_of: what
    the buffers of a few tokens' kernels have at least, None = as each call needs. UsageError where Triton or
    bitsandbytes is missing, QmixError where a kernel is wrong."""
    if not triton:
        return DeviceKernels(host, softmax_attention, TorchDeviceOps(host), host, TorchPromptExperts(host))
    from qmix.kernels import cuda_grouped, cuda_ops, cuda_prompt

    configs = configs or built_in(capability(device))
    many, ops = partial(cuda_prompt.linear_many, config=configs.matmul), cuda_ops.TritonOps(
        configs, scratch_of(configs.gemv) if scratch_of else None)
    experts = cuda_grouped.TritonPromptExperts(configs.matmul)
    wanted = {(module(name), name)[1] for name in formats}
    if wanted & {"nf4", "fp4"}:
        nf4.functional()
    blocks = set(blocks)
    table = {(name, block): many for name in wanted for block in {0, *blocks, MX_BLOCK}}
    names = {name: PROMPTS.get(name, "Triton") for name in wanted}
    if device.type == "cuda":
        for name, block in sorted(table):
            if (name in GROUPED_BITS and block in blocks) or (name, block) in (("int8", 0), ("mxfp4", MX_BLOCK)) or \
                    (name in CARRIED and block == CARRIED_BLOCK):
                try:
                    _check(device, half, random_matrix(name, block), many, ops)
                    if name != "int8":
                        _check_experts(device, half, *random_expert(name, block), experts)
                except QmixError:
                    raise
                except Exception as e:  # Triton's many: it does not compile, asks for too much, the driver refuses
                    raise does_not_run(f"the GPU kernel for {name} does not run here", e) from e
    return DeviceKernels(KernelTable(MappingProxyType(table), MappingProxyType(names)),
                         cuda_prompt.choose_prompt_attention(capability(device), configs.attention), ops, host, experts,
                         configs)


def does_not_run(what: str, error: Exception) -> QmixError:
    """What the user is told where a Triton kernel fails. At run time Triton builds its launchers with a C compiler and
    Python.h: without them no kernel runs, and none is at fault."""
    if any(isinstance(e, subprocess.CalledProcessError) or "C compiler" in str(e) for e in _causes(error)):
        header = Path(sysconfig.get_path("include")) / "Python.h"
        compilers = (os.environ.get("CC") or "cc", "gcc", "clang")  # as Triton looks for one
        missing = [] if any(map(shutil.which, compilers)) else ["a C compiler"]
        missing += [] if header.is_file() else [f"Python's headers ({header})"]
        if missing:
            return QmixError(f"Triton needs {' and '.join(missing)} to run the GPU's kernels: not found",
                             "install gcc and python3-dev (as the distribution names them), or use --device cpu")
    return QmixError(f"{what}: {(str(error).splitlines() or [type(error).__name__])[0]}",
                     "use --device cpu, and please report it")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check(device: torch.device, half: torch.dtype, m: Packed, many: Kernel, ops: DeviceOps) -> None:
    """Few tokens and many against the reference."""
    there = m.to(device)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, m.spec.cols, generator=torch.Generator().manual_seed(1)).to(half)
        want = reference.linear(x.float(), m)[:, :m.spec.rows]
        if tokens > 8:
            got = many(x.to(device), there)[:, :m.spec.rows]
        else:
            got = torch.empty(tokens, m.spec.rows, device=device)
            ops.linear(x.float().to(device), there, got)
        _compare(got, want, m.spec.format, tokens, device)


def _check_experts(device: torch.device, half: torch.dtype, slab: Tensor, record: RecordLayout,
                   experts: PromptExperts) -> None:
    """Each token through all of the experts in a slab, in tiles of each size, against the reference."""
    slots = ExpertSlots(slab.to(device), record, (), 0)
    if not experts.handles(slots, half):
        return
    count, tokens = len(slab), 40
    x = torch.randn(tokens, record.w13.cols, generator=torch.Generator().manual_seed(1))
    x = (x / 16).to(half)  # for which fp16 has room
    ids, table = torch.arange(count).repeat(tokens, 1), torch.arange(count, dtype=torch.int32).to(device)
    halves = [[Packed.of(spec, {p.tensor.name: view(one, p.offset, p.tensor) for p in record.placed
                                if p.matrix == name})
               for name, spec in (("w13", record.w13), ("w2", record.w2))] for one in slab]
    want = torch.empty(tokens, count, record.w2.rows)
    for expert, (w13, w2) in enumerate(halves):
        gate, up = reference.linear(x.float(), w13).chunk(2, 1)
        inner = F.silu(gate) * up
        want[:, expert] = reference.linear(inner[:, :w2.spec.cols], w2)[:, :w2.spec.rows]
    for size in experts.sizes(device):
        tiles, got = experts.sort(ids.to(device), count, size), torch.empty_like(want, device=device)
        every = range(tiles.count)
        experts.down(experts.gate_up(x.to(device), slots, tiles, every, table), slots, tiles, every, table, got)
        _compare(got, want, f"{record.w13.format} experts", tokens, device)


def _compare(got: Tensor, want: Tensor, what: str, tokens: int, device: torch.device) -> None:
    if not (got.float().cpu() - want).norm() <= AGREES * want.norm():
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise QmixError(f"the GPU kernel for {what} gives wrong numbers here ({tokens} tokens, torch "
                        f"{torch.__version__}, {card})", "use --device cpu, and please report it")

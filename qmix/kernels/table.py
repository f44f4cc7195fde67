"""Which kernel runs for which format in this process. Chosen once, at start: torch's packed ops are
private, so each is compared with the reference on small random matrices first, and what it cannot
read is converted or computed by the reference, and said.

The choice depends on the machine and on torch, never on a budget or on what happens to be resident.
T tokens, H hidden, F expert inner.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.config import BLOCKS
from qmix.errors import UsageError
from qmix.formats import int4, int8, module, nf4
from qmix.formats.packed import Packed
from qmix.kernels import bnb, cpu, reference
from qmix.kernels.cpu import Kernel
from qmix.sizes import MatrixSpec

INT4_OP = "torch _weight_int4pack_mm_for_cpu"
INT8_OP = "torch _weight_int8pack_mm"


@dataclass(frozen=True, slots=True)
class KernelTable:
    """kernels: {(format, block): kernel}, block 0 for formats without one; names: {format: what runs}."""

    kernels: Mapping[tuple[str, int], Kernel]
    names: Mapping[str, str]

    def linear(self, x: Tensor, m: Packed) -> Tensor:
        """x [T, cols] bf16 or fp32 -> [T, rows] in x's dtype, padding and gaps between parts removed."""
        spec = m.spec
        y = self.kernels[spec.format, spec.block](x, m)
        if y.shape[1] == spec.rows:
            return y
        return y.view(len(y), spec.parts, -1)[:, :, :spec.rows // spec.parts].reshape(len(y), spec.rows)

    def expert(self, x: Tensor, w13: Packed, w2: Packed) -> Tensor:
        """One expert, w2(silu(gate(x)) * up(x)): x [T, H] -> [T, H]; w13 is gate over up, [2F, H]."""
        return self.linear(self.gated(x, w13), w2)

    def gated(self, x: Tensor, w13: Packed) -> Tensor:
        """The first half of an expert, silu(gate(x)) * up(x): x [T, H] -> [T, F]; it needs no w2 yet."""
        spec = w13.spec
        both = self.kernels[spec.format, spec.block](x, w13)
        half, inner = both.shape[1] // 2, spec.rows // 2
        return F.silu(both[:, :inner]) * both[:, half:half + inner]


def select(formats: Iterable[str], blocks: Iterable[int] = BLOCKS, device: str = "cpu",
           say: Callable[[str], None] = print) -> KernelTable:
    """The kernels for `formats` ("int4", "int8", "nf4", ...), int4 in each of `blocks`; self-tested.

    `say` gets one line for whatever is not the fast path. UsageError for an unknown format or device.
    """
    if device != "cpu":
        raise UsageError(f"device: got {device!r}, want 'cpu' (the only one with kernels so far)")
    kernels: dict[tuple[str, int], Kernel] = {}
    names: dict[str, str] = {}
    for name in sorted(set(formats)):
        module(name)  # refuses unknown names
        if name == "int4":
            found = _choose_int4(sorted(set(blocks) - {0}, reverse=True), say)
            kernels |= {(name, block): kernel for block, (kernel, _) in found.items()}
            names[name] = "; ".join(dict.fromkeys(text for _, text in found.values()))
        elif name == "int8":
            kernels[name, 0], names[name] = _choose_int8(say)
        elif name in ("nf4", "fp4"):
            nf4.functional()  # now, where it may be missing and takes a second, and not in the first answer
            kernels[name, 0], names[name] = bnb.linear, "bitsandbytes dequantization by tiles, torch linear"
            say(f"{name} on the CPU decodes every weight for every token: expect a fraction of int4's speed")
        else:
            kernels[name, 0], names[name] = cpu.plain_linear, f"torch linear, {name}"
    return KernelTable(MappingProxyType(kernels), MappingProxyType(names))


def native_block() -> int:
    """The int4 block that this machine's torch reads without conversion; 64 where it reads none."""
    return next((block for block in BLOCKS if _agrees(cpu.int4_linear, _random_int4(block))), BLOCKS[0])


def _choose_int4(blocks: list[int], say: Callable[[str], None]) -> dict[int, tuple[Kernel, str]]:
    reads = [block for block in BLOCKS if _agrees(cpu.int4_linear, _random_int4(block))]
    found: dict[int, tuple[Kernel, str]] = {}
    failed = []
    for block in blocks:
        if block in reads:
            found[block] = cpu.int4_linear, f"{INT4_OP}, block {block}"
        elif reads and _agrees(cpu.int4_converted(reads[0]), _random_int4(block)):
            found[block] = cpu.int4_converted(reads[0]), f"{INT4_OP}, block {block} converted to {reads[0]}"
            say(f"this torch reads int4 in blocks of {reads[0]} rows, the store has {block}: converting at "
                f"every use (`qmix quantize --block {reads[0]}` makes a store without that)")
        else:
            found[block] = reference.packed_linear, f"reference, block {block}"
            failed.append(block)
    if failed:
        say(f"{INT4_OP} failed its self-test here ({_machine()}): int4 runs on the slow reference kernel")
    return found


def _choose_int8(say: Callable[[str], None]) -> tuple[Kernel, str]:
    if _agrees(cpu.int8_linear, _random_int8()):
        return cpu.int8_linear, INT8_OP
    say(f"{INT8_OP} failed its self-test here ({_machine()}): int8 runs on the slow reference kernel")
    return reference.packed_linear, "reference"


def _machine() -> str:
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"


def _agrees(kernel: Kernel, m: Packed) -> bool:
    """Whether `kernel` gives what the reference gives, up to one bf16 rounding of each result."""
    x = torch.randn(5, m.spec.cols, generator=torch.Generator().manual_seed(1)).bfloat16()
    try:
        got = kernel(x, m).float()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    want = reference.linear(x.float(), m)
    return got.shape == want.shape and bool((got - want).norm() <= 2**-8 * want.norm())


def _random_int4(block: int) -> Packed:
    spec = MatrixSpec("int4", 192, 256, group_size=64, block=block)
    random = torch.Generator().manual_seed(block)
    q = torch.randint(0, 16, (192, 256), dtype=torch.uint8, generator=random)
    scale, zero = torch.randn(2, 192, 4, generator=random).bfloat16()
    return int4.pack(q, scale, zero, spec)


def _random_int8() -> Packed:
    weight = torch.randn(70, 128, generator=torch.Generator().manual_seed(8))
    return int8.pack(weight, MatrixSpec("int8", 70, 128))

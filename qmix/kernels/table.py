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

from qmix import settings
from qmix.config import BLOCKS, CARRIED_NAMES, GROUPED_BITS, parts_of
from qmix.errors import UsageError
from qmix.formats import carried, grouped, int8, module, mxfp4, nf4
from qmix.formats.packed import Packed, view
from qmix.kernels import bnb, cpu, native, reference
from qmix.kernels.cpu import Kernel
from qmix.kernels.layer import TORCH, LayerOps, choose_layer_ops
from qmix.kernels.torch_ops import activate
from qmix.sizes import CARRIED, CARRIED_BLOCK, MX_BLOCK, MX_GROUP, MatrixSpec, RecordLayout, with_layout

ACTIVATIONS = ("auto", "bf16", "int8")
INT4_OP = "torch _weight_int4pack_mm_for_cpu"
INT8_OP = "torch _weight_int8pack_mm"
PUBLISHED = ("mxfp4", *CARRIED_NAMES)  # formats that checkpoints have
assert MX_BLOCK == CARRIED_BLOCK


@dataclass(frozen=True, slots=True)
class KernelTable:
    """kernels: {(format, block): kernel}, block 0 for formats without one; names: {format: what runs}; native:
    what computes the grouped formats, where it was built and passed; layer: the rest of a layer, for a few tokens."""

    kernels: Mapping[tuple[str, int], Kernel]
    names: Mapping[str, str]
    native: native.NativeProducts | None = None
    layer: LayerOps = TORCH

    def linear(self, x: Tensor, m: Packed) -> Tensor:
        """x [T, cols] bf16 or fp32 -> [T, rows] in x's dtype, without padding and gaps between parts, with the bias."""
        spec = m.spec
        if self.native is not None and self.computes_natively(m):
            return self.native.linear(x, m)[0]  # with the bias; the other kernels have none
        y = self.kernels[spec.format, spec.block](x, m)
        if y.shape[1] != spec.rows:
            y = y.view(len(y), spec.parts, -1)[:, :, :spec.rows // spec.parts].reshape(len(y), spec.rows)
        return (y + m["bias"]).to(y.dtype) if spec.bias else y

    def linears(self, x: Tensor, *matrices: Packed) -> list[Tensor]:
        """`linear` of x and each matrix; one call where the native kernels have them all."""
        if self.native is not None and all(map(self.computes_natively, matrices)):
            return self.native.linear(x, *matrices)
        return [self.linear(x, m) for m in matrices]

    def computes_natively(self, m: Packed) -> bool:
        """Whether the native kernels have it: they take fp32 activations as they take bf16."""
        return self.native is not None and {*parts_of(m.spec.format)} <= {*self.native.formats}

    def expert(self, x: Tensor, w13: Packed, w2: Packed) -> Tensor:
        """One expert, w2(activation(gate(x), up(x))): x [T, H] -> [T, H]; w13 is gate over up, [2F, H]."""
        return self.linear(self.gated(x, w13), w2)

    def gated(self, x: Tensor, w13: Packed) -> Tensor:
        """The first half of an expert, activation(gate(x), up(x)): x [T, H] -> [T, F]; it needs no w2 yet."""
        spec = w13.spec
        if self.native is not None and self.computes_natively(w13):
            return self.native.gated(x, w13)
        inner = spec.rows // 2
        if halves := w13.halves:
            gate, up = (self.kernels[m.spec.format, m.spec.block](x, m)[:, :inner] for m in halves)
        else:
            both = self.kernels[spec.format, spec.block](x, w13)
            half = both.shape[1] // 2
            gate, up = both[:, :inner], both[:, half:half + inner]
        if spec.bias:
            gate, up = gate + w13["bias"][:inner], up + w13["bias"][inner:]  # in fp32
        if spec.activation.kind == "swiglu" and not spec.bias:
            return F.silu(gate) * up
        return activate(spec.activation, gate, up).to(x.dtype)


def select(formats: Iterable[str], blocks: Iterable[int] = BLOCKS, device: str = "cpu",
           say: Callable[[str], None] = print, activations: str = "bf16") -> KernelTable:
    """The kernels for `formats` ("int4", "int8", "nf4", ...), the grouped ones in each of `blocks`;
    self-tested.

    activations: what grouped and int8 products see of x: "bf16", "int8" (native kernels only), or "auto": int8 where it
    can be had (docs/kernels.md has its error). `say` gets one line for whatever is not the fast path. UsageError for an
    unknown format or device, and for activations that nothing here has.
    """
    if device != "cpu":
        raise UsageError(f"device: got {device!r}, want 'cpu' (device_table.py has a GPU's kernels)")
    if activations not in ACTIVATIONS:
        raise UsageError(f"--activations {activations}: want " + ", ".join(ACTIVATIONS))
    names: dict[str, str] = {}
    kernels: dict[tuple[str, int], Kernel] = {}
    wanted = {(module(name), name)[1] for name in formats}  # `module` refuses unknown names
    blocks = sorted(set(blocks) - {0}, reverse=True)
    if (trouble := native.trouble()) and settings.native_level() != "off":
        say(f"native kernels: {trouble}" if native.library() is not None else f"no native kernels: {trouble}; torch "
            "computes, at about half the speed (`qmix doctor` says how to mend that)")
    own = _choose_native(wanted, blocks, activations, say)
    for name in sorted(wanted):
        if name in GROUPED_BITS and own is not None:
            kernels |= {(name, block): _one(own) for block in blocks}
            names[name] = own.name
        elif name in GROUPED_BITS:
            found = _choose_grouped(name, blocks, say)
            kernels |= {(name, block): kernel for block, (kernel, _) in found.items()}
            names[name] = "; ".join(dict.fromkeys(text for _, text in found.values()))
        elif name == "int8" and own is not None and name in own.formats:
            kernels[name, 0], names[name] = _one(own), own.name
        elif name == "int8":
            kernels[name, 0], names[name] = _choose_int8(say)
        elif name in PUBLISHED and own is not None:
            kernels[name, MX_BLOCK], names[name] = _one(own), own.name
        elif name in PUBLISHED:
            kernels[name, MX_BLOCK], names[name] = cpu.decoded_linear, "decoded by tiles, torch linear"
            say(f"{name} without native kernels decodes every weight for every token: expect a fraction of its speed")
        elif name in ("nf4", "fp4"):
            nf4.functional()  # now, where it may be missing and takes a second, and not in the first answer
            kernels[name, 0], names[name] = bnb.linear, "bitsandbytes dequantization by tiles, torch linear"
            say(f"{name} on the CPU decodes every weight for every token: expect a fraction of int4's speed")
        else:
            kernels[name, 0], names[name] = cpu.plain_linear, f"torch linear, {name}"
    return KernelTable(MappingProxyType(kernels), MappingProxyType(names), own, choose_layer_ops(say))


def _choose_native(formats: set[str], blocks: list[int], activations: str,
                   say: Callable[[str], None]) -> native.NativeProducts | None:
    """The native kernels, where `formats` have a use for them and they pass on all of them."""
    packed = formats & set(native.FORMATS)
    if not packed:
        if activations == "int8":
            raise UsageError("--activations int8: this store has no matrices in int8, int4, int3, int2, mxfp4 or in "
                             "formats of ggml's", "leave it out")
        return None
    samples = [_random_grouped(name, block) for name in packed & GROUPED_BITS.keys() for block in blocks]
    samples += [_random_int8()] if "int8" in packed else []
    samples += [_random_mxfp4()] if "mxfp4" in packed else []
    samples += [_random_carried(name) for name in sorted(packed & CARRIED.keys())]
    for level in native.wanted_levels():
        own = native.NativeProducts(level, "int8" if activations == "auto" else activations)
        if all(_agrees(_one(own), m, own.activations) for m in samples):
            return own
        say(f"the native kernels failed their self-test here ({level}, {_machine()}): the next best kernel is used")
    if activations == "int8":
        raise UsageError("--activations int8: only the native kernels have it, and they are not in use here",
                         "install a C compiler and qmix again, or use --activations bf16")
    return None


def _one(own: native.NativeProducts) -> Kernel:
    return lambda x, m: own.linear(x, m)[0]


def native_block() -> int:
    """The int4 block that is fastest here: 64 for the native kernels (a fifth fewer instructions than 32 with AVX2),
    without them the one that this machine's torch reads without conversion, 64 where it reads none."""
    if native.wanted_levels():
        return BLOCKS[0]
    return next((block for block in BLOCKS if _agrees(cpu.int4_linear, _random_grouped("int4", block))), BLOCKS[0])


def _choose_grouped(name: str, blocks: list[int], say: Callable[[str], None]) -> dict[int, tuple[Kernel, str]]:
    reads = [block for block in BLOCKS if _agrees(cpu.int4_linear, _random_grouped("int4", block))]
    found: dict[int, tuple[Kernel, str]] = {}
    failed = []
    for block in blocks:
        if name == "int4" and block in reads:
            found[block] = cpu.int4_linear, f"{INT4_OP}, block {block}"
        elif reads and _agrees(cpu.int4_converted(reads[0]), _random_grouped(name, block)):
            found[block] = cpu.int4_converted(reads[0]), f"{INT4_OP}, block {block} converted to {reads[0]}"
            say(f"{name} without native kernels is rewritten as int4 at every use, which is slow" if name != "int4" else
                f"this torch reads int4 in blocks of {reads[0]} rows, the store has {block}: converting at "
                f"every use (`qmix quantize --block {reads[0]}` makes a store without that)")
        else:
            found[block] = reference.packed_linear, f"reference, block {block}"
            failed.append(block)
    if failed:
        say(f"{INT4_OP} failed its self-test here ({_machine()}): {name} runs on the slow reference kernel")
    return found


def _choose_int8(say: Callable[[str], None]) -> tuple[Kernel, str]:
    if _agrees(cpu.int8_linear, _random_int8()):
        return cpu.int8_linear, INT8_OP
    say(f"{INT8_OP} failed its self-test here ({_machine()}): int8 runs on the slow reference kernel")
    return reference.packed_linear, "reference"


def _machine() -> str:
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"


def _agrees(kernel: Kernel, m: Packed, activations: str = "bf16") -> bool:
    """Whether `kernel` gives what the reference gives for activations so rounded, up to one bf16 rounding of each
    result."""
    x = torch.randn(5, m.spec.cols, generator=torch.Generator().manual_seed(1)).bfloat16()
    try:
        got = kernel(x, m).float()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    want = reference.linear(native.as_seen(x, activations, m.spec.group_size or native.DENSE_GROUP), m)
    return got.shape == want.shape and bool((got - want).norm() <= 2**-8 * want.norm())


def random_matrix(name: str, block: int) -> Packed:
    """A small one to try a kernel on: in a grouped format and that block, int8, mxfp4 or one of ggml's."""
    if name in CARRIED:
        return _random_carried(name)
    return _random_int8() if name == "int8" else _random_mxfp4() if name == "mxfp4" else _random_grouped(name, block)


def random_expert(name: str, block: int) -> tuple[Tensor, RecordLayout]:
    """Three small experts in a format in blocks of rows, as records in a slab uint8 [3, bytes]."""
    group = CARRIED[name].group if name in CARRIED else MX_GROUP if name == "mxfp4" else 64
    record = RecordLayout(MatrixSpec(name, 2 * 96, 128, 2, group, block), MatrixSpec(name, 128, 96, 1, group, block))
    slab = torch.zeros(3, record.nbytes, dtype=torch.uint8)
    for slot in slab:
        for matrix, spec in (("w13", record.w13), ("w2", record.w2)):
            m = _random_carried(name, spec) if name in CARRIED else \
                _random_mxfp4(spec) if name == "mxfp4" else _random_grouped(name, block, spec)
            for placed in record.placed:
                if placed.matrix == matrix:
                    view(slot, placed.offset, placed.tensor).copy_(m[placed.tensor.name])
    return slab, record


def _random_grouped(name: str, block: int, spec: MatrixSpec | None = None) -> Packed:
    spec = spec or MatrixSpec(name, 192, 256, group_size=64, block=block)
    random = torch.Generator().manual_seed(block)
    q = torch.randint(0, 2**spec.bits, (spec.padded_rows, spec.padded_cols), dtype=torch.uint8, generator=random)
    scale, zero = torch.randn(2, spec.padded_rows, spec.padded_cols // spec.group_size, generator=random).bfloat16()
    return grouped.pack(q, scale, zero, spec)


def _random_mxfp4(spec: MatrixSpec | None = None) -> Packed:
    spec = spec or MatrixSpec("mxfp4", 192, 256, group_size=MX_GROUP, block=MX_BLOCK)
    random, shape = torch.Generator().manual_seed(4), (spec.rows, spec.padded_cols // MX_GROUP)
    codes = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(124, 130, shape, dtype=torch.uint8, generator=random)
    return mxfp4.carry(mxfp4.Blocks(codes, scales), spec)


def _random_carried(name: str, spec: MatrixSpec | None = None) -> Packed:
    """Random bytes, with numbers of about 1 at most."""
    layout, random = CARRIED[name], torch.Generator().manual_seed(6)
    nbytes = layout.columns * layout.bits // 8 + layout.params
    spec = spec or MatrixSpec(rows=192, cols=512, **with_layout(name))
    shape = spec.rows, spec.padded_cols // layout.columns, nbytes
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    for at in carried.HALVES[name]:
        raw[..., at + 1] = raw[..., at + 1] & 3 | 0x18  # fp16 from 2^-9 to 2^-8, of which fp16 has the products
    return carried.carry(carried.Blocks(name, raw), spec)


def _random_int8() -> Packed:
    weight = torch.randn(70, 128, generator=torch.Generator().manual_seed(8))
    return int8.pack(weight, MatrixSpec("int8", 70, 128))

"""Bytes of every format, record and KV cache, in integers only.

A MatrixSpec is the one description of a packed matrix: the formats check real tensors against it,
the store computes offsets from it and the plan adds it up. A test holds it to real packing.

N rows (out), K columns (in), g group size, B rows per block, H hidden, F expert inner.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from types import MappingProxyType
from typing import Any

from qmix.config import CARRIED_NAMES, DTYPES, GROUPED_BITS, QuantConfig, parse_kind, parts_of
from qmix.errors import UsageError
from qmix.spec import Activation, Attention, Model, Tensor
from qmix.tensorfile import ITEM_BYTES

GIB = 2**30
MIB = 2**20
SWIGLU = Activation()
HALVES = ("gate", "up")  # whose tensors are named so where their formats differ
TENSOR_ALIGN = 64  # a cache line, and what every kernel may assume of a tensor's first byte
RECORD_ALIGN = 4096  # what O_DIRECT needs of offset, length and address

PLAIN_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
PASS_TOKENS = 8192
PASS_BYTES = 256 * MIB  # of the rows [T, K, H] fp32
CARRIED_BLOCK = 64  # rows of a block of ggml's formats
MX_GROUP = 32  # columns that share a scale in mxfp4
MX_BLOCK = 64  # rows of a block of mxfp4: no kernel wants another
BNB_BLOCK = 64  # bitsandbytes block size of nf4 and fp4, along the input dimension
KV_FORMATS = ("bf16", "int8")  # how keys and values are kept; "bf16" stands for the compute dtype
KV_SCALE_BYTES = 4  # an fp32 for each key and value of an int8 KV cache
KV_PIECE = 1024  # positions of an int8 KV cache that torch decodes at a time
BNB_NESTED_BLOCK = 256  # absmax values per block of the second quantization
TILE_BYTES = 4 * MIB  # the most that a decoded tile may take, or one block of rows if that is more

SIZE = re.compile(r"([0-9]{1,20})(\.[0-9]{1,20})? ?(?:([KMGT])(?:iB)?|B)?", re.IGNORECASE | re.ASCII)
MAX_SIZE = 2**60  # bytes; more is a slip of the finger


@dataclass(frozen=True, slots=True)
class CarriedLayout:
    """A format of ggml's (qmix/formats/carried.py). bits: of a code; group: columns that share a scale; columns: of a
    block of ggml's; params: bytes of parameters for a row of these; middle: what is taken off a code; table: a code is
    a place in a table."""

    bits: int
    group: int
    columns: int
    params: int
    middle: int = 0
    table: bool = False


CARRIED = MappingProxyType({
    "q8_0": CarriedLayout(8, 32, 32, 2), "q4_0": CarriedLayout(4, 32, 32, 2, 8), "q4_1": CarriedLayout(4, 32, 32, 4),
    "q5_0": CarriedLayout(5, 32, 32, 2, 16), "q5_1": CarriedLayout(5, 32, 32, 4),
    "q4_k": CarriedLayout(4, 32, 256, 16), "q5_k": CarriedLayout(5, 32, 256, 16),
    "q6_k": CarriedLayout(6, 16, 256, 18, 32),
    "iq4_nl": CarriedLayout(4, 32, 32, 2, table=True), "iq4_xs": CarriedLayout(4, 32, 256, 8, table=True)})
assert tuple(CARRIED) == CARRIED_NAMES


def round_up(n: int, multiple: int) -> int:
    """round_up(65, 64) == 128."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor inside a packed matrix; dtype is safetensors' name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class MatrixSpec:
    """A [rows, cols] matrix in a format: "int4" | "int3" | "int2" | "mxfp4" | "nf4" | "fp4" | "int8" | "bf16" |
    "fp16" | "fp32", one of CARRIED, or two of these, "q4_k+q6_k": gate and up of a w13, side by side (`halves`).

    rows and cols are logical. The rows come in `parts` equal pieces (gate and up are two), each padded
    alone: the grouped formats, int4, int3 and int2, and mxfp4 pad rows to `block` and columns to `group_size`, which
    are 0 for others; those of CARRIED have both, and pad columns to ggml's blocks; int8, nf4 and fp4 pad them to 64.
    bias: it has one, fp32 [rows], never quantized: products add it to their fp32 sums, and every checkpoint dtype is
    exact in fp32, for 0.3 % of a 4-bit record of gpt-oss. activation: what joins the two parts of an expert's w13.
    Example: int4, rows 2 x 80, block 64, parts 2 -> padded_rows 256; row 80 of the matrix is row 128.
    """

    format: str
    rows: int
    cols: int
    parts: int = 1
    group_size: int = 0
    block: int = 0
    double_quant: bool = False
    bias: bool = False
    activation: Activation = SWIGLU

    @property
    def halves(self) -> tuple[MatrixSpec, ...]:
        """Gate and up as matrices of their own, where their formats differ; else nothing."""
        several = parts_of(self.format)
        return tuple(replace(self, **with_layout(name), rows=self.rows // 2, parts=1) for name in several) \
            if len(several) > 1 else ()

    @property
    def bits(self) -> int:
        """Of a code of a grouped format; 0 for the others, mxfp4 too."""
        return GROUPED_BITS.get(self.format, 0)

    @property
    def code_bits(self) -> int:
        """Of a code of the grouped formats and mxfp4, whose codes lie alike; 0 for the others."""
        return 4 if self.format == "mxfp4" else self.bits

    @property
    def in_blocks(self) -> bool:
        """Whether it lies in blocks of rows, as a GPU's kernels of quantized experts want it."""
        return bool(self.code_bits) or self.format in CARRIED

    @property
    def padded_rows(self) -> int:
        if not self.block:
            return self.rows
        return self.parts * round_up(self.rows // self.parts, self.block)

    @property
    def padded_cols(self) -> int:
        if self.format in CARRIED:
            return round_up(self.cols, CARRIED[self.format].columns)
        if self.group_size:
            return round_up(self.cols, self.group_size)
        return round_up(self.cols, 64) if self.format in ("int8", "nf4", "fp4") else self.cols

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return (*self._weight, *((TensorSpec("bias", "F32", (self.rows,)),) if self.bias else ()))

    @property
    def _weight(self) -> tuple[TensorSpec, ...]:
        n, k = self.padded_rows, self.padded_cols
        if halves := self.halves:
            return tuple(replace(tensor, name=f"{part}.{tensor.name}")
                         for part, half in zip(HALVES, halves, strict=True) for tensor in half._weight)
        if self.bits:
            return (TensorSpec("qweight", "U8", (n // self.block, k, self.block * self.bits // 8)),
                    TensorSpec("qparams", "BF16", (k // self.group_size, n, 2)))
        if self.format == "mxfp4":
            return (TensorSpec("qweight", "U8", (n // self.block, k, self.block // 2)),
                    TensorSpec("scale", "U8", (k // self.group_size, n)))
        if self.format in CARRIED:
            carried = CARRIED[self.format]
            return (TensorSpec("qweight", "U8", (n // self.block, k // 8, self.block * carried.bits)),
                    TensorSpec("scales", "U8", (n // self.block, k // carried.columns, self.block * carried.params)))
        if self.format == "int8":
            return TensorSpec("qweight", "I8", (n, k)), TensorSpec("scale", "BF16", (n,))
        if self.format in ("nf4", "fp4"):
            return TensorSpec("qweight", "U8", (n * k // 2, 1)), *self._absmax(n * k // BNB_BLOCK)
        return (TensorSpec("weight", PLAIN_DTYPES[self.format], (n, k)),)

    def _absmax(self, blocks: int) -> tuple[TensorSpec, ...]:
        if not self.double_quant:
            return (TensorSpec("absmax", "F32", (blocks,)),)
        return (TensorSpec("absmax", "U8", (blocks,)),
                TensorSpec("nested_absmax", "F32", (round_up(blocks, BNB_NESTED_BLOCK) // BNB_NESTED_BLOCK,)),
                TensorSpec("offset", "F32", (1,)))

    @property
    def nbytes(self) -> int:
        """Payload bytes, without alignment between tensors."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def without_bias(self) -> MatrixSpec:
        """The weights alone: what a format packs."""
        return replace(self, bias=False)

    @property
    def weights(self) -> int:
        """Logical weights, the denominator of bits per weight."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of a record: which matrix ("w13" | "w2") it belongs to and where it starts."""

    matrix: str
    tensor: TensorSpec
    offset: int


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """One expert's record: w13 (gate and up stacked, [2F, H], or side by side in two formats) and w2 (down, [H, F]),
    each tensor on a 64-byte boundary, the whole padded to 4096 bytes. Gaps and tail are zeros."""

    w13: MatrixSpec
    w2: MatrixSpec

    @property
    def placed(self) -> tuple[Placed, ...]:
        found, offset = [], 0
        for matrix, spec in (("w13", self.w13), ("w2", self.w2)):
            for tensor in spec.tensors:
                offset = round_up(offset, TENSOR_ALIGN)
                found.append(Placed(matrix, tensor, offset))
                offset += tensor.nbytes
        return tuple(found)

    @property
    def payload(self) -> int:
        """Bytes up to the end of the last tensor."""
        last = self.placed[-1]
        return last.offset + last.tensor.nbytes

    @property
    def nbytes(self) -> int:
        return round_up(self.payload, RECORD_ALIGN)


def record_layouts(model: Model, quant: QuantConfig) -> tuple[RecordLayout, ...]:
    """The layouts that records of a store have: one, or one for each of the kinds of a mixed store."""
    if quant.experts != "mixed":
        return (record_layout(model, quant),)

    def layout(w13: str, w2: str) -> RecordLayout:
        return RecordLayout(*(replace(spec, **_of_kind(name, quant))
                              for spec, name in zip(_matrices(model), (w13, w2), strict=True)))

    return tuple(layout(*kind) for kind in quant.kinds)


def _of_kind(name: str, quant: QuantConfig) -> dict[str, Any]:
    """What a MatrixSpec has of a kind's format: "int3g64", "q4_k" or "q4_k+q6_k"."""
    if len(parts_of(name)) > 1:
        return {"format": name, "block": CARRIED_BLOCK}
    kind, group = parse_kind(name)
    return with_layout(kind) if kind in CARRIED else {"format": kind, "group_size": group, "block": quant.block}


def with_layout(kind: str) -> dict[str, Any]:
    """What a MatrixSpec of a format has beside its shape where nothing is to be chosen."""
    if kind in CARRIED:
        return {"format": kind, "group_size": CARRIED[kind].group, "block": CARRIED_BLOCK}
    return {"format": kind} | ({"group_size": MX_GROUP, "block": MX_BLOCK} if kind == "mxfp4" else {})


def _matrices(model: Model) -> tuple[MatrixSpec, MatrixSpec]:
    """w13 and w2, in no format yet."""
    hidden, expert = model.hidden, model.expert
    return (MatrixSpec("", 2 * expert.inner, hidden, parts=2, bias=expert.bias, activation=expert.activation),
            MatrixSpec("", hidden, expert.inner, bias=expert.bias))


def record_layout(model: Model, quant: QuantConfig) -> RecordLayout:
    """The layout that every record of a store shares that is not mixed.

    Mixtral 8x7B at int4 g64: 99,090,432 bytes.
    """
    kind = DTYPES[model.dtype] if quant.experts == "keep" else quant.experts
    extra = {"format": kind, "group_size": quant.group_size, "block": quant.block} if kind in GROUPED_BITS else \
        with_layout(kind)
    w13, w2 = (replace(spec, double_quant=quant.double_quant, **extra) for spec in _matrices(model))
    return RecordLayout(w13, w2)


def plain_format(model: Model, tensor: Tensor) -> str:
    """Of a dense tensor that stays plain: the checkpoint's dtype, or fp32 (Model.is_wide)."""
    return "fp32" if model.is_wide(tensor) else DTYPES[model.dtype]


def dense_spec(model: Model, quant: QuantConfig, tensor: Tensor) -> MatrixSpec | None:
    """How a dense tensor is stored, or None where it stays a plain tensor (router, norm, and the embedding unless it
    has a format of ggml's by its name) in `plain_format`, whatever the dense format."""
    if tensor.role not in ("linear", "mlp", "head") \
            and not (tensor.role == "embedding" and tensor.name in quant.dense_kinds):
        return None
    rows, cols = tensor.shape
    kind = quant.dense_kinds.get(tensor.name, DTYPES[model.dtype] if quant.dense == "keep" else quant.dense)
    if kind == "int4":
        return MatrixSpec(kind, rows, cols, group_size=quant.group_size, block=quant.block)
    return MatrixSpec(rows=rows, cols=cols, **with_layout(kind))


def dense_bytes(model: Model, quant: QuantConfig, tensor: Tensor) -> int:
    spec = dense_spec(model, quant, tensor)
    item = ITEM_BYTES[PLAIN_DTYPES[plain_format(model, tensor)]]
    return prod(tensor.shape) * item if spec is None else spec.nbytes


def kv_owners(model: Model) -> tuple[Attention, ...]:
    """Of the layers that keep keys and values of their own."""
    return tuple(layer.mixer for layer in model.layers
                 if isinstance(layer.mixer, Attention) and layer.mixer.kv_source is None)


MTP_VOCAB = 65536  # ids that such a head guesses, the first ones: merged first, they are those that occur most
MTP_PENDING = 512  # hidden states that wait for a multi-token-prediction head, of a session


def pass_tokens(model: Model) -> int:
    """Tokens of a prompt that go through the layers together: as many as keep the rows that a layer's experts give
    within PASS_BYTES, a power of two, at most PASS_TOKENS. 8192 for Mixtral (K 2, H 4096), 4096 for Qwen3-30B-A3B
    (8, 2048). A function of the model alone: bits depend on it."""
    tokens = PASS_TOKENS
    while tokens > 1 and tokens * model.top_k * model.hidden * 4 > PASS_BYTES:
        tokens //= 2
    return tokens


def tile_rows(spec: MatrixSpec, item_bytes: int, tile_bytes: int) -> int:
    """Rows of a full tile of formats.packed.row_tiles, of a matrix that has as many."""
    rows = max(1, tile_bytes // (spec.padded_cols * item_bytes))
    return max(spec.block, rows // spec.block * spec.block) if spec.block else rows


def format_bytes(n: int) -> str:
    """1536 -> "1.5 KiB"; sizes are binary in all that qmix prints."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{n} B" if unit == "B" else f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def parse_bytes(text: str) -> int:
    """Bytes of a size as people write it; binary, as in all that qmix prints.

    "24G" and "24GiB" -> 24 * 2**30, "1.5g" -> 1610612736, "512M", "64K", "2T", "4096" and "4096 B" -> 4096.
    UsageError naming the text for anything else ("24GB" could be meant as 24e9), 0, and more than 2**60.
    """
    found = SIZE.fullmatch(text.strip())
    if not found or (found[2] and not found[3]):
        raise UsageError(f"{text!r:.60}: not a size", "write 24G, 1.5G, 512M or 24GiB (binary units), or plain bytes")
    nbytes = int(Fraction(found[1] + (found[2] or "")) * 1024**(" KMGT".index((found[3] or " ").upper())))
    if not 1 <= nbytes <= MAX_SIZE:
        raise UsageError(f"{text!r:.60}: got {nbytes} bytes, want 1 to 2**60")
    return nbytes

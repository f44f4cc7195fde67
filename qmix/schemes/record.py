"""How the weights of a checkpoint are quantized already, as data: one record for each layout in which a matrix [N, K]
is published, N rows out, K columns in.

Such a matrix is several tensors: its codes, their scales, and what else the layout has. A `Form` says by which name and
dtype the codes are recognized, `parts` which tensors lie beside them, `shape` how large the matrix is that they are.
What they do to values is in qmix/lowbit, where torch is. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qmix.models.source import Misfit, Shape

FUSED = (".gate_up_proj", ".down_proj")  # experts of a layer in one tensor [E, N, K]
FLOATS = ("F16", "BF16", "F32")
E2M1_GROUP = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True, slots=True)
class Form:
    """The tensor of codes: its name ends in one of `endings`, its dtype is one of `dtypes`. weight: the ending that the
    name of the model's tensor has in its place; None = the same."""

    endings: tuple[str, ...]
    dtypes: tuple[str, ...]
    weight: str | None = None

    def weight_of(self, name: str, dtype: str) -> str | None:
        """The model's tensor whose codes these are; None where they are something else."""
        ending = next((e for e in self.endings if name.endswith(e)), None)
        if ending is None or dtype not in self.dtypes:
            return None
        return name if self.weight is None else name.removesuffix(ending) + self.weight


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor beside the codes. endings: alternatives, behind the name that `Form.weight_of` gives (with "_") or
    behind the module's (with ".")."""

    role: str
    endings: tuple[str, ...]
    dtypes: tuple[str, ...]
    required: bool = True

    def names(self, weight: str) -> tuple[str, ...]:
        return tuple(weight + e if e.startswith("_") else weight.rpartition(".")[0] + e for e in self.endings)


def grid(shape: Shape, block: tuple[int, int]) -> Shape:
    """Scales of a matrix [.., N, K], one for `block` rows and columns; 0 = all of them.

    grid((300, 256), (128, 128)) == (3, 2)
    """
    *before, n, k = shape
    return (*before, -(-n // (block[0] or n or 1)), -(-k // (block[1] or k or 1)))


def fit(condition: bool, got: object, wanted: str) -> None:
    if not condition:
        raise Misfit(f"got {got}, want {wanted}")


@dataclass(frozen=True, slots=True)
class Scaled:
    """Numbers of 8 bits, FP8 (E4M3) or int8, each a byte [.., N, K], times a scale for each `block` of rows and
    columns, 0 = all; zeros: with an int8 zero point beside each scale, which is subtracted first; powers: the scales
    may be bytes s that stand for 2^(s - 127). weight_scale_inv is multiplied as weight_scale is."""

    number: str  # "fp8" or "int8"
    block: tuple[int, int]
    zeros: bool = False
    powers: bool = False

    @property
    def form(self) -> Form:
        return Form((".weight", *FUSED), ("F8_E4M3",) if self.number == "fp8" else ("I8",))

    @property
    def parts(self) -> tuple[Part, ...]:
        scales = Part("scales", ("_scale_inv", "_scale"), (*FLOATS, "F8_E8M0", *(("U8",) if self.powers else ())))
        return (scales, Part("zeros", ("_zero_point",), ("I8",))) if self.zeros else (scales,)

    @property
    def title(self) -> str:
        rows, cols = self.block
        share = "matrix" if not rows else "row" if (rows, cols) == (1, 0) else f"{cols} numbers" if rows == 1 else \
            f"block of {rows} x {cols}"
        return f"{'FP8' if self.number == 'fp8' else 'int8'} with a scale for each {share}"

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Of the matrix, by the shapes of its tensors; Misfit where these do not go together."""
        whole = shapes["codes"]
        fit(len(whole) in (2, 3), list(whole), "a matrix")
        want = grid(whole, self.block)
        for role in ("scales", "zeros") if self.zeros else ("scales",):
            got = shapes[role]
            spelled = {want, want[:-1]} if self.block[1] == 0 and self.block[0] == 1 else \
                {want, want[:-1], want[:-2]} if self.block == (0, 0) else {want}
            fit(got in spelled, f"{role} {list(got)} beside {list(whole)}", str(list(want)))
        return whole


@dataclass(frozen=True, slots=True)
class PackedInts:
    """compressed-tensors' pack-quantized: integers of `bits` bits, each with 2^(bits-1) added, as one stream of bits in
    int32 [N, K bits/32]; of 3, 5, 6 and 7 bits older versions put whole ones alone in an int32. One scale, and with
    `zeros` one zero point (packed along N in the same way), for `group` columns, 0 = all."""

    bits: int
    group: int
    zeros: bool

    @property
    def form(self) -> Form:
        return Form((".weight_packed",), ("I32",), ".weight")

    @property
    def parts(self) -> tuple[Part, ...]:
        found = (Part("scales", ("_scale",), FLOATS), Part("shape", ("_shape",), ("I64", "I32")),
                 Part("order", ("_g_idx",), ("I32", "I64"), required=False))
        return (*found, Part("zeros", ("_zero_point",), ("I32", "I8"))) if self.zeros else found

    @property
    def title(self) -> str:
        return f"int{self.bits}{' with zero points' if self.zeros else ''}, {group_title(self.group)} (pack-quantized)"

    def is_stream(self, words: int, count: int) -> bool:
        """Whether `count` codes in so many int32 are one stream of bits. Misfit where they are neither layout."""
        stream, alone = -(-count * self.bits // 32), -(-count // (32 // self.bits))
        fit(words in (stream, alone) and (stream != alone or 32 % self.bits == 0), f"{count} codes in {words} int32",
            f"{stream} int32")
        return words == stream

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """shapes: `shape` as its two numbers, not as the shape of that tensor."""
        codes, (n, k) = shapes["codes"], shapes["shape"]
        fit(n > 0 and k > 0 and len(codes) == 2 and codes[0] == n, f"codes {list(codes)} of {[n, k]}", f"{n} rows")
        self.is_stream(codes[1], k)
        groups = grid((n, k), (1, self.group))
        fit(shapes["scales"] in (groups, groups[:-1] if not self.group else groups), list(shapes["scales"]),
            f"scales {list(groups)}")
        if self.zeros:
            zeros = shapes["zeros"]
            fit(len(zeros) == 2 and zeros[1] == groups[1], list(zeros), f"zero points in {groups[1]} columns")
            if zeros != groups:  # plain int8
                self.is_stream(zeros[0], n)
        if "order" in shapes:
            fit(shapes["order"] == (k,), list(shapes["order"]), f"g_idx {[k]}")
        return n, k


@dataclass(frozen=True, slots=True)
class Fp4:
    """4-bit floats (E2M1), two in a byte, [N, K/2], the first in its lower bits. nvfp4: an FP8 scale for 16 columns
    and one fp32 number for the matrix, `divides` the scales (compressed-tensors) or multiplies them (modelopt);
    mxfp4: a power of two for 32 columns."""

    kind: str
    packed: bool = True  # codes are called weight_packed, else weight
    divides: bool = True

    @property
    def form(self) -> Form:
        return Form((".weight_packed",), ("U8",), ".weight") if self.packed else Form((".weight",), ("U8",))

    @property
    def parts(self) -> tuple[Part, ...]:
        if self.kind == "mxfp4":
            return (Part("scales", ("_scale",), ("U8", "F8_E8M0")),)
        whole = ("_global_scale",) if self.divides else ("_scale_2",)
        return Part("scales", ("_scale",), ("F8_E4M3",)), Part("global", whole, ("F32",))

    @property
    def title(self) -> str:
        return f"{self.kind.upper()}, groups of {E2M1_GROUP[self.kind]}"

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        codes, group = shapes["codes"], E2M1_GROUP[self.kind]
        fit(len(codes) == 2, list(codes), "a matrix")
        n, k = codes[0], 2 * codes[1]
        fit(k % group == 0, f"{k} columns", f"a multiple of {group}")
        fit(shapes["scales"] == (n, k // group), list(shapes["scales"]), f"scales {[n, k // group]}")
        if "global" in shapes:
            fit(shapes["global"] in ((), (1,)), list(shapes["global"]), "one global scale")
        return n, k


@dataclass(frozen=True, slots=True)
class Awq:
    """AutoAWQ's gemm layout: 4-bit codes, eight columns of W^T in an int32 [K, N/8], from the lowest bits on columns
    0 2 4 6 1 3 5 7; zero points [K/g, N/8] in the same order, scales [K/g, N]; w = (q - zero) scale."""

    group: int

    @property
    def form(self) -> Form:
        return Form((".qweight",), ("I32",), ".weight")

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part("scales", (".scales",), FLOATS), Part("zeros", (".qzeros",), ("I32",))

    @property
    def title(self) -> str:
        return f"AWQ, 4 bits, {group_title(self.group)}"

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        codes = shapes["codes"]
        fit(len(codes) == 2, list(codes), "a matrix")
        k, n = codes[0], 8 * codes[1]
        groups = grid((n, k), (1, self.group))[1]
        fit(self.group == 0 or k % self.group == 0, f"{k} rows", f"a multiple of the group, {self.group}")
        fit(shapes["scales"] == (groups, n), list(shapes["scales"]), f"scales {[groups, n]}")
        fit(shapes["zeros"] == (groups, codes[1]), list(shapes["zeros"]), f"qzeros {[groups, codes[1]]}")
        return n, k


@dataclass(frozen=True, slots=True)
class Gptq:
    """AutoGPTQ's layout: codes of `bits` bits of W^T along K as one stream of bits, int32 [K bits/32, N]; zero points
    [G, N bits/32] along N, in version 1 less 1; scales [G, N]; g_idx [K] is the group of each column (with desc_act
    they are out of order); w = (q - zero) scale."""

    bits: int
    group: int
    version: int
    desc_act: bool
    symmetric: bool

    @property
    def form(self) -> Form:
        return Form((".qweight",), ("I32",), ".weight")

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("scales", (".scales",), FLOATS), Part("zeros", (".qzeros",), ("I32",)),
                Part("order", (".g_idx",), ("I32", "I64"), required=self.desc_act))

    @property
    def title(self) -> str:
        order = " in the order of desc_act" if self.desc_act else ""
        return f"GPTQ, {self.bits} bits, {group_title(self.group)}{order}"

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        codes = shapes["codes"]
        fit(len(codes) == 2 and codes[0] * 32 % self.bits == 0, list(codes), f"a matrix of {self.bits}-bit codes")
        k, n = codes[0] * 32 // self.bits, codes[1]
        groups = grid((n, k), (1, self.group))[1]
        fit(n * self.bits % 32 == 0 and k % 32 == 0, [n, k], "multiples of 32")
        fit(shapes["scales"] == (groups, n), list(shapes["scales"]), f"scales {[groups, n]}")
        fit(shapes["zeros"] == (groups, n * self.bits // 32), list(shapes["zeros"]),
            f"qzeros {[groups, n * self.bits // 32]}")
        if "order" in shapes:
            fit(shapes["order"] == (k,), list(shapes["order"]), f"g_idx {[k]}")
        return n, k


Scheme = Scaled | PackedInts | Fp4 | Awq | Gptq


def group_title(group: int) -> str:
    return f"groups of {group}" if group else "one scale a row"

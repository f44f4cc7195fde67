"""How the GPU's kernels are cut: how much of a matrix a program has in hand, in how many warps and stages.

The built-in tables, by compute capability, were chosen by registers and shared memory of the compiled code; only the
dense gemv of 9.0 was measured, on an H200 (benchmarks/results). `qmix doctor --tune` measures (tuning.py) and keeps
what is faster (tuned.py).

Bits. A result is the same whenever it is computed with one configuration, but may differ in its last bits between two:
`threads` of the gemv decides how columns fall into partial sums, `cols` of the dense gemv likewise, `positions` of a
prompt's attention how its softmax is put together, and how a tile falls on warps may decide the order of sums within
it. So `--exact` takes the built-in ones. `unroll` changes no order. Neither gemv has a configuration of its own for one
token and for eight, since a token's bits must not depend on its company.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qmix.errors import ConfigError, UsageError

if TYPE_CHECKING:
    import torch  # else imported where it is called: a plan reads these tables too


def _check(config: Any, **limits: tuple[int, int]) -> None:
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        power = type(value) is int and value > 0 and not value & (value - 1)
        if not least <= (value if type(value) is int else -1) <= most or not (power or name == "stages"):
            raise ConfigError(f"{type(config).__name__.lower()}.{name}: got {value!r:.40}, want {least} to {most}"
                              + ("" if name == "stages" else ", a power of two"))


@dataclass(frozen=True, slots=True)
class Gemv:
    """Few tokens, grouped formats. threads: of a program, each with a group and a word of the weights; unroll: columns
    whose words are asked for together."""

    threads: int = 128
    unroll: int = 4

    def __post_init__(self) -> None:
        _check(self, threads=(32, 1024), unroll=(1, 32))  # unroll divides a group, of 32 columns at least


@dataclass(frozen=True, slots=True)
class Matmul:
    """Many tokens, grouped formats. tokens (at most) and rows of a tile, a multiple of a block's; warps and stages of a
    program."""

    tokens: int = 128
    rows: int = 128
    warps: int = 8
    stages: int = 3

    def __post_init__(self) -> None:
        _check(self, tokens=(16, 256), rows=(64, 256), warps=(1, 16), stages=(1, 8))


@dataclass(frozen=True, slots=True)
class Dense:
    """Few tokens, int8 and plain formats. rows (half of them where there are few), columns of a tile, and tiles whose
    weights are asked for together. Columns must be fewer than the 128 threads of a program, see cuda_dense_jit.gemv."""

    rows: int = 16
    cols: int = 64
    unroll: int = 4

    def __post_init__(self) -> None:
        _check(self, rows=(2, 128), cols=(16, 64), unroll=(1, 16))


@dataclass(frozen=True, slots=True)
class Attention:
    """Of prompts. tokens (at most) and positions of a tile, warps and stages of a program."""

    tokens: int = 64
    positions: int = 64
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        _check(self, tokens=(16, 256), positions=(16, 256), warps=(1, 16), stages=(1, 8))


Config = Gemv | Matmul | Dense | Attention
# Without tensor cores, as for fp32 and on sm_75, sums of a tile take many registers.
WIDE = Attention(32, 32, 8, 1)
TENSOR_CORES = (8, 0)  # the first compute capability for which Triton's products have them
# The compute capability, major, for which Triton multiplies by WGMMA: where a tile has WGMMA_TOKENS rows or more and
# WGMMA_WARPS warps or more.
HOPPER, WGMMA_TOKENS, WGMMA_WARPS = 9, 64, 4


@dataclass(frozen=True, slots=True)
class Configs:
    """One for each kernel; fp32 attention is always cut as WIDE."""

    gemv: Gemv = field(default_factory=Gemv)
    matmul: Matmul = field(default_factory=Matmul)
    dense: Dense = field(default_factory=Dense)
    attention: Attention = field(default_factory=Attention)


KERNELS = tuple(f.name for f in fields(Configs))
# The nearest below serves cards that are not listed. For sm_75 Triton compiles products without tensor cores, hence
# small tiles. On sm_8x and sm_12x the operands and results of a product are registers. Of the tiles that do not spill
# them in any format, each is the one with the fewest instructions a product; 128 x 128 would spill. The products of
# sm_90 and sm_100 read shared memory, which leaves registers for larger tiles. Attention is for heads of 128; on Hopper
# its tiles are too small for WGMMA, see cuda_prompt.attend_many.
BUILT_IN = MappingProxyType({
    (7, 5): Configs(matmul=Matmul(16, 64, 4, 2), attention=WIDE),
    (8, 0): Configs(matmul=Matmul(rows=64)),
    (9, 0): Configs(dense=Dense(rows=4), attention=Attention(32, 64, 4, 2)),
    (10, 0): Configs(attention=Attention(128, 64, 8, 2)),
    (12, 0): Configs(matmul=Matmul(rows=64), attention=Attention(128, 32, 8, 2)),
})
INTERPRETED = Configs(attention=WIDE)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Of a card; None for the CPU, where Triton's interpreter runs the kernels."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.get_device_capability(device)


def built_in(card: tuple[int, int] | None) -> Configs:
    """For a compute capability, as of `capability`: the nearest listed one that is not above it."""
    if card is None:
        return INTERPRETED
    known = [c for c in BUILT_IN if c <= card]
    if not known:
        raise UsageError(f"compute capability {card[0]}.{card[1]}: the kernels need 7.5 or newer", "use the CPU")
    return BUILT_IN[max(known)]


def from_plain(values: Any) -> Configs:
    """What dataclasses.asdict makes of Configs, {"gemv": {"threads": 128, "unroll": 4}, ...}; ConfigError for anything
    else."""
    kinds = {"gemv": Gemv, "matmul": Matmul, "dense": Dense, "attention": Attention}
    if type(values) is not dict or values.keys() != kinds.keys():
        raise ConfigError(f"configs: want {', '.join(kinds)}")
    made = {}
    for name, kind in kinds.items():
        if type(values[name]) is not dict or values[name].keys() != {f.name for f in fields(kind)}:
            raise ConfigError(f"{name}: want {', '.join(f.name for f in fields(kind))}")
        made[name] = kind(**values[name])
    return Configs(**made)

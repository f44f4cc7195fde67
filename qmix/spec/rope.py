"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and how it is stretched to longer contexts."""

from __future__ import annotations

from dataclasses import dataclass

from qmix.spec.checks import counts, numbers, want


@dataclass(frozen=True, slots=True)
class Linear:
    """Positions divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        numbers(self, "factor")


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv 2309.00071). original: positions that the model was trained with first; factor
    None: max_positions / original. Frequencies between beta_slow and beta_fast turns over `original` positions are
    blended; truncate: whether the bounds of that blend are whole dimensions. attention_factor scales cos and sin; None:
    from factor, or from mscale and mscale_all_dim where both are set."""

    original: int
    factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        counts(self, "original")
        numbers(self, "beta_fast", "beta_slow")
        for name in ("factor", "attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                numbers(self, name)


@dataclass(frozen=True, slots=True)
class Llama3:
    """Llama 3.1's: wavelengths above original / low_freq_factor are stretched by `factor`, those below
    original / high_freq_factor stay, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int

    def __post_init__(self) -> None:
        counts(self, "original")
        numbers(self, "factor", "low_freq_factor", "high_freq_factor")
        want(self.high_freq_factor > self.low_freq_factor, self, "high_freq_factor", self.high_freq_factor,
             f"more than low_freq_factor = {self.low_freq_factor}")


@dataclass(frozen=True, slots=True)
class LongRope:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a factor for each frequency, by whether the context is longer than
    `original`. attention_factor scales cos and sin; None: sqrt(1 + log(factor) / log(original)), 1 for a factor of 1 or
    less; factor None: max_positions / original."""

    original: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        counts(self, "original")
        want(len(self.short_factor) == len(self.long_factor) > 0, self, "long_factor", len(self.long_factor),
             f"as many as short_factor has: {len(self.short_factor)}")


@dataclass(frozen=True, slots=True)
class Proportional:
    """Gemma 4's partial rotary: all pairs of the head lie in the rotation, but only the first `rotated` of its
    dimensions have a frequency, the others 0; positions are divided by `factor`."""

    rotated: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        counts(self, "rotated", least=2)
        numbers(self, "factor")


Scaling = Linear | Yarn | Llama3 | LongRope | Proportional


@dataclass(frozen=True, slots=True)
class Rope:
    """Pairs (i, i + dim / 2) of the first `dim` dimensions of each head turn by position * theta^(-2i / dim). A dim
    smaller than the head is partial rotary: the other dimensions stay as they are."""

    theta: float
    dim: int
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        numbers(self, "theta")
        counts(self, "dim", least=2)
        want(self.dim % 2 == 0, self, "dim", self.dim, "an even number (rotary pairs)")

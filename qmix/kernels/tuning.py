"""Which configurations are tried for each kernel, and which one is taken. Pure: what runs and what times are arguments.

A candidate is left out, and counted, where it does not compile, asks for more registers or shared memory than the card
has, or gives other numbers than the default beyond the tolerance of its kernel. The fastest of the rest is taken where
it gains at least GAIN, by the geometric mean over the cases, twice in a row: the second time beside the default again,
so that a card that grew warm, or another program, does not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import exp, fsum, log

from torch import Tensor

from qmix.errors import QmixError
from qmix.kernels.configs import Attention, Config, Configs, Dense, Gemv, Matmul

GAIN = 0.03  # below it the default stays
# Relative, of the norm of a result: fp32 sums in another order; operands and results rounded to 16 bits.
TOLERANCES = {"gemv": 1e-5, "dense": 1e-5, "matmul": 2**-7, "attention": 2**-7}

Work = Callable[[int], Tensor]  # one call, on the i-th of its weights, each time others; its result
Timer = Callable[[Work], float]  # median seconds of a call


@dataclass(frozen=True, slots=True)
class Case:
    """A call of a kernel as a model makes it. start: with these configurations, ready to be called."""

    name: str
    start: Callable[[Configs], Work]


@dataclass(frozen=True, slots=True)
class Outcome:
    """kernel: a field of Configs; gain: 0.1 = a tenth more calls in the same time, of the best candidate, whether or
    not it was taken; skipped: (candidate, reason)."""

    kernel: str
    chosen: Config
    default: Config
    gain: float
    tried: int
    skipped: tuple[tuple[Config, str], ...]

    @property
    def changed(self) -> bool:
        return self.chosen != self.default


def candidates(kernel: str) -> list[Config]:
    """A short list: what is near the built-in ones, and cards differ in."""
    if kernel == "gemv":
        return [Gemv(*c) for c in product((32, 64, 128, 256), (2, 4, 8))]
    if kernel == "dense":
        return [Dense(*c) for c in product((8, 16, 32), (32, 64), (2, 4, 8))]
    if kernel == "attention":
        return [Attention(*c) for c in ((32, 32, 4, 1), (32, 32, 8, 1), (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3),
                                        (64, 128, 4, 2), (128, 32, 4, 2), (128, 32, 8, 2), (128, 64, 4, 2),
                                        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2))]
    return [Matmul(*c) for c in ((16, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 4, 2),
                                 (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2),
                                 (128, 128, 8, 3), (128, 128, 8, 4))]


def choose(kernel: str, default: Configs, options: Sequence[Config], cases: Sequence[Case], timer: Timer) -> Outcome:
    """The configuration of `kernel` to take instead of default's, the others being default's. QmixError where the
    default itself fails, or the GPU after a candidate that failed."""
    own: Config = getattr(default, kernel)
    wanted = [_checked(kernel, case.start(default)) for case in cases]
    before = [timer(case.start(default)) for case in cases]
    skipped: list[tuple[Config, str]] = []
    best, best_gain = own, 0.0
    for option in options:
        if option == own:
            continue
        configs = _with(default, kernel, option)
        reason = next(_reasons(kernel, configs, cases, wanted), None)
        if reason is not None:
            skipped.append((option, reason))
            _checked(kernel, cases[0].start(default))  # whether the GPU still works
            continue
        gain = _gain(before, [timer(case.start(configs)) for case in cases])
        if gain > best_gain:
            best, best_gain = option, gain
    if best_gain >= GAIN:
        configs = _with(default, kernel, best)
        best_gain = min(best_gain, _gain(*([timer(case.start(each)) for case in cases] for each in (default, configs))))
    return Outcome(kernel, best if best_gain >= GAIN else own, own, best_gain, len(options), tuple(skipped))


def _with(configs: Configs, kernel: str, option: Config) -> Configs:
    return replace(configs, **{kernel: option})  # type: ignore[arg-type]


def _checked(kernel: str, work: Work) -> Tensor:
    """A result of the default."""
    try:
        result = work(0).float().cpu()
    except QmixError:
        raise
    except Exception as e:  # Triton's errors have no common base
        raise QmixError(f"tuning {kernel}: the built-in configuration failed: {_line(e)}",
                        "restart qmix; if it happens again, please report it") from None
    if not result.isfinite().all():
        raise QmixError(f"tuning {kernel}: the built-in configuration gives NaN or infinity", "please report it")
    return result


def _reasons(kernel: str, configs: Configs, cases: Sequence[Case], wanted: Sequence[Tensor]) -> Iterator[str]:
    """Why a candidate is left out; nothing where it is right."""
    for case, want in zip(cases, wanted, strict=True):
        try:
            got = case.start(configs)(0).float().cpu()
        except Exception as e:  # does not compile, too many registers, too much shared memory
            yield _line(e)
            return
        error = float((got - want).norm() / want.norm())
        if not error <= TOLERANCES[kernel]:
            yield f"wrong numbers ({case.name}: {error:.1g} off)"


def _gain(before: Sequence[float], after: Sequence[float]) -> float:
    return exp(fsum(log(b / a) for b, a in zip(before, after, strict=True)) / len(before)) - 1


def _line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:200]

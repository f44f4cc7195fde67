"""How near to a GPU's memory do the Triton kernels come, at Mixtral 8x7B's shapes?

    python benchmarks/cuda_kernels.py --json figures.json     on a machine with an NVIDIA GPU
    python benchmarks/cuda_kernels.py --interpret             anywhere: tiny shapes, Triton's interpreter, no speeds

Per format, expert records of random codes in a slab that is many times the card's cache, and of these

    gate+up, down    the experts of `--tokens` tokens, two each, all different: GB/s of the stored bytes, each read
                     once, and its share of what copying device memory gave in the same run (bytes read and written)
    expert           both in a row, as `chosen_experts` launches them, jobs made on the host included
    prefill          one expert's gate+up for `--prompt` tokens, TFLOP/s

Every figure is the median of --repeat runs, timed by events, each with other slots than the one before. Before any
is timed, results are compared with the CPU's reference (fp32, decoded from the same bytes); a wrong one ends the run
with exit code 1. Exit code 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.errors import QmixError
from qmix.formats.packed import Packed, view
from qmix.kernels import cuda, reference
from qmix.render import table
from qmix.sizes import MatrixSpec, RecordLayout

FORMATS = ("int4", "int3", "int2")
AGREES = 1e-4  # relative: fp32 sums in another order
AGREES_ROUNDED = 1e-2  # prefill rounds x and its result to bf16


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    inner: int
    slots: int
    prompt: int


MIXTRAL = Shape(4096, 14336, 16, 512)
TINY = Shape(64, 64, 4, 20)


def random_slab(record: RecordLayout, slots: int, device: torch.device) -> Tensor:
    """Records whose codes are random bytes, with scales of a few hundredths and small zeros: [slots, bytes]."""
    pool = torch.zeros(slots, record.nbytes, dtype=torch.uint8, device=device)
    random = torch.Generator(device).manual_seed(0)
    for slot in pool:
        for placed in record.placed:
            tensor = view(slot, placed.offset, placed.tensor)
            if placed.tensor.name == "qweight":
                tensor.random_(0, 256, generator=random)
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=random, device=device) * 0.01)
    return pool


def packed(pool: Tensor, slot: int, record: RecordLayout, matrix: str) -> Packed:
    """A matrix of a slot, on the CPU."""
    row, spec = pool[slot].cpu(), {"w13": record.w13, "w2": record.w2}[matrix]
    return Packed.of(spec, {p.tensor.name: view(row, p.offset, p.tensor) for p in record.placed if p.matrix == matrix})


def milliseconds(run: Callable[[int], object], repeat: int, device: torch.device) -> float | None:
    """Median over `repeat` calls run(i), after a few that do not count; None under the interpreter."""
    if device.type == "cpu":
        run(0)
        return None
    for i in range(5):
        run(i)
    taken = []
    for i in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(i)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def copy_bandwidth(repeat: int, device: torch.device) -> float | None:
    """GB/s of reading and writing 1 GiB of device memory."""
    nbytes = 2**30 if device.type == "cuda" else 2**20
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = milliseconds(lambda i: target.copy_(source), repeat, device)
    return None if taken is None else 2 * nbytes / 1e6 / taken


class Differs(Exception):
    """A kernel is wrong."""


def check(what: str, got: Tensor, want: Tensor, limit: float) -> float:
    """Relative error. Differs where it is too large."""
    error = float((got.cpu().double() - want.double()).norm() / want.double().norm())
    if not error <= limit:
        raise Differs(f"{what}: differs from the reference by {error:.2g}, more than {limit:g}")
    return error


def gated_reference(x: Tensor, m: Packed) -> Tensor:
    gate, up = reference.linear(x, m).view(len(x), 2, -1)[:, :, :m.spec.rows // 2].unbind(1)
    return F.silu(gate) * up


class Case:
    """A format's slab and what is measured on it."""

    def __init__(self, name: str, shape: Shape, device: torch.device, *, block: int = 64, group: int = 64,
                 tokens: int = 1, repeat: int = 50):
        self.record = RecordLayout(MatrixSpec(name, 2 * shape.inner, shape.hidden, 2, group, block),
                                   MatrixSpec(name, shape.hidden, shape.inner, 1, group, block))
        self.pool = random_slab(self.record, shape.slots, device)
        self.w13, self.w2 = (cuda.Matrices.in_slots(self.pool, self.record, m) for m in ("w13", "w2"))
        self._shape, self._device, self._repeat, self._tokens = shape, device, repeat, tokens
        random = torch.Generator().manual_seed(1)
        self.x = torch.randn(tokens, shape.hidden, generator=random).to(device)
        self.prompt = torch.randn(shape.prompt, shape.hidden, generator=random).to(device)
        if device.type == "cuda":
            self.prompt = self.prompt.to(torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16)

    def chosen(self, i: int) -> list[list[int]]:
        """Two slots for each token, walking round the slab."""
        first = i * 2 * self._tokens
        return [[(first + 2 * t + k) % self._shape.slots for k in (0, 1)] for t in range(self._tokens)]

    def measure(self) -> list[dict[str, object]]:
        pairs = 2 * self._tokens
        slots = self._shape.slots
        jobs = [cuda.Jobs.of(self.chosen(i), slots, self._device) for i in range(slots)]
        inner = torch.empty(pairs, self._shape.inner, device=self._device)
        y = torch.empty(pairs, self.w2.spec.padded_rows, device=self._device)
        error = self._check_experts()
        bytes13, bytes2 = (pairs * m.spec.nbytes for m in (self.w13, self.w2))
        found = []
        for what, nbytes, run in (
                ("gate+up", bytes13, lambda i: cuda.few(self.x, self.w13, jobs[i % slots][0], inner, gated=True)),
                ("down", bytes2, lambda i: cuda.few(inner, self.w2, jobs[i % slots][1], y)),
                ("expert", bytes13 + bytes2,
                 lambda i: cuda.chosen_experts(self.x, self.w13, self.w2, self.chosen(i)))):
            taken = milliseconds(run, self._repeat, self._device)
            found.append(self._row(what, self._tokens, error, taken) |
                         {"MB": round(nbytes / 1e6, 3), "GB/s": taken and round(nbytes / 1e6 / taken)})
        return [*found, self._prefill()]

    def _check_experts(self) -> float:
        got, chosen = cuda.chosen_experts(self.x, self.w13, self.w2, self.chosen(0)), self.chosen(0)
        want = torch.empty(got.shape)
        for token, slots in enumerate(chosen):
            for rank, slot in enumerate(slots):
                x = self.x[token:token + 1].cpu()
                half = gated_reference(x, packed(self.pool, slot, self.record, "w13"))
                down = reference.linear(half, packed(self.pool, slot, self.record, "w2"))
                want[token, rank] = down[0, :self.w2.spec.rows]
        return check(f"{self.w13.spec.format} experts", got, want, AGREES)

    def _prefill(self) -> dict[str, object]:
        tokens, spec = len(self.prompt), self.w13.spec
        y = torch.empty(tokens, spec.padded_rows, device=self._device, dtype=self.prompt.dtype)

        def run(i: int) -> None:
            cuda.many(self.prompt, self.w13, i % self._shape.slots, y)

        run(0)
        want = reference.linear(self.prompt[:8].float().cpu(), packed(self.pool, 0, self.record, "w13"))
        error = check(f"{spec.format} prefill", y[:8], want, AGREES_ROUNDED)
        taken = milliseconds(run, self._repeat, self._device)
        return self._row("prefill", tokens, error, taken) | {
            "MB": round(spec.nbytes / 1e6, 3), "TFLOP/s": taken and round(2 * tokens * spec.weights / 1e9 / taken, 1)}

    def _row(self, what: str, tokens: int, error: float, taken: float | None) -> dict[str, object]:
        return {"format": self.w13.spec.format, "kernel": what, "tokens": tokens, "error": float(f"{error:.1e}"),
                "ms": taken and round(taken, 4), "MB": None, "GB/s": None, "of copy": None, "TFLOP/s": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", action="append", choices=FORMATS, help="default: all three")
    parser.add_argument("--tokens", type=int, default=1, choices=range(1, cuda.FEW + 1))
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--block", type=int, default=64, choices=(64, 32))
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--interpret", action="store_true", help="tiny shapes on the CPU; checks only, no speeds")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if not args.interpret and not torch.cuda.is_available():
        parser.error("no GPU here; --interpret checks the kernels without one")
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton is not imported yet
    device = torch.device("cpu" if args.interpret else "cuda")
    shape = TINY if args.interpret else MIXTRAL
    if args.repeat < 1:
        parser.error("--repeat: want 1 or more")
    if 2 * args.tokens > shape.slots:
        parser.error(f"--tokens {args.tokens}: with two experts each, at most {shape.slots // 2} here")
    name = "Triton's interpreter: no speeds" if args.interpret else torch.cuda.get_device_name()
    copied = copy_bandwidth(args.repeat, device)
    rows = []
    try:
        for kind in args.format or FORMATS:
            rows += Case(kind, shape, device, block=args.block, group=args.group_size, tokens=args.tokens,
                         repeat=args.repeat).measure()
    except (QmixError, Differs) as e:
        sys.exit(str(e))
    for row in rows:
        if copied and row["GB/s"]:
            row["of copy"] = f"{row['GB/s'] / copied:.0%}"
    print(f"{name}, torch {torch.__version__}; copy: {round(copied)} GB/s" if copied else name, file=sys.stderr)
    shown = [column for column in rows[0] if any(row[column] is not None for row in rows)]
    print(table([{c: "" if row[c] is None else row[c] for c in shown} for row in rows], "md"))
    if args.json:
        figures = {"device": name, "torch": torch.__version__, "copy GB/s": copied, "group size": args.group_size,
                   "block": args.block, "rows": rows}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

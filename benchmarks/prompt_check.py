"""Are the products and the attention of prompts right, in every row, and the same each time? At Mixtral 8x7B's shapes.

    PYTHONPATH=. python benchmarks/prompt_check.py --json FILE          on a machine with an NVIDIA GPU
    PYTHONPATH=. python benchmarks/prompt_check.py --stand-in           anywhere: small shapes, Triton's interpreter

`attend_many` and `linear_many` for 12, 64, 200, 512 and 2048 tokens; gate+up and down in int4 (g64), int8 and
unquantized.
Each case is computed --repeat times (20) in the dtype of prompts, and

    every element of the first result is compared with fp32, which torch computes on the card, with TF32 off, from the
    same bytes decoded. The largest error is given as a share of what rounding may do (see `Case.limit`)
    all results are compared with the first bit by bit. A kernel has no reason to differ from itself, so an error that
    moves is a race: the first repeat that differs is told, with the rows and columns

An exception costs one case, and its traceback is kept. The medians of the times stand beside those of torch's
scaled_dot_product_attention. first_contact.py runs this with several assemblers (ptxas), each in a process with a
TRITON_CACHE_DIR of its own. Exit code 0: all right; 1: a case is wrong or died; 2: no card.

T tokens, S positions, Q query heads, KV key-value heads, D head size, H hidden, F expert inner.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_sections import short
from torch import Tensor

from qmix.formats import unpack
from qmix.formats.packed import Packed
from qmix.render import table
from qmix.sizes import MatrixSpec

DEVIATIONS = 4 * 3**0.5  # see Case.limit: one of 10^11 elements is that far off
HEADS_AT_ONCE = 8  # of the reference's scores: 2048 tokens of 8 heads are 134 MB


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    size: int
    tokens: tuple[int, ...]
    formats: tuple[str, ...]


MIXTRAL = Shape(4096, 14336, 32, 8, 128, (12, 64, 200, 512, 2048), ("int4", "int8", "plain"))
SMALL = Shape(128, 64, 4, 2, 32, (12, 40), ("int4", "int8", "plain"))
PAST = 100  # positions before the prompt, in the case of a later turn


@dataclass(frozen=True, slots=True)
class Case:
    """run: what is checked, -> [T, N]; reference: (want, spread), fp32 [T, N]. Spread: the square root of the sum, over
    the terms of an element, of their squares."""

    name: str
    tokens: int
    run: Callable[[], Tensor]
    reference: Callable[[], tuple[Tensor, Tensor]]

    @staticmethod
    def limit(want: Tensor, spread: Tensor, dtype: torch.dtype) -> Tensor:
        """What rounding may do to an element. u is the unit roundoff of dtype. Each term is rounded once (a weight of
        the matrix, or of the softmax), by at most u of itself. Such errors are independent, each of deviation
        u / sqrt(3) of its term at most, their sum of u / sqrt(3) * spread; DEVIATIONS of these are allowed. The result
        is rounded at most twice, which is 2 u of it; twice that is allowed. Errors of fp32 sums are far smaller."""
        u = torch.finfo(dtype).eps / 2
        return DEVIATIONS * u / 3**0.5 * spread + 4 * u * want.abs() + 1e-6


def attention_reference(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of the last T of S positions in fp32: see Case. q [T, Q, D]; keys, values [KV, S, D]."""
    count, heads, size = q.shape
    positions, group = keys.shape[1], heads // keys.shape[0]
    later = torch.arange(positions, device=q.device) > torch.arange(positions - count, positions,
                                                                  device=q.device)[:, None]
    want, spread = torch.empty(2, count, heads, size, device=q.device)
    for first in range(0, heads, HEADS_AT_ONCE):
        for head in range(first, min(first + HEADS_AT_ONCE, heads)):
            k, v = keys[head // group].float(), values[head // group].float()
            weight = (q[:, head].float() @ k.T / size**0.5).masked_fill_(later, float("-inf")).softmax(1)
            want[:, head] = weight @ v
            spread[:, head] = (weight.square_() @ v.square()).sqrt_()
    return want.flatten(1), spread.flatten(1)


def linear_reference(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] times fp32 [N, K]: see Case."""
    wide = x.float()
    return wide @ weight.T, (wide.square() @ weight.square().T).sqrt_()


def random_matrix(spec: MatrixSpec, device: torch.device) -> Packed:
    """Random codes, with scales like those of trained weights, drawn on the device."""
    random = torch.Generator(device).manual_seed(spec.rows)
    tensors = {}
    for tensor in spec.tensors:
        if tensor.name == "qweight" and spec.format == "int8":
            made = torch.randint(-127, 128, tensor.shape, dtype=torch.int8, device=device, generator=random)
        elif tensor.name == "qweight":
            made = torch.randint(0, 256, tensor.shape, dtype=torch.uint8, device=device, generator=random)
        else:
            scale = torch.randn if tensor.name == "weight" else torch.rand
            made = (0.01 * scale(tensor.shape, device=device, generator=random)).to(
                torch.float16 if spec.format == "fp16" else torch.bfloat16)
        tensors[tensor.name] = made
    return Packed.of(spec, tensors)


class Cases:
    """All that is checked, and what torch's attention takes beside it."""

    def __init__(self, shape: Shape, device: torch.device, half: torch.dtype, block: int):
        self._shape, self._device, self._half, self._block = shape, device, half, block
        self._random = torch.Generator(device).manual_seed(0)
        self.half = half

    def all(self) -> Iterator[Case]:
        """Attention first: what is most doubtful is known soonest."""
        for tokens in self._shape.tokens:
            yield from self._attention(tokens, 0)
        yield from self._attention(self._shape.tokens[-2], PAST)
        for name in self._shape.formats:
            for what, spec in self._specs(name).items():
                m = random_matrix(spec, self._device)
                weight = unpack(m.to(torch.device("cpu"))).to(self._device)  # decoding is tested on the CPU alone
                for tokens in self._shape.tokens:
                    yield self._linear(f"linear_many {name}, {what}", m, weight, tokens)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device, generator=self._random).to(self._half)

    def _specs(self, name: str) -> dict[str, MatrixSpec]:
        s, grouped = self._shape, name == "int4"
        plain = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self._half]
        kind, how = plain if name == "plain" else name, (64, self._block) if grouped else (0, 0)
        return {"gate+up": MatrixSpec(kind, 2 * s.inner, s.hidden, 2, *how),
                "down": MatrixSpec(kind, s.hidden, s.inner, 1, *how)}

    def _linear(self, name: str, m: Packed, weight: Tensor, tokens: int) -> Case:
        from qmix.kernels.cuda_prompt import linear_many

        x = self._normal(tokens, m.spec.cols)
        return Case(name, tokens, partial(linear_many, x, m), partial(linear_reference, x, weight))

    def _attention(self, tokens: int, past: int) -> Iterator[Case]:
        """attend_many, and what else there is: qmix's way to torch's kernels, and these as they are."""
        from qmix.kernels import attend, cuda_prompt

        s = self._shape
        q = self._normal(tokens, s.heads, s.size)
        keys, values = (self._normal(s.kv_heads, past + tokens, s.size) for _ in range(2))
        ways: dict[str, Callable[..., Tensor]] = {"attend_many": cuda_prompt.attend_many}
        if found := getattr(attend, "attend_torch", None):
            ways["attend_torch"] = found
        ways["torch's attention"] = torch_attention
        for name, way in ways.items():
            yield Case(f"{name}, after {past}" if past else name, tokens, partial(way, q, keys, values),
                       partial(attention_reference, q, keys, values))


def torch_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """scaled_dot_product_attention with a causal mask at the lower right."""
    from torch.nn.attention.bias import causal_lower_right

    count, heads, _ = q.shape
    group = heads // len(keys)
    shared = [t[:, None].expand(-1, group, -1, -1).flatten(0, 1)[None] for t in (keys, values)]
    mask = None if count == keys.shape[1] else causal_lower_right(count, keys.shape[1])
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], *shared, attn_mask=mask, is_causal=mask is None)
    return out[0].transpose(0, 1).flatten(1)


@dataclass(slots=True)
class Result:
    """state: "right", "wrong" (an element is off by more than rounding), "race" (results differ), "died". error: the
    largest, as a share of the limit; ms: the median; first_ms: with compilation."""

    case: str
    tokens: int
    state: str = "right"
    error: float | None = None
    ms: float | None = None
    first_ms: float | None = None
    note: str = ""
    traceback: str = ""


def check(case: Case, repeat: int, half: torch.dtype) -> Result:
    """Run a case."""
    result = Result(case.name, case.tokens)
    start = time.perf_counter()
    first = case.run()
    wait(first)
    result.first_ms = round(1000 * (time.perf_counter() - start), 2)
    want, spread = case.reference()
    off = (first.float() - want).abs() / case.limit(want, spread, half)
    off = off.nan_to_num(nan=float("inf"))
    result.error = round(float(off.max()), 3)
    if not result.error <= 1:
        result.state, result.note = "wrong", f"{where(off > 1)} off by more than rounding, {off.max():.3g} times"
    del want, spread, off
    times, differing = [], []
    for i in range(1, repeat):
        start = time.perf_counter()
        again = case.run()
        wait(again)
        times.append(time.perf_counter() - start)
        if not torch.equal(bits(first), bits(again)):
            differing.append(i)
            if len(differing) == 1:
                result.note += f"; repeat {i} differs: {where(bits(first) != bits(again))}"
    result.ms = round(1000 * statistics.median(times), 4) if times else None
    if differing:
        result.state = "race"
        result.note = f"{len(differing)} of {repeat - 1} repeats differ from the first" + result.note
    return result


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def wait(t: Tensor) -> None:
    if t.is_cuda:
        torch.cuda.synchronize(t.device)


def where(wrong: Tensor) -> str:
    """"12 of 4096 elements, rows 3 to 19 (5 of them), columns 0 to 127 (12)" of a [T, N] mask."""
    parts = []
    for name, axis in (("rows", 1), ("columns", 0)):
        at = wrong.any(axis).nonzero().flatten()
        parts.append(f"{name} {int(at[0])} to {int(at[-1])} ({len(at)})")
    return f"{int(wrong.sum())} of {wrong.numel()} elements, {', '.join(parts)}"


def open_card(stand_in: bool) -> tuple[torch.device, torch.dtype, str]:
    """(device, dtype of prompts, name). The interpreter gets bf16 products wrong."""
    torch.set_float32_matmul_precision("highest")
    if stand_in:
        return torch.device("cpu"), torch.float16, "the CPU in a GPU's place"
    from qmix.device.cuda import open_cuda

    card = open_cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    return card.torch_device, card.half, card.name


def assembler() -> str:
    """Which ptxas this process has Triton use, and its version."""
    try:
        from triton import knobs

        tool = knobs.nvidia.ptxas
        return f"{tool.path} {tool.version}"
    except Exception as e:  # older and newer Tritons keep it elsewhere
        return f"unknown ({short(e)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stand-in", action="store_true", help="small shapes, Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=60.0, help="no case begins after this")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the results here, anew after every case")
    parser.add_argument("--cases", type=int, help="the first so many, to rehearse")
    parser.add_argument("--after", type=int, default=0, help="go on with --json's results behind so many cases")
    args = parser.parse_args()
    ends = time.monotonic() + args.seconds
    faulthandler.enable(all_threads=True)
    faulthandler.dump_traceback_later(args.seconds)  # a case that hangs shows where
    if args.stand_in:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton is not imported yet
    from qmix.errors import QmixError

    try:
        device, half, name = open_card(args.stand_in)
    except QmixError as e:
        print(f"{e.message}\n{e.cure or ''}", file=sys.stderr)
        sys.exit(2)
    results = [Result(**row) for row in json.loads(args.json.read_text())["rows"]] if args.after else []
    about = {"card": name, "dtype": str(half), "torch": torch.__version__, "repeat": args.repeat,
             "assembler": assembler(), "mma_v3": os.environ.get("DISABLE_MMA_V3", "0") != "1"}
    late = False
    cases = islice(Cases(SMALL if args.stand_in else MIXTRAL, device, half, 64).all(), args.after, args.cases)
    while (case := next(cases, None)) is not None:
        if late := time.monotonic() > ends:
            break
        results.append(tried(case, args.repeat, half))
        shown = results[-1]
        print(f"{shown.case}, {shown.tokens}: {shown.state} {shown.note}", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps({**about, "late": late, "rows": list(map(asdict, results))}) + "\n")
        if shown.state == "died" and broken(device):
            go_on(args, len(results), ends)
            break
    if args.json:
        args.json.write_text(json.dumps({**about, "late": late, "rows": list(map(asdict, results))}) + "\n")
    print(table([{**asdict(r), "traceback": ""} for r in results], "md"))
    if late:
        print(f"time ran out before {case.name}, {case.tokens} tokens" if case else "time ran out")
    sys.stdout.flush()
    os._exit(1 if any(r.state != "right" for r in results) else 0)  # a broken context may hang while it is torn down


def broken(device: torch.device) -> bool:
    """Whether the card refuses all further work of this process, as it does after an illegal access."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return True
    return False


def go_on(args: argparse.Namespace, done: int, ends: float) -> None:
    """The other cases, in a new process in place of this one; returns where there is nothing to go on with."""
    left = ends - time.monotonic()
    if args.json and left > 0:
        again = ["--json", str(args.json), "--after", str(done), "--seconds", f"{left:.0f}", "--repeat",
                 str(args.repeat), *(["--stand-in"] if args.stand_in else []),
                 *(["--cases", str(args.cases)] if args.cases else [])]
        os.execv(sys.executable, [sys.executable, __file__, *again])


def tried(case: Case, repeat: int, half: torch.dtype) -> Result:
    """`check`, of which an exception is a result too."""
    import traceback

    try:
        return check(case, repeat, half)
    except Exception as e:
        return Result(case.name, case.tokens, "died", note=short(e), traceback=traceback.format_exc())


if __name__ == "__main__":
    main()

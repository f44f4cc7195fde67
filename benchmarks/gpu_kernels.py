"""How near each operation of decoding comes to the memory's bandwidth: all of DeviceOps, at Mixtral 8x7B's shapes, and
what other models need besides at Qwen3-30B-A3B's and GLM-4.5-Air's.

One token. Every operation walks over so many copies of its operands that the card's cache cannot hold them (where that
is possible: what moves little is bound by its launch, and only shown). Calls are captured in a row, so the host's part
does not count. Before an operation is timed, its result is compared with the reference on the CPU.

H hidden, F expert inner, E experts, K chosen per token, Q query heads, KV key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from cuda_kernels import random_slab
from gpu_device import Watched, open_device, per_call
from gpu_sections import emit, emit_failure
from synthetic import layout_of
from synthetic_recipe import Recipe
from torch import Tensor

from qmix.formats.packed import Packed, view
from qmix.hardware import physical_cores
from qmix.kernels.attend import default_inv_freq
from qmix.kernels.device_ops import DeviceOps, ExpertSlots, TorchDeviceOps
from qmix.kernels.device_table import choose_device_kernels
from qmix.kernels.router import RouterTensors
from qmix.kernels.table import select
from qmix.sizes import MatrixSpec, RecordLayout
from qmix.spec import Activation, Router

AGREES = 2**-7  # relative: keys, values and operands of the reference are rounded to 16 bits
HEAVY = 10e6  # bytes of a call from which it is the bandwidth that counts
CALLS = 64  # in a row
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """cache: bytes that the copies of an operand take together, several times the card's cache; most: of them. turned:
    dimensions of a head that rotate."""

    name: str
    router: Router
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    size: int
    turned: int
    vocabulary: int
    positions: tuple[int, ...]
    slots: int
    cache: int
    most: int


COPIES = 512 * 2**20, 64
SIGMOID = {"score": "sigmoid", "normalize": True, "eps": 1e-20, "scale": 2.5, "choice_bias": True, "groups": 4,
           "top_groups": 2, "group_score": "top2"}  # GLM-4.5-Air's, but for its groups, of which it has one
QWEN = {"over": "all", "normalize": True}
MIXTRAL = Shape("", Router(8, 2), 4096, 14336, 32, 8, 128, 128, 32000, (128, 4096, 8192), 16, *COPIES)
OTHERS = (Shape(", Qwen3-30B", Router(128, 8, **QWEN), 2048, 768, 32, 4, 128, 128, 0, (4096,), 256, *COPIES),
          Shape(", GLM-4.5-Air", Router(128, 8, **SIGMOID), 4096, 1408, 96, 8, 128, 64, 0, (4096,), 128, *COPIES))
SMALL = Shape("", Router(8, 2), 256, 256, 4, 1, 64, 64, 512, (16, 128), 4, 2**20, 2)
SMALL_OTHERS = (Shape(", others", Router(16, 2, **SIGMOID), 256, 96, 12, 1, 64, 32, 0, (16,), 4, 2**20, 2),)


Call = Callable[..., None]  # (ops, *tensors)


@dataclass(frozen=True, slots=True)
class Operation:
    """run(i): on the i-th copy of its operands, into `out`; agree: what the same gives on the CPU; nbytes: that a call
    must move."""

    name: str
    nbytes: int
    run: Callable[[int], None]
    out: Tensor
    agree: Callable[[], Tensor]


class Operations:
    """Operations of `ops` on a device, and the same through the CPU's kernels. block: rows of a block of int4, as in
    the store that is decoded."""

    def __init__(self, device: Watched, ops: DeviceOps, reference: TorchDeviceOps, shape: Shape, block: int):
        self._device, self._ops, self._reference, self._shape, self._block = device, ops, reference, shape, block
        self._random = torch.Generator().manual_seed(0)

    def all(self) -> Iterator[tuple[str, Callable[[], Operation]]]:
        """What each is about, and what makes it."""
        s = self._shape
        assert s.vocabulary
        for name, rows in (("q, o", s.heads * s.size), ("k, v", s.kv_heads * s.size), ("head", s.vocabulary)):
            yield f"int8 product, {name}", partial(self._linear, f"int8 product, {name}",
                                                   MatrixSpec("int8", rows, s.hidden))
        yield from self.of_every_model()

    def of_every_model(self) -> Iterator[tuple[str, Callable[[], Operation]]]:
        name = self._shape.name
        yield f"experts{name}", self._experts
        for positions in self._shape.positions:
            yield f"attention, {positions}{name}", partial(self._attention, positions)
        yield f"norm{name}", self._norm
        yield f"router{name}", self._route

    def of_some_models(self) -> Iterator[tuple[str, Callable[[], Operation]]]:
        """What only some models need."""
        yield from self.of_every_model()
        s = self._shape
        x, y, weight = self._normal(1, s.heads * s.size), self._normal(1, s.heads * s.size), self._normal(s.size)
        embedding, inv_freq = self._normal(8, s.hidden).bfloat16(), default_inv_freq(s.turned, 1e6)
        token = torch.tensor([5])
        calls: dict[str, tuple[Call, tuple[Tensor, ...]]] = {
            "norm of heads": (lambda ops, x, w: ops.head_norm(x, s.size, w, EPS, 2.0), (x, weight)),
            "norm of all heads": (lambda ops, x, w: ops.head_norm(x, len(w), w, EPS), (x, y[0])),
            "norm without a weight": (lambda ops, x, y: ops.norm(y, None, EPS, x), (x, y)),
            "silu(gate) * up": (lambda ops, x, y: ops.activate(Activation(), x, y, x), (x, y)),
            "gate": (lambda ops, x, y: ops.gate(x, y), (x, y)),
            "gate of a token": (lambda ops, x, y: ops.gate(x, y, "silu"), (x, y[:, :1])),
            "sum": (lambda ops, x, y: ops.add(x, y), (x, y)),
            "scale": (lambda ops, x, w: ops.scale(x, w, 0.5), (x, y[0])),
            "cosines": (lambda ops, x, t, f: ops.rope_cos_sin(t, f, x, 1.25), (x[:, :s.turned], token * 900, inv_freq)),
            "embedding": (lambda ops, x, t, e: ops.embed(t, e, x, 8.5), (x[:, :s.hidden], token, embedding)),
        }
        for name, (call, given) in calls.items():
            yield f"{name}{s.name}", partial(self._in_place, f"{name}{s.name}", call, given)

    def _in_place(self, name: str, call: Call, given: tuple[Tensor, ...]) -> Operation:
        """Writes the first of `given`; timed where it is written again and again."""
        out, *rest = (self._here(t) for t in given)

        def agree() -> Tensor:
            want = given[0].clone()
            call(self._reference, want, *given[1:])
            return want

        return Operation(name, sum(t.nbytes for t in given), lambda i: call(self._ops, out, *rest), out, agree)

    def _copies(self, nbytes: int) -> int:
        return max(2, min(self._shape.most, -(-self._shape.cache // nbytes)))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random)

    def _here(self, tensor: Tensor) -> Tensor:
        """A copy on the device, also where that is the CPU."""
        return tensor.to(self._device.torch_device, copy=True)

    def _linear(self, name: str, spec: MatrixSpec) -> Operation:
        tensors = {t.name: torch.randint(-127, 128, t.shape, dtype=torch.int8, generator=self._random)
                   if t.name == "qweight" else torch.full(t.shape, 0.01, dtype=torch.bfloat16) for t in spec.tensors}
        m, x = Packed.of(spec, tensors), self._normal(1, spec.cols)
        copies = [Packed.of(spec, {n: self._here(t) for n, t in tensors.items()})
                  for _ in range(self._copies(spec.nbytes))]
        here, want = self._here(x), torch.empty(1, spec.rows)
        y = torch.empty_like(want, device=self._device.torch_device)

        def agree() -> Tensor:
            self._reference.linear(x, m, want)
            return want

        return Operation(name, spec.nbytes, lambda i: self._ops.linear(here, copies[i % len(copies)], y), y, agree)

    def _experts(self) -> Operation:
        s, device = self._shape, self._device.torch_device
        record = RecordLayout(MatrixSpec("int4", 2 * s.inner, s.hidden, 2, 64, self._block),
                              MatrixSpec("int4", s.hidden, s.inner, 1, 64, self._block))
        slots = _slots(random_slab(record, s.slots, device), record)
        count, k = s.router.experts, s.router.top_k
        tables = torch.full((s.slots // k, count), -1, dtype=torch.int32)
        for i, table in enumerate(tables):
            table[:k] = torch.arange(k * i, k * i + k)
        there, x, ids = self._here(tables), self._normal(1, s.hidden), torch.arange(k, dtype=torch.int32)[None]
        here, here_ids, rows = self._here(x), self._here(ids), torch.zeros(1, k, s.hidden, device=device)

        def agree() -> Tensor:
            want = torch.zeros(1, k, s.hidden)
            self._reference.experts(x, _slots(slots.slab[:k].cpu(), record), ids, tables[0], want)
            return want

        return Operation(f"int4 experts, {k} of {count}{s.name}", k * record.nbytes, lambda i: self._ops.experts(
            here, slots, here_ids, there[i % len(there)], rows), rows, agree)

    def _attention(self, positions: int) -> Operation:
        s, device = self._shape, self._device.torch_device
        nbytes, capacity = 2 * s.kv_heads * positions * s.size * 2, max(positions, 256)
        kept = [self._normal(2, s.kv_heads, capacity, s.size).to(self._device.half)
                for _ in range(2)]
        copies = [self._here(kept[i % 2]) for i in range(self._copies(nbytes))]
        qkv, at = self._normal(1, (s.heads + 2 * s.kv_heads) * s.size), torch.tensor([positions - 1])
        cos_sin = torch.empty(1, s.turned)
        self._reference.rope_cos_sin(at, default_inv_freq(s.turned, 1e6), cos_sin)
        here, here_at, there = self._here(qkv), self._here(at), self._here(cos_sin)
        out = torch.empty(1, s.heads * s.size, device=device)

        def run(i: int) -> None:
            keys, values = copies[i % len(copies)]
            self._ops.rope_attend(here, there, keys, values, here_at, None, out)

        def agree() -> Tensor:
            want = torch.empty(1, s.heads * s.size)
            self._reference.rope_attend(qkv, cos_sin, *kept[0].float(), at, None, want)
            return want

        return Operation(f"attention, {positions} positions{s.name}", nbytes, run, out, agree)

    def _norm(self) -> Operation:
        s, device, k = self._shape, self._device.torch_device, self._shape.router.top_k
        residual, weight, rows = self._normal(1, s.hidden), self._normal(s.hidden), self._normal(1, k, s.hidden)
        topk_weights = torch.full((1, k), 0.5)
        here = [self._here(t) for t in (residual, weight, rows, topk_weights)]
        start, out = self._here(residual), torch.empty(1, s.hidden, device=device)

        def run(i: int) -> None:
            self._ops.norm(start, here[1], EPS, out, here[2], here[3])

        def agree() -> Tensor:
            want, first = torch.empty(1, s.hidden), residual.clone()
            self._reference.norm(first, weight, EPS, want, rows, topk_weights)
            return want

        return Operation(f"norm, with the experts' rows{s.name}", (k + 4) * 4 * s.hidden, run, out, agree)

    def _route(self) -> Operation:
        s, device, spec = self._shape, self._device.torch_device, self._shape.router
        residual, weight, k = self._normal(1, s.hidden), self._normal(s.hidden), spec.top_k
        matrix = (self._normal(spec.experts, s.hidden) * s.hidden**-0.5).half()
        bias = torch.rand(spec.experts, generator=self._random) / 4 if spec.choice_bias else None
        router = RouterTensors(spec, matrix, None, bias)
        own = RouterTensors(spec, self._here(matrix), None, None if bias is None else self._here(bias))
        here, there = self._here(residual), self._here(weight)
        normed, ids = torch.empty(1, s.hidden, device=device), torch.empty(1, k, dtype=torch.int32, device=device)
        topk_weights = torch.empty(1, k, device=device)

        def run(i: int) -> None:
            self._ops.route(here, there, own, EPS, normed, ids, topk_weights)

        def agree() -> Tensor:
            want = torch.empty(1, k)
            self._reference.route(residual, weight, router, EPS, torch.empty(1, s.hidden),
                                  torch.empty(1, k, dtype=torch.int32), want)
            return want

        return Operation(f"router{s.name}", matrix.nbytes + 12 * s.hidden, run, topk_weights, agree)


def _slots(slab: Tensor, record: RecordLayout) -> ExpertSlots:
    specs = {"w13": record.w13, "w2": record.w2}
    views = [tuple(Packed.of(specs[matrix], {p.tensor.name: view(slot, p.offset, p.tensor) for p in record.placed
                                             if p.matrix == matrix}) for matrix in specs) for slot in slab]
    return ExpertSlots(slab, record, views)  # type: ignore[arg-type]


def measure(operation: Operation, device: Watched) -> dict[str, Any]:
    """A row: checked, then timed. error: relative, of the first call."""
    device.compute.run(lambda: operation.run(0))
    device.wait(device.compute.record())
    got, want = copy.deepcopy(operation.out).cpu().double(), operation.agree().double()
    error = float((got - want).norm() / want.norm())
    row: dict[str, Any] = {"what": "kernel", "kernel": operation.name, "bytes": operation.nbytes, "error": error,
                           "heavy": operation.nbytes >= HEAVY}
    if not error <= AGREES:
        emit(wrong=f"{operation.name}: differs from the reference by {error:.2g}, more than {AGREES:.2g}")
        return row
    calls, captured = CALLS if device.torch_device.type == "cuda" else 2, True
    try:
        seconds = per_call(device, operation.run, calls)
    except RuntimeError as e:  # what a graph cannot hold is timed launch by launch, and said to be
        captured, row["note"] = False, str(e).splitlines()[0]
        seconds = per_call(device, operation.run, calls, captured=False)
    return {**row, "us": 1e6 * seconds, "gbps": operation.nbytes / 1e9 / seconds, "captured": captured}


def run(task: dict[str, Any]) -> None:
    """task: stand_in. An operation that dies is kept with its traceback, and the others run."""
    torch.set_num_threads(physical_cores())  # for the reference; a section before may have wanted fewer
    device = open_device(task["stand_in"])
    block = layout_of(Recipe(1))[1].block
    host = select({"int4", "int8", "bf16"}, {block}, say=lambda line: None)
    kernels = choose_device_kernels(device.torch_device, device.half, {"int4", "int8", "bf16"}, {block}, host,
                                    device.triton)
    emit(kernels=kernels.ops.name, block=block)
    first, others = (SMALL, SMALL_OTHERS) if task["stand_in"] else (MIXTRAL, OTHERS)
    of = partial(Operations, device, kernels.ops, TorchDeviceOps(host), block=block)
    for name, made in chain(of(shape=first).all(), *(of(shape=shape).of_some_models() for shape in others)):
        try:
            emit(row=measure(made(), device))
        except Exception as e:
            emit_failure(name, e)
    device.close()

"""The calls that a model makes of each kernel, with weights of random codes, for tuning.py.

There are as many weights as a few times the card's cache holds, and calls take turns among them, as layers do.
H hidden, F expert inner, E experts, K chosen per token, S slots.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from qmix.config import DTYPES, QuantConfig
from qmix.formats.packed import TORCH_DTYPES, Packed, view
from qmix.kernels.attend import attend_torch
from qmix.kernels.configs import Attention, Configs, capability
from qmix.kernels.cuda_ops import TritonOps
from qmix.kernels.cuda_prompt import attend_many, linear_many, prompt_attention, without_tensor_cores
from qmix.kernels.device_ops import FEW, ExpertSlots
from qmix.kernels.tuning import Case, Timer, Work
from qmix.models import read_model
from qmix.sizes import MIB, MatrixSpec, RecordLayout, record_layouts
from qmix.spec import Attention as AttentionSpec
from qmix.spec import Model

CACHES = 3  # times the card's cache
TIMED = 15  # calls, of which the median is taken
LAUNCHES = 3.0  # times as long as a launch takes the host, the card is kept busy before it


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of one model, each once. layouts: of its expert records; dense: its matrices in formats that the dense gemv has;
    attentions: (heads, key-value heads, head size). prompts: (tokens, positions before them) of a prompt's pieces."""

    model: str
    layouts: tuple[RecordLayout, ...]
    dense: tuple[MatrixSpec, ...]
    experts: int
    chosen: int
    attentions: tuple[tuple[int, int, int], ...]
    prompts: tuple[tuple[int, int], ...] = ((512, 0), (512, 3584), (4096, 0))

    @classmethod
    def of(cls, model: str, config: Model, quant: QuantConfig) -> Shapes:
        """Grouped dense matrices leave the dense gemv nothing to do."""
        kind = {"int8": "int8", "keep": DTYPES[config.dtype]}.get(quant.dense, "")
        mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionSpec)]
        return cls(model, tuple(x for x in record_layouts(config, quant) if x.w13.bits and x.w2.bits),
                   tuple(MatrixSpec(kind, *shape) for shape in _dense_shapes(config)) if kind else (),
                   config.num_experts, config.top_k,
                   tuple(dict.fromkeys((a.heads, a.kv_heads, a.head_dim) for a in mixers)))


def _dense_shapes(config: Model) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of the dense matrices as a device has them, q, k and v as one."""
    shapes = {t.name: t.shape for t in config.tensors() if t.role in ("linear", "mlp", "head")}
    if config.tied:
        shapes["embedding"] = config.vocab, config.hidden
    found: dict[tuple[int, int], None] = {}
    for name, (rows, cols) in shapes.items():
        stem, _, part = name.rpartition(".")
        qkv = [f"{stem}.{other}" for other in "qkv"]
        together = stem.endswith("attention") and part in "qkv" and all(other in shapes for other in qkv)
        found[sum(shapes[other][0] for other in qkv) if together else rows, cols] = None
    return tuple(found)


MIXTRAL_8X7B = MappingProxyType({
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rope_theta": 1e6})


def mixtral() -> Shapes:
    """Mixtral 8x7B, int4 in groups of 64 and int8."""
    return Shapes.of("Mixtral 8x7B", read_model(MIXTRAL_8X7B), QuantConfig())


@dataclass(frozen=True, slots=True)
class Place:
    """Where trials run. half: what prompts compute in; cache: bytes of the card's cache; room: bytes that weights may
    take."""

    place: torch.device
    half: torch.dtype
    cache: int
    room: int

    def copies(self, nbytes: int, least: int = 1) -> int:
        """How many weights of so many bytes: more than the cache holds, where there is room."""
        return max(least, min(-(-CACHES * self.cache // nbytes) + 1, self.room // nbytes))


def cases(kernel: str, shapes: Shapes, at: Place) -> list[Case]:
    """None where the model has no use for the kernel, or the card, on which torch does its work. Their weights live as
    long as they do."""
    card = capability(at.place)
    if (kernel == "matmul" and without_tensor_cores(card)) or (
            kernel == "attention" and prompt_attention(card, Attention()) is attend_torch):
        return []
    if kernel == "gemv":
        return [case for layout in shapes.layouts for case in _experts(layout, shapes, at)]
    if kernel == "matmul":
        return [case for layout in shapes.layouts for case in _prompts(layout, shapes, at)]
    if kernel == "dense":
        return [case for spec in dict.fromkeys(shapes.dense) for case in _dense(spec, at)]
    return [_attention(tokens, past, shape, at) for shape in shapes.attentions for tokens, past in shapes.prompts]


def _experts(layout: RecordLayout, shapes: Shapes, at: Place) -> list[Case]:
    """The experts of one token and of FEW, through tables that point to other slots at each call."""
    pool = _slab(layout, at.copies(layout.nbytes, shapes.experts), at)
    tables = [((torch.arange(shapes.experts, dtype=torch.int32) + turn * shapes.chosen) % len(pool)).to(at.place)
              for turn in range(len(pool))]

    def case(tokens: int) -> Case:
        x = _numbers((tokens, layout.w13.cols), at, torch.float32) / layout.w13.cols**0.5
        spread = torch.arange(tokens * shapes.chosen, dtype=torch.int32) % shapes.experts
        ids = spread.view(tokens, shapes.chosen).to(at.place)
        rows = torch.zeros(tokens, shapes.chosen, layout.w2.rows, device=at.place)

        def start(configs: Configs) -> Work:
            ops, slots = TritonOps(configs), ExpertSlots(pool, layout, ())

            def work(i: int) -> Tensor:
                ops.experts(x, slots, ids, tables[i % len(tables)], rows)
                return rows

            return work

        return Case(f"experts of {tokens}", start)

    return [case(1), case(FEW)]


def _prompts(layout: RecordLayout, shapes: Shapes, at: Place) -> list[Case]:
    """An expert's share of a prompt, times one of its matrices."""
    pool = _slab(layout, at.copies(layout.nbytes), at)

    def case(tokens: int, name: str, spec: MatrixSpec) -> Case:
        x, matrices = _numbers((tokens, spec.cols), at, at.half), [_packed(record, layout, name) for record in pool]

        def start(configs: Configs) -> Work:
            return lambda i: linear_many(x, matrices[i % len(matrices)], config=configs.matmul)

        return Case(f"{name}, {tokens} tokens", start)

    shares = dict.fromkeys(max(FEW + 1, count * shapes.chosen // shapes.experts) for count, _ in shapes.prompts)
    return [case(tokens, name, spec) for tokens in shares for name, spec in _matrices(layout).items()]


def _dense(spec: MatrixSpec, at: Place) -> list[Case]:
    matrices = [_matrix(spec, at) for _ in range(at.copies(spec.nbytes))]

    def case(tokens: int) -> Case:
        x, y = _numbers((tokens, spec.cols), at, torch.float32), torch.zeros(tokens, spec.rows, device=at.place)

        def start(configs: Configs) -> Work:
            ops = TritonOps(configs)

            def work(i: int) -> Tensor:
                ops.linear(x, matrices[i % len(matrices)], y)
                return y

            return work

        return Case(f"{spec.rows} rows of {spec.cols}, {tokens}", start)

    return [case(1), case(FEW)]


def _attention(tokens: int, past: int, shape: tuple[int, int, int], at: Place) -> Case:
    (heads, kv_heads, size), positions = shape, past + tokens
    query = _numbers((tokens, heads, size), at, at.half)
    nbytes = 2 * kv_heads * positions * size * at.half.itemsize
    caches = [_numbers((2, kv_heads, positions, size), at, at.half) for _ in range(at.copies(nbytes))]

    def start(configs: Configs) -> Work:
        def work(i: int) -> Tensor:
            keys, values = caches[i % len(caches)]
            return attend_many(query, keys, values, config=configs.attention)

        return work

    return Case(f"{tokens} tokens after {past}, {heads} heads of {size} on {kv_heads}", start)


def _matrices(layout: RecordLayout) -> dict[str, MatrixSpec]:
    return {"w13": layout.w13, "w2": layout.w2}


def _packed(record: Tensor, layout: RecordLayout, matrix: str) -> Packed:
    return Packed.of(_matrices(layout)[matrix], {p.tensor.name: view(record, p.offset, p.tensor)
                                                 for p in layout.placed if p.matrix == matrix})


def _slab(layout: RecordLayout, slots: int, at: Place) -> Tensor:
    """uint8 [S, bytes]: random codes, and scales and zeros of such a size that products are near 1."""
    pool = torch.randint(0, 256, (slots, layout.nbytes), dtype=torch.uint8, device=at.place)
    for p in layout.placed:
        if p.tensor.name == "qparams":
            size = _matrices(layout)[p.matrix].cols**-0.5
            for record in pool:
                view(record, p.offset, p.tensor).copy_(_numbers(p.tensor.shape, at, torch.bfloat16) * size / 8)
    return pool


def _matrix(spec: MatrixSpec, at: Place) -> Packed:
    if spec.format != "int8":
        plain = TORCH_DTYPES[spec.tensors[0].dtype]
        return Packed.of(spec, {"weight": _numbers((spec.rows, spec.cols), at, plain)})
    codes = torch.randint(-127, 128, (spec.rows, spec.padded_cols), dtype=torch.int8, device=at.place)
    return Packed.of(spec, {"qweight": codes, "scale": torch.full((spec.rows,), 0.01, dtype=torch.bfloat16,
                                                                  device=at.place)})


def _numbers(shape: Sequence[int], at: Place, dtype: torch.dtype) -> Tensor:
    return torch.randn(tuple(shape), device=at.place).to(dtype)


def event_timer(place: torch.device, cache: int, clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Times calls on a card by its events. Before each, copies larger than the cache keep the card busy while the host
    launches, and empty the cache: so neither the launch nor what is left of earlier calls counts. One copy is not
    enough on a fast card beside a slow host: an H200 makes it in 0.12 ms, and launches took 0.14 ms each there."""
    busy = torch.empty(2, max(CACHES * cache, 256 * MIB), dtype=torch.uint8, device=place)

    def on_card(before: int, work: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(before):
            busy[0].copy_(busy[1])
        first.record()
        work()
        last.record()
        return first, last

    def timed(work: Callable[[int], object]) -> float:
        work(0)  # compiles
        torch.cuda.synchronize(place)
        start = clock()
        work(0)
        host = clock() - start
        copy = on_card(1, lambda: busy[0].copy_(busy[1]))
        torch.cuda.synchronize(place)
        before = 1 + int(LAUNCHES * host / max(1e-6, copy[0].elapsed_time(copy[1]) / 1e3))
        events = [on_card(before, partial(work, i)) for i in range(TIMED)]
        torch.cuda.synchronize(place)
        return statistics.median(first.elapsed_time(last) for first, last in events) / 1e3

    return timed

"""What decoding and prompts launch on a GPU, compiled for cards that need not be here: registers, spills, shared
memory, tensor core instructions, and instructions a weight of the GEMVs.

    python benchmarks/launches.py [--card 8.6 ...] [--model mixtral ...] [--tokens 1 2 4 8] [--prompt 12 40 200 512]
                                  [--format int4] [--count] [--ops]

--count disassembles the GEMVs, which takes a second each. --ops: also what other models launch (launch_ops.py).
Decoding is the engine's own loop (DeviceDecode) over the operations and prompts are the products and attention that
device_table.py chooses for the card. Of Mixtral 8x7B four layers do: others launch the same. "smallest" has 1 of
everything, of which Triton makes a constant; it has no prompts that are longer than its context of 64. Exit code 1
where something is wrong: too much shared memory, spilled registers, products without tensor cores, a GEMV that moves
data in its loop or whose order of sums depends on the number of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
from dry_launches import SHARED, Launch, Launches, recording
from launch_ops import launch_ops
from torch import Tensor

from qmix import demo
from qmix.config import Step
from qmix.device import Routed
from qmix.device.device import Event, Work
from qmix.formats.packed import TORCH_DTYPES, Packed, view
from qmix.forward.kv_cache import SessionCache
from qmix.forward.kv_layers import FullLayer, Query
from qmix.forward.run_graph import DeviceDecode
from qmix.forward.weights import PACKED, DenseWeights, assemble
from qmix.kernels.configs import TENSOR_CORES
from qmix.kernels.cuda_ops import TritonOps
from qmix.kernels.device_ops import ExpertSlots
from qmix.kernels.device_scratch import CARRIED_WORDS
from qmix.kernels.device_table import DeviceKernels, choose_device_kernels
from qmix.kernels.prompt_experts import PromptExperts
from qmix.kernels.table import KernelTable
from qmix.kernels.trials import MIXTRAL_8X7B
from qmix.models import read_model
from qmix.offload.device_prompts import DevicePrompts
from qmix.sizes import CARRIED, CARRIED_BLOCK, MatrixSpec, RecordLayout
from qmix.spec import Attention, Model

CPU = torch.device("cpu")
LAYERS, DEPTH, GUESSES, SLOTS = 4, 3, 2, 3
TOKENS, PROMPTS = (1, 2, 4, 8), (12, 40, 200, 511, 512)
# Bytes of registers that a thread may spill; none on cards that are not listed. On 12.0 the assembler gives a product
# of 12 tokens 80 registers where it needs a few more, so that one more program runs at once.
SPILLS = {(12, 0): 16}


PRODUCTS = {"matmul": "x", "attend_many": "keys", "gate_up": "x", "down": "inner"}  # and what they multiply


@dataclass(frozen=True)
class Shape:
    """head: its format; context: positions of the cache."""

    name: str
    config: Model
    head: str
    context: int


def models() -> dict[str, Shape]:
    mixtral = read_model({**MIXTRAL_8X7B, "num_hidden_layers": LAYERS})
    small = read_model(json.loads((demo.CHECKPOINT / "config.json").read_text()))
    smallest = read_model({**MIXTRAL_8X7B, "num_hidden_layers": LAYERS, "vocab_size": 1, "hidden_size": 1,
                           "intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2,
                           "num_local_experts": 1, "num_experts_per_tok": 1, "max_position_embeddings": 64})
    every = (Shape("mixtral", mixtral, "int8", 8192), Shape("demo", small, "bf16", small.max_positions),
             Shape("smallest", smallest, "int8", 64))
    return {model.name: model for model in every}


def empty(spec: MatrixSpec) -> Packed:
    return Packed.of(spec, {t.name: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in spec.tensors})


def dense_weights(shape: Shape, half: torch.dtype) -> DenseWeights:
    """As load_dense gives them for a device: q, k and v as one matrix, int8."""
    tensors = {t.name: t for t in shape.config.tensors()}

    def read(name: str) -> Packed | Tensor:
        t = tensors[name]
        if t.role not in PACKED:
            return torch.empty(t.shape, dtype=torch.bfloat16)
        return empty(MatrixSpec(shape.head if t.role == "head" else "int8", *t.shape))

    return assemble(shape.config, half, read, CPU)


class Immediate:
    """A device, and its stream, that does what it is given when it is given."""

    name, torch_device, triton, trouble = "a card that is not here", CPU, True, ""
    launches = waits = 0

    def __init__(self, half: torch.dtype):
        self.half, self.compute = half, self

    def run(self, work: Work) -> None:
        work()

    def record(self) -> None:
        return None

    def wait(self, event: Event | None) -> None:
        pass

    def capture(self, work: Work) -> Work:
        return work

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)


class InSlots:
    """All experts that are asked for are in slots, though others could be missing."""

    resident = False

    def __init__(self, kernels: DeviceKernels, config: Model, record: RecordLayout):
        slab = torch.empty(SLOTS, record.nbytes, dtype=torch.uint8)
        self._ops, self._slots = kernels.ops, ExpertSlots(slab, record, ())
        self._table = torch.zeros(config.num_experts, dtype=torch.int32)

    def begin(self, layer: int, routed: Routed) -> Work:
        return lambda: self._ops.experts(routed.x, self._slots, routed.ids, self._table, routed.rows)

    def refresh(self, layer: int) -> None:
        pass

    def launched(self, layer: int) -> None:
        pass

    def lacking(self, layer: int, routed: Routed) -> bool:
        return False

    def finish(self, layer: int, routed: Routed, step: Step) -> None:
        pass


def half_of(card: tuple[int, int]) -> torch.dtype:
    """What it computes in."""
    return torch.float16 if card < TENSOR_CORES else torch.bfloat16


def launch(model: Shape, card: tuple[int, int], found: Launches, tokens: Iterable[int] = TOKENS,
           prompts: Iterable[int] = PROMPTS, experts: str = "int4", group: int = 64, block: int = 64,
           dtype: torch.dtype | None = None) -> None:
    """Decode `tokens` at a time, and the products and attention of `prompts`, within `recording`. experts, group,
    block: their format; dtype: what prompts compute in, None for the card's 16 bits."""
    config, dtype = model.config, dtype or half_of(card)
    if experts in CARRIED:
        group, block = CARRIED[experts].group, CARRIED_BLOCK
    record = RecordLayout(MatrixSpec(experts, 2 * config.expert_inner, config.hidden, 2, group, block),
                          MatrixSpec(experts, config.hidden, config.expert_inner, 1, group, block))
    formats = {experts, "int8", model.head}
    kernels = choose_device_kernels(CPU, dtype, formats, (block,), KernelTable({}, {}), True)
    weights = dense_weights(model, dtype)
    decode = DeviceDecode(config, weights, Immediate(dtype), kernels.ops, InSlots(kernels, config, record), DEPTH,
                          min(GUESSES, config.num_experts))
    cache = SessionCache(config, model.context, dtype, device=CPU, attend=kernels.attend)
    for count in tokens:
        found.label = f"{model.name}, decode {count}"
        given = torch.zeros(count, dtype=torch.int64)
        decode(given, given, [cache] * count, Step("decode"))
    slab, attention = torch.empty(SLOTS, record.nbytes, dtype=torch.uint8), config.layers[0].mixer
    slots, table = ExpertSlots(slab, record, ()), torch.zeros(config.num_experts, dtype=torch.int32)
    assert isinstance(attention, Attention)
    (qkv, *_), o = weights.stacks.values(), weights.matrices["layers.0.attention.o"]
    kv_layer = cache.layers[0]
    assert isinstance(kv_layer, FullLayer) and len(weights.stacks) == config.num_layers
    w13, w2 = (Packed.of(spec, {p.tensor.name: view(slab[0], p.offset, p.tensor) for p in record.placed
                                if p.matrix == name}) for name, spec in (("w13", record.w13), ("w2", record.w2)))
    for count in (n for n in prompts if n <= model.context):
        found.label = f"{model.name}, prompt {count}"
        x = torch.empty(count, config.hidden, dtype=dtype)
        kernels.prompts.linear(x, qkv)
        heads = attention.heads, attention.kv_heads, attention.kv_heads
        query = Query(0, *(torch.empty(count, number, attention.head_dim, dtype=dtype) for number in heads))
        kernels.prompts.linear(kv_layer.attend(attention, None, query), o)
        kernels.prompts.expert(x, w13, w2)  # as dense matrices in this format are multiplied
        if kernels.experts.handles(slots, dtype):
            prompt_experts(kernels.experts, x, slots, table, config.top_k)
        kernels.prompts.linear(x[-1:], weights.matrices["embedding" if config.tied else "head"])


def prompt_experts(experts: PromptExperts, x: Tensor, slots: ExpertSlots, table: Tensor, top_k: int) -> None:
    """What a layer launches for the experts of a prompt, x [T, H], where all are in VRAM; table [E]: their slots."""
    prompts = DevicePrompts(experts, [slots], len(table))
    routed = prompts.begin(x, torch.zeros(len(x), top_k, dtype=torch.int64))
    prompts.in_slots(routed, table)
    prompts.combine(routed.rows, torch.empty(len(x), top_k))


def wrong(one: Launch, card: tuple[int, int]) -> Iterator[str]:
    """What must not be."""
    asm = one.compiled.asm
    if one.shared > SHARED[card]:
        yield f"{one.shared} bytes of shared memory, the card has {SHARED[card]}"
    if one.spills > SPILLS.get(card, 0):
        yield f"{one.spills} bytes of registers are spilled"
    if one.kernel in PRODUCTS:
        if card < TENSOR_CORES:
            yield "this is torch's work here, which has tensor cores"
        elif not one.mma + one.wgmma and "32" not in str(one.constants.get("DOT")) + one.kinds.get("keys", ""):
            yield "no tensor cores"
    if one.kernel == "gemv":
        if fills_its_threads(one) and "convert_layout" in asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]:
            yield "the loop moves data between threads"
        if one.module == "cuda_dense_jit" and one.grid[0] > 1 and not re.search(r"ld\.global[^;]*\.v[24]", asm["ptx"]):
            yield "weights are loaded one by one"
        if ".ftz" in asm["ptx"]:
            yield "subnormal numbers are taken as zero"
    if re.search(r"\b(cos|sin)\.approx", asm["ptx"]):
        yield "an approximate cosine"


def fills_its_threads(gemv: Launch) -> bool:
    """Not so for the smallest matrices of the grouped formats: a program has fewer words in hand than threads, for
    which Triton makes other layouts."""
    c = gemv.constants
    if "PARAMS" in c:  # of ggml's formats
        return c["LANES"] * CARRIED_WORDS >= 32 * gemv.warps
    words = c["LANES"] * c["BLOCK"] * (4 if c["BITS"] == 4 else 2) // 32 if "LANES" in c else 32 * gemv.warps
    return words >= 32 * gemv.warps


def wrong_together(launches: Launches) -> Iterator[str]:
    """What must not be between variants of a kernel."""
    orders: dict[tuple[object, ...], set[str]] = {}
    prompts: dict[str, set[frozenset[str]]] = {}  # matrices may differ, but each variant has every prompt of its tile
    for one in launches:
        if one.kernel == "gemv":  # sums of a token in the same order, whatever the number of tokens
            same = *(value for name, value in one.constants.items() if name not in ("M", "ADD")), str(one.kinds)
            orders.setdefault((one.module, *map(str, same)), set()).add(one.accumulators)
        if one.kernel in PRODUCTS:  # compiled by tile, not anew for some prompts
            kind = one.kinds[PRODUCTS[one.kernel]]
            for model in {label.split(",")[0] for label in one.labels}:
                own = frozenset(label for label in one.labels if label.startswith(f"{model},"))
                prompts.setdefault(f"{model}: {one.kernel} {one.constants}, {kind}", set()).add(own)
    yield from (f"{key}: sums in {len(found)} orders" for key, found in orders.items() if len(found) > 1)
    yield from (f"{name}: compiled anew for some prompts" for name, found in prompts.items() if len(found) > 1)


def table(launches: Launches, count: bool) -> Iterator[str]:
    yield f"{'kernel':24} {'regs':>4} {'spills':>6} {'shared':>7} {'warps':>5} {'wgmma':>5} {'mma':>4}" \
          + f" {'a weight':>8}" * count + "  constants; launches"
    for one in launches:
        each = one.per_weight if count else None
        constants = " ".join(f"{name}={value}" for name, value in one.constants.items())
        yield f"{one.module.removeprefix('cuda_') + '.' + one.kernel:24} {one.registers:4} {one.spills:6} " \
              f"{one.shared:7} {one.warps:5} {one.wgmma:5} {one.mma:4}" \
              + (f" {each:8.2f}" if each else " " * 9) * count \
              + f"  {constants}; " + ", ".join(f"{label}: {times}" for label, times in one.labels.items())


def card_of(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def main() -> int:
    known = models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=card_of, nargs="+", default=list(SHARED))
    parser.add_argument("--model", choices=known, nargs="+", default=list(known))
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--prompt", type=int, nargs="*", default=PROMPTS)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--ops", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for card in args.card:
        with recording(card) as found, torch.inference_mode():
            for name in args.model:
                launch(known[name], card, found, args.tokens, args.prompt, args.format)
            for count in args.tokens if args.ops else ():
                launch_ops(TritonOps(), found, count, half_of(card))
        launches = sum(sum(one.labels.values()) for one in found)
        print(f"\n{card[0]}.{card[1]}: {launches} launches of {len(found)} kernels", *table(found, args.count),
              sep="\n", flush=True)
        for line in (*(f"{one.kernel} {one.constants}: {why}" for one in found for why in wrong(one, card)),
                     *wrong_together(found)):
            print("WRONG:", line)
            failed = 1
    return failed


if __name__ == "__main__":
    raise SystemExit(main())

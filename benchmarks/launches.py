"""What decoding and prompts launch on a GPU, compiled for cards that need not be here: registers, spills, shared memory,
tensor core instructions, and instructions a weight of the GEMVs.

    python benchmarks/launches.py [--card 8.6 ...] [--model mixtral demo] [--tokens 1 2 4 8] [--prompt 12 40 200 512]
                                  [--format int4] [--count] [--json]

--count disassembles the GEMVs, which takes a second each. Decoding is the engine's own loop (DeviceDecode) over
TritonOps; prompts are what device_table.py chooses for the card. Of Mixtral 8x7B four layers do: others launch the same.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch  # noqa: E402
from dry_launches import SHARED, Launch, Launches, recording  # noqa: E402
from torch import Tensor  # noqa: E402

from qmix import demo  # noqa: E402
from qmix.config import ModelConfig, Step  # noqa: E402
from qmix.device import Routed  # noqa: E402
from qmix.device.device import Event, Work  # noqa: E402
from qmix.formats.packed import TORCH_DTYPES, Packed, view  # noqa: E402
from qmix.kernels.device_ops import ExpertSlots  # noqa: E402
from qmix.kernels.device_table import DeviceKernels, choose_device_kernels  # noqa: E402
from qmix.kernels.table import KernelTable  # noqa: E402
from qmix.model.device_decode import DeviceDecode  # noqa: E402
from qmix.model.kvcache import KVCache  # noqa: E402
from qmix.model.weights import LayerWeights, Weights  # noqa: E402
from qmix.sizes import MatrixSpec, RecordLayout  # noqa: E402

CPU = torch.device("cpu")
LAYERS, DEPTH, GUESSES, SLOTS, GROUP, BLOCK = 4, 3, 2, 3, 64, 64
TOKENS, PROMPTS = (1, 2, 4, 8), (12, 40, 200, 512)


@dataclass(frozen=True)
class Model:
    """head: its format; context: positions of the cache."""

    config: ModelConfig
    head: str
    context: int


def models() -> dict[str, Model]:
    mixtral = ModelConfig(32000, 4096, 14336, LAYERS, 32, 8, 128, 8, 2, 1e6, 1e-5, 32768)
    small = ModelConfig.from_hf(json.loads((demo.CHECKPOINT / "config.json").read_text()))
    return {"mixtral": Model(mixtral, "int8", 8192), "demo": Model(small, "bf16", small.max_positions)}


def empty(spec: MatrixSpec) -> Packed:
    return Packed.of(spec, {t.name: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in spec.tensors})


def dense_weights(model: Model, half: torch.dtype) -> Weights:
    """As load_dense gives them for a device: q, k and v as one matrix, int8."""
    config = model.config
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    rows = queries + 2 * config.num_kv_heads * config.head_dim

    def layer() -> LayerWeights:
        return LayerWeights(torch.empty(hidden), (empty(MatrixSpec("int8", rows, hidden)),),
                            empty(MatrixSpec("int8", hidden, queries)), torch.empty(hidden),
                            torch.empty(config.num_experts, hidden, dtype=torch.float64))

    embedding = torch.empty(config.vocab_size, hidden, dtype=torch.bfloat16)
    return Weights(half, embedding, tuple(layer() for _ in range(config.num_layers)), torch.empty(hidden),
                   empty(MatrixSpec(model.head, config.vocab_size, hidden)))


class Immediate:
    """A device, and its stream, that does what it is given when it is given."""

    name, place, triton, trouble = "a card that is not here", CPU, True, ""
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

    def __init__(self, kernels: DeviceKernels, config: ModelConfig, record: RecordLayout):
        self._ops, self._slots = kernels.ops, ExpertSlots(torch.empty(SLOTS, record.nbytes, dtype=torch.uint8), record, ())
        self._table = torch.zeros(config.num_experts, dtype=torch.int32)

    def begin(self, layer: int, routed: Routed) -> Work:
        return lambda: self._ops.experts(routed.x, self._slots, routed.ids, self._table, routed.rows)

    def refresh(self, layer: int) -> None:
        pass

    def finish(self, layer: int, routed: Routed, step: Step) -> None:
        pass


def launch(model: Model, card: tuple[int, int], tokens: Iterable[int], prompts: Iterable[int], expert_format: str,
           found: Launches) -> None:
    """Decode `tokens` at a time, and the products and attention of `prompts`, within `recording`."""
    config, half = model.config, torch.float16 if card < (8, 0) else torch.bfloat16
    record = RecordLayout(MatrixSpec(expert_format, 2 * config.intermediate_size, config.hidden_size, 2, GROUP, BLOCK),
                          MatrixSpec(expert_format, config.hidden_size, config.intermediate_size, 1, GROUP, BLOCK))
    kernels = choose_device_kernels(CPU, half, (expert_format, "int8", model.head), (BLOCK,), KernelTable({}, {}), True)
    weights, device = dense_weights(model, half), Immediate(half)
    decode = DeviceDecode(config, weights, device, kernels.ops, InSlots(kernels, config, record), DEPTH, GUESSES)
    cache = KVCache(config, model.context, half, place=CPU, attend=kernels.attend)
    for count in tokens:
        found.label = f"{count} tokens" if count > 1 else "1 token"
        given = torch.zeros(count, dtype=torch.int64)
        decode(given, given, [cache] * count, Step("decode"))
    slot, layer = torch.empty(record.nbytes, dtype=torch.uint8), weights.layers[0]
    w13, w2 = (Packed.of(spec, {p.tensor.name: view(slot, p.offset, p.tensor) for p in record.placed if p.matrix == name})
               for name, spec in (("w13", record.w13), ("w2", record.w2)))
    for count in prompts:
        found.label = f"prompt of {count}"
        x = torch.empty(count, config.hidden_size, dtype=half)
        for m in layer.heads:
            kernels.prompts.linear(x, m)
        attended = cache.attend(0, 0, *(torch.empty(count, heads, config.head_dim, dtype=half) for heads in (
            config.num_heads, config.num_kv_heads, config.num_kv_heads)), None)
        kernels.prompts.linear(attended, layer.o)
        kernels.prompts.expert(x, w13, w2)
        kernels.prompts.linear(x[-1:], weights.head)


def table(launches: list[Launch], count: bool) -> Iterator[str]:
    yield f"{'kernel':24} {'regs':>4} {'spills':>6} {'shared':>7} {'warps':>5} {'wgmma':>5} {'mma':>4}" \
          + f" {'a weight':>8}" * count + "  constants; launches"
    for one in launches:
        each = one.per_weight if count else None
        constants = " ".join(f"{name}={value}" for name, value in one.constants.items())
        yield f"{one.module.removeprefix('cuda_') + '.' + one.kernel:24} {one.registers:4} {one.spills:6} " \
              f"{one.shared:7} {one.warps:5} {one.wgmma:5} {one.mma:4}" \
              + (f" {each:8.2f}" if each else " " * 9) * count \
              + f"  {constants}; " + ", ".join(f"{label}: {times}" for label, times in one.labels.items())


def plain(one: Launch, card: tuple[int, int], model: str, count: bool) -> dict[str, Any]:
    return {"card": card, "model": model, "kernel": one.kernel, "module": one.module, "registers": one.registers,
            "spills": one.spills, "shared": one.shared, "warps": one.warps, "wgmma": one.wgmma, "mma": one.mma,
            "labels": one.labels, "constants": {name: str(value) for name, value in one.constants.items()},
            "a_weight": one.per_weight if count else None}


def card_of(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def main() -> None:
    known = models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=card_of, nargs="+", default=list(SHARED))
    parser.add_argument("--model", choices=known, nargs="+", default=list(known))
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--prompt", type=int, nargs="*", default=PROMPTS)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for card in args.card:
        for name in args.model:
            with recording(card) as found, torch.inference_mode():
                launch(known[name], card, args.tokens, args.prompt, args.format, found)
            if args.json:
                for one in found:
                    print(json.dumps(plain(one, card, name, args.count)), flush=True)
            else:
                print(f"\n{card[0]}.{card[1]}, {name}: {sum(sum(one.labels.values()) for one in found)} launches of "
                      f"{len(found)} kernels", *table(found, args.count), sep="\n", flush=True)


if __name__ == "__main__":
    main()

"""The stream through the quantizer: one expert is read while the one before it is quantized and the one before that is
written.

Three threads and a pool: `reader` loads ahead, the caller's thread quantizes (spreading the work over the pool), and
`writer` writes behind and notes the region in the journal. Each hands over by a future, and none runs more than one
region ahead. Experts are read into a few buffers that are reused. A buffer is free again when its expert is packed or,
if the packed tensors are the very weights (`keep`), when it is written. So memory is bounded by two or three experts
and two records, whatever the model's size. After an error or Ctrl-C, reader and writer finish what they hold; then the
error is raised in the caller.

With a calibration, the text passes through every expert before that expert is quantized. It also passes through experts
that are finished already, since the next layer's inputs depend on them. budget.py says how much memory that takes. A
multi-token-prediction head comes last and gets no inputs.

F expert inner, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from qmix import formats
from qmix.checkpoint import Checkpoint
from qmix.config import CALIBRATED, DTYPES, ExpertKey, QuantConfig
from qmix.errors import CheckpointError, QmixError
from qmix.formats import TORCH_DTYPES, beside, grouped, mxfp4
from qmix.formats import carried as carried_format
from qmix.hardware.memory import anonymous_memory
from qmix.quantize.calibrated import FALLBACK, choose_calibrated
from qmix.quantize.calibration import Calibration
from qmix.quantize.guide import Guide, stages
from qmix.quantize.inputs import Inputs
from qmix.quantize.journal import Finished, Journal
from qmix.quantize.methods import Error, error, quantize_measured
from qmix.sizes import CARRIED, PLAIN_DTYPES, MatrixSpec
from qmix.spec import Model
from qmix.spec.model import layer_of, of_mtp_head
from qmix.store import Calibrated, Region, StoreLayout, StoreWriter

Blocks = mxfp4.Blocks | carried_format.Blocks | beside.Blocks | grouped.Blocks
Weight = Tensor | Blocks  # numbers, or, of a matrix that is carried, its codes and scales
BOTH = frozenset({"w13", "w2"})  # matrices of an expert


@dataclass(frozen=True, slots=True)
class Work:
    """A region still to be made.

    source: an expert, or a dense tensor's name; specs: how each of its matrices is packed, None where it
    stays plain; parts: the checkpoint's names of what each matrix, and its bias, is stacked from; nbytes: of the
    source; room: bytes of an expert's numbers; carried: those of the matrices that have the store's format already and
    stay as they are.
    """

    region: Region
    source: ExpertKey | str
    specs: Mapping[str, MatrixSpec | None]
    parts: Mapping[str, tuple[str, ...]]
    nbytes: int
    room: int = 0
    carried: frozenset[str] = frozenset()

    @property
    def grouped(self) -> bool:
        """Whether there are codes to be chosen by a method."""
        return any(spec is not None and spec.bits for spec in self.specs.values())

    @property
    def label(self) -> str:
        return str(self.source) if isinstance(self.source, ExpertKey) else "attention, embedding, head"


@dataclass(frozen=True, slots=True)
class Made:
    """A region in memory: {(matrix, tensor name): Tensor}, and its errors, see journal.Finished."""

    work: Work
    tensors: Mapping[tuple[str, str], Tensor]
    error: Mapping[str, float]
    calibrated: Calibrated | None = None


def all_work(source: Checkpoint, layout: StoreLayout, quant: QuantConfig) -> list[Work]:
    """Every region of the store, in the order in which it is made."""
    def carried(matrices: Mapping[str, tuple[MatrixSpec | None, tuple[str, ...]]]) -> frozenset[str]:
        """Those of {matrix: (how it is stored, the tensors that it is stacked from)} that the file has in that format.
        A text chooses new codes, also of what the file has in int4."""
        return frozenset(matrix for matrix, (spec, names) in matrices.items()
                         if spec is not None and (spec.format in CARRIED or spec.halves or (
                             spec.format == "int4" and quant.method not in CALIBRATED))
                         and source.carriable(*names) == _kind(spec))

    model = source.model
    item = TORCH_DTYPES[PLAIN_DTYPES[DTYPES[model.dtype]]].itemsize
    found = [Work(layout.dense[t.name], t.name, {"": layout.specs[t.name]}, {"": (source.published(t.name),)},
                  source.nbytes_of(t.name), carried=carried({"": (layout.specs[t.name], (t.name,))}))
             for t in model.tensors()]
    room = model.expert_numbers * item
    for key, region in layout.records.items():
        gate, up, down, *biases = (source.published(tensor.name) for tensor in model.expert_tensors(key))
        parts = {"w13": (gate, up), "w2": (down,)}
        if biases:
            parts |= {"w13.bias": tuple(biases[:2]), "w2.bias": tuple(biases[2:])}
        record = layout.record(key)
        if source.expert_format is not None and {record.w13.format, record.w2.format} == {source.expert_format}:
            stay = BOTH
        else:
            w1, w3, w2 = (tensor.name for tensor in model.expert_tensors(key)[:3])
            stay = carried({"w13": (record.w13, (w1, w3)), "w2": (record.w2, (w2,))})
        found.append(Work(region, key, {"w13": record.w13, "w2": record.w2}, parts, source.expert_nbytes(key), room,
                          stay))
    return found


def _kind(spec: MatrixSpec) -> str:
    """As Checkpoint.carriable names it."""
    return f"{spec.format}g{spec.group_size}" if spec.bits else spec.format


def route(work: Sequence[Work], finished: Collection[str], model: Model) -> list[Work]:
    """What is left of `work`, in the order of a calibration: layer by layer, with those `finished` experts, by name,
    that the text must pass through to reach one that is not."""
    stage = stages(model)
    heads = [item for item in work if of_mtp_head(model, item.source)]
    todo = [item for item in sorted((item for item in work if not of_mtp_head(model, item.source)),
                                    key=lambda item: stage(item.source))
            if isinstance(item.source, ExpertKey) or item.region.name not in finished]
    while todo and todo[-1].region.name in finished:
        todo.pop()
    return [*todo, *(item for item in heads if item.region.name not in finished)]


def run(source: Checkpoint, quant: QuantConfig, work: Sequence[Work], writer: StoreWriter, journal: Journal,
        finished: Collection[str], threads: int, done: Callable[[Work, Finished | None], None],
        calibration: Calibration | None = None) -> None:
    """Make every region of `work`, in order; done(work, finished) hears of each in the caller's thread. With a
    `calibration`, `work` is in the order of `route`; done(work, None) where the text only passes through, since
    that region's name is among the `finished`."""
    slots = 3 if quant.experts == "keep" else 2
    before = frozenset(finished)
    with (ThreadPoolExecutor(threads, "qmix-quantize") as pool, ThreadPoolExecutor(1, "qmix-write") as behind,
          closing(_read_ahead(source, work, slots)) as stream):
        written: Future[tuple[Work, Finished]] | None = None
        guide = None if calibration is None else _guide(source, calibration, work, pool)
        for item, weights in stream:
            todo = item.region.name not in before
            inputs: Mapping[str, Inputs] = {}
            reads = not of_mtp_head(source.model, item.source)
            if guide is not None and reads and (item.grouped or isinstance(item.source, ExpertKey)):
                dtype = getattr(torch, source.model.dtype)
                numbers = {matrix: weight if isinstance(weight, Tensor) else weight.numbers(dtype)
                           for matrix, weight in weights.items()}
                for matrix, weight in numbers.items():  # or the text would carry its inf or NaN everywhere
                    _check_finite(source, item.parts[matrix], weight)
                inputs = guide.inputs(item.source, numbers, item.grouped and todo)
                del numbers
            if not todo:
                done(item, None)
                continue
            made = _quantize(source, item, weights, quant, inputs, pool)
            if written is not None:
                done(*written.result())
            written = behind.submit(_write, made, writer, journal)
            del made
        if written is not None:
            done(*written.result())


def _guide(source: Checkpoint, calibration: Calibration, work: Sequence[Work], pool: Executor) -> Guide:
    layers = {layer for item in work
              if isinstance(item.source, str) and item.grouped and not of_mtp_head(source.model, item.source)
              and (layer := layer_of(item.source)) is not None}
    return Guide(source, calibration, layers, pool)


def _read_ahead(source: Checkpoint, work: Sequence[Work],
                slots: int) -> Generator[tuple[Work, dict[str, Weight]], None, None]:
    """Each item with its weights; while the caller has one, the next is read. An expert's weights lie in one of
    `slots` buffers, which take turns: they are good until the caller has asked for `slots` - 1 more."""
    largest = max((0 if item.carried == BOTH else item.room for item in work), default=0)
    buffers = cycle([_buffer(largest) for _ in range(slots)])
    with ThreadPoolExecutor(1, "qmix-read") as reader:
        last: tuple[Work, Future[dict[str, Weight]]] | None = None
        for item in work:
            buffer = next(buffers) if isinstance(item.source, ExpertKey) else None
            following = item, reader.submit(_load, source, item, buffer)
            if last is not None:
                yield last[0], last[1].result()
            last = following
        if last is not None:
            yield last[0], last[1].result()


def _buffer(nbytes: int) -> Tensor:
    """uint8 [nbytes], on huge pages where the kernel gives them: quantizing walks down long rows. Pages count
    only once they are written."""
    return torch.frombuffer(anonymous_memory(max(1, nbytes)), dtype=torch.uint8)


def _load(source: Checkpoint, work: Work, buffer: Tensor | None) -> dict[str, Weight]:
    """{"w13": [2F, H], "w2": [H, F]} of an expert, in `buffer` (in memory of their own if carried), and its biases,
    {"w13.bias": [2F], "w2.bias": [H]}, where it has any; or {"": tensor} of a dense tensor."""
    if buffer is None:
        assert isinstance(work.source, str)
        return {"": source.blocks(work.source) if work.carried else source.dense(work.source)}
    key = work.source
    assert isinstance(key, ExpertKey)
    w13: Weight
    w2: Weight
    if work.carried and source.expert_format is not None:
        w13, w2 = source.expert_blocks(key)
    else:
        gate, up, down = (tensor.name for tensor in source.model.expert_tensors(key)[:3])
        w13 = source.blocks(gate, up) if "w13" in work.carried else source.stacked_w13(key, buffer)
        w2 = source.blocks(down) if "w2" in work.carried else source.w2(key, buffer)
    biases = source.expert_biases(key)
    return {"w13": w13, "w2": w2} | ({} if biases is None else {"w13.bias": biases[0], "w2.bias": biases[1]})


def _quantize(source: Checkpoint, work: Work, weights: dict[str, Weight], quant: QuantConfig,
              inputs: Mapping[str, Inputs], pool: Executor) -> Made:
    """Pack every matrix of `weights`, which is emptied on the way; biases go along as they are. Grouped formats
    spread one matrix over the pool; the other formats have no such way, so their matrices go side by side."""
    inner = work.grouped
    tensors: dict[tuple[str, str], Tensor] = {}
    for name in [name for name in weights if name.endswith(".bias")]:
        bias = weights.pop(name)
        assert isinstance(bias, Tensor)
        _check_finite(source, work.parts[name], bias)
        tensors[name.removesuffix(".bias"), "bias"] = bias

    def pack_one(matrix: str) -> tuple[Mapping[str, Tensor], Error | None, float | None]:
        spec, weight = work.specs[matrix], weights.pop(matrix)
        if not isinstance(weight, Tensor):
            assert spec is not None
            packed = formats.carry(weight, spec.without_bias)
            # Weights count only in the error of an expert of which another matrix has one.
            whole = work.carried >= work.specs.keys()
            counted = 0.0 if whole else sum(tile.square().sum(dtype=torch.float64).item()
                                            for _, tile in formats.tiles(packed))
            return packed.tensors, Error(0.0, counted), None
        if spec is None or spec.format in PLAIN_DTYPES:  # packing looks at every weight, copying does not
            _check_finite(source, work.parts[matrix], weight)
        try:
            return _pack(weight, spec, quant.method, inputs.get(matrix), pool if inner else None)
        except QmixError:
            _check_finite(source, work.parts[matrix], weight)  # says it better: by tensor
            raise

    errors: dict[str, Error] = {}
    output_errors: dict[str, float] = {}
    packed = (map if inner else pool.map)(pack_one, work.specs)
    for matrix, (found, distance, output_error) in zip(work.specs, packed, strict=True):
        tensors.update(((matrix, name), tensor) for name, tensor in found.items())
        if distance is not None:
            errors[matrix] = distance
        if output_error is not None:
            output_errors[matrix or "all"] = float(f"{output_error:.6g}")
    if not work.grouped or quant.method not in CALIBRATED:
        return Made(work, tensors, _rms(errors))
    method = quant.method if len(output_errors) == len(work.specs) else FALLBACK
    tokens = max((found.count for found in inputs.values()), default=0)
    return Made(work, tensors, _rms(errors), Calibrated(method, tokens, output_errors))


def _pack(weight: Tensor, spec: MatrixSpec | None, method: str, inputs: Inputs | None,
          pool: Executor | None) -> tuple[Mapping[str, Tensor], Error | None, float | None]:
    """(the tensors of a matrix in its format; how far they are from `weight`, None where it stays plain; how far its
    outputs are from the original's on `inputs`, None where the method does not look at these)."""
    if spec is None:
        return {"weight": weight}, None, None
    spec = spec.without_bias
    if spec.bits and method in CALIBRATED:
        return choose_calibrated(weight, spec, inputs, pool)
    if spec.bits:
        packed, distance = quantize_measured(weight, spec, method, pool)
        return packed.tensors, distance, None
    packed = formats.pack(weight, spec)
    same = spec.format in PLAIN_DTYPES and packed["weight"].dtype == weight.dtype  # the checkpoint's bytes
    return packed.tensors, Error(0.0, 0.0) if same else error(weight, packed), None


def _rms(errors: Mapping[str, Error]) -> dict[str, float]:
    """Relative rms by matrix, and of all together, in six digits: the last bits of a long sum differ between
    kinds of CPU, and say nothing."""
    if not errors:
        return {}
    named = {matrix: e for matrix, e in errors.items() if matrix}
    named["all"] = sum(errors.values(), Error(0.0, 0.0))
    return {matrix: float(f"{e.rms:.6g}") for matrix, e in named.items()}


def _write(made: Made, writer: StoreWriter, journal: Journal) -> tuple[Work, Finished]:
    finished = Finished(writer.write(made.work.region, made.tensors), made.error, made.calibrated)
    journal.append(made.work.region.name, finished)
    return made.work, finished


def _check_finite(source: Checkpoint, parts: tuple[str, ...], weight: Tensor) -> None:
    """CheckpointError naming tensor and position of the first inf or NaN. weight: `parts` stacked."""
    if math.isfinite(weight.sum().item()):
        return  # an inf or NaN would have reached the sum; this is 50 times as fast as looking at each weight
    for name, part in zip(parts, weight.chunk(len(parts)), strict=True):
        for start, rows in zip(range(0, len(part), 1024), part.split(1024), strict=True):
            bad = torch.isfinite(rows).logical_not_().nonzero()
            if len(bad):
                index = [start + bad[0, 0].item(), *bad[0, 1:].tolist()]
                raise CheckpointError(f"{source.path}: {name}{index} is {rows[tuple(bad[0])].item()}",
                                      "no working model has such a weight: fetch the checkpoint again")

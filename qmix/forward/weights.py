"""The dense weights of a model, from a store to the products: every tensor used exactly once.

Matrices stay packed as the store has them. Norms become fp32, as what they multiply by. Routers, and what else is
summed in fp64, stay as they are stored and are widened where they are multiplied.

T tokens, N rows out, M columns, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.config import QuantConfig
from qmix.device import Device
from qmix.errors import StoreError
from qmix.formats import Packed, carried
from qmix.formats.packed import stacked
from qmix.forward.program import MTP_ROWS, model_program, mtp_head_program, mtp_program
from qmix.kernels import ops
from qmix.kernels.router import router_logits
from qmix.kernels.table import KernelTable
from qmix.kernels.torch_ops import taps_of
from qmix.sizes import CARRIED, MTP_VOCAB, MatrixSpec
from qmix.spec import DTYPES, Model
from qmix.spec import Norm as NormSpec
from qmix.spec import Tensor as Named

READERS = 4  # threads: one alone does not keep the disk busy
PACKED = ("linear", "mlp", "head")  # roles of the tensors that a store packs
DAMAGED = "the store is damaged or from another version: quantize again"
Read = Callable[[str], Packed | Tensor]


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """dtype: what activations, keys and values are computed in. matrices: by canonical name, a packed embedding too;
    with tied embeddings the head's is the embedding, or shares its memory, and has its name. tensors: all others.
    stacks: on a device the matrices of several names as one, their rows one after another, in place of theirs."""

    model: Model
    dtype: torch.dtype
    matrices: Mapping[str, Packed]
    tensors: Mapping[str, Tensor]
    stacks: Mapping[tuple[str, ...], Packed] = field(default_factory=dict)


def compute_dtype(model: Model, quant: QuantConfig, half: torch.dtype = torch.bfloat16) -> torch.dtype:
    """fp32 where every matrix may be the checkpoint's own, of fp32 or fp16, else `half`."""
    wide = quant.unrounded and DTYPES[model.dtype] in ("fp16", "fp32")
    return torch.float32 if wide else half


def load_dense(model: Model, dtype: torch.dtype, read: Read, device: Device | None = None) -> DenseWeights:
    """Every dense weight, by canonical name of `read`, which several threads call; on `device` where one is given: then
    a few at a time are in host memory. StoreError names what is missing or wrong."""
    together = {name for names in _stacks(model) for name in names} | set(_router_weights(model))

    def placed(name: str) -> Packed | Tensor:
        found = read(name)
        # Those that are stacked go there afterwards: their own memory would be left in pieces between others'.
        return found if device is None or name in together else found.to(device.torch_device)

    with ThreadPoolExecutor(READERS, "qmix-dense") as readers:
        coming = {t.name: readers.submit(placed, t.name) for t in model.tensors()}
        try:
            return assemble(model, dtype, lambda name: coming.pop(name).result(),
                            None if device is None else device.torch_device)
        except BaseException:
            readers.shutdown(wait=True, cancel_futures=True)
            raise


def assemble(model: Model, dtype: torch.dtype, read: Read, device: torch.device | None = None) -> DenseWeights:
    """The weights of `model.tensors()` from `read(canonical name)`, which gives a Packed for those that a store packs,
    else a Tensor; each is read once. device: where given, q, k and v of a layer become one matrix if their format
    allows it, and the routers of all layers lie side by side."""
    norms = _norms(model)
    matrices: dict[str, Packed] = {}
    tensors: dict[str, Tensor] = {}
    for want in model.tensors():
        got = read(want.name)
        if want.role in PACKED or (want.role == "embedding" and isinstance(got, Packed)):
            if not isinstance(got, Packed) or (got.spec.rows, got.spec.cols) != want.shape:
                raise StoreError(f"{want.name}: got {_shape(got)}, want a matrix {list(want.shape)}", DAMAGED)
            matrices[want.name] = got
        elif not isinstance(got, Tensor) or tuple(got.shape) != want.shape:
            raise StoreError(f"{want.name}: got {_shape(got)}, want a tensor {list(want.shape)}", DAMAGED)
        elif want.name in norms:
            tensors[want.name] = norms[want.name].multiplier(got.float())
        else:
            tensors[want.name] = got
    if model.tied and "embedding" not in matrices:
        matrices["embedding"] = _tied_head(tensors["embedding"])
    if model.mtp_head is not None:
        matrices[MTP_ROWS] = _first_rows(matrices["embedding" if model.tied else "head"], MTP_VOCAB)
    stacks = {} if device is None else _stack(model, matrices, device)
    if device is not None:
        tensors |= _side_by_side({name: tensors[name] for name in _router_weights(model)}, device)
    return DenseWeights(model, dtype, matrices, tensors, stacks)


def _stack(model: Model, matrices: dict[str, Packed], device: torch.device) -> dict[tuple[str, ...], Packed]:
    """q, k and v of each layer as one matrix on `device`, taken out of `matrices`; each by itself where their format
    does not allow it."""
    stacks = {}
    for names in _stacks(model):
        parts = [matrices.pop(name) for name in names]
        if (whole := stacked(parts)) is None:
            matrices |= {name: part.to(device) for name, part in zip(names, parts, strict=True)}
        else:
            stacks[names] = whole.to(device)
    return stacks


def _side_by_side(tensors: Mapping[str, Tensor], place: torch.device) -> dict[str, Tensor]:
    """Those of one shape and dtype as parts of one tensor at `place`, in order: a kernel finds the routers of several
    layers by their distance, so that those which are asked for guesses are not copied."""
    groups: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.shape, tensor.dtype), []).append(name)
    found = {}
    for (shape, dtype), names in groups.items():
        whole = torch.empty(len(names), *shape, dtype=dtype, device=place)
        for part, name in zip(whole, names, strict=True):
            found[name] = part.copy_(tensors[name])
    return found


class KernelWeights:
    """Dense weights with what multiplies by them: torch_ops.Weights, by the kernels of this process.

    A matrix that the native kernels compute takes activations as they are, fp32 or bf16, and gives them back so; any
    other gets the compute dtype. Those that read the same go together where the native kernels have them all.
    """

    def __init__(self, dense: DenseWeights, kernels: KernelTable):
        self.dense = dense
        self.dtype = dense.dtype
        self.kernels = kernels
        self._tensors = dense.tensors
        self._taps: dict[str, Tensor] = {}
        self._rows = {t.name: t.shape[0] for t in dense.model.tensors()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def matrix(self, name: str) -> Packed:
        return self.dense.matrices[name]

    def rows(self, name: str, tokens: Tensor) -> Tensor:
        """See torch_ops.PlainWeights."""
        found = self._tensors.get(name)
        return F.embedding(tokens, found).float() if found is not None else \
            carried.rows(self.dense.matrices[name], tokens)

    def linears(self, x: Tensor, *names: str) -> list[Tensor]:
        """See torch_ops.PlainWeights."""
        stack = self.dense.stacks.get(names)
        if stack is not None:
            return list(self.kernels.linear(x.to(self.dtype), stack).split([self._rows[name] for name in names], 1))
        matrices = [self.dense.matrices[name] for name in names]
        native = [self.kernels.computes_natively(m) for m in matrices]
        if all(native):
            return self.kernels.linears(x, *matrices)
        return [self.kernels.linear(x if own else x.to(self.dtype), m) for own, m in zip(native, matrices, strict=True)]

    def exact(self, x: Tensor, name: str) -> Tensor:
        return router_logits(x.float(), self._tensors[name])

    def norm(self, weight: Named | None, spec: NormSpec) -> Tensor | None:
        return None if weight is None else self._tensors[weight.name]

    def vector(self, weight: Named | None) -> Tensor | None:
        return None if weight is None else self._tensors[weight.name].float()

    def taps(self, weight: Named) -> Tensor:
        """Made once: prompts, decode passes and jobs of the native library share them."""
        if weight.name not in self._taps:
            self._taps[weight.name] = taps_of(self._tensors[weight.name])
        return self._taps[weight.name]


def _norms(model: Model) -> dict[str, NormSpec]:
    """The norm that each weight of one belongs to."""
    program = model_program(model)
    if model.mtp_head is not None:
        program += mtp_program(model) + mtp_head_program(model)
    return {op.weight.name: op.norm for op in program
            if isinstance(op, ops.Norm | ops.HeadNorm) and op.weight is not None and op.norm is not None}


def _stacks(model: Model) -> list[tuple[str, ...]]:
    """q, k and v of each layer that has them as three matrices."""
    there = {t.name for t in model.tensors()}
    groups = [tuple(f"layers.{i}.attention.{part}" for part in "qkv") for i in range(len(model.layers))]
    return [names for names in groups if there.issuperset(names)]


def _router_weights(model: Model) -> list[str]:
    return [f"layers.{i}.router.weight" for i in model.moe_layers]


def _tied_head(embedding: Tensor) -> Packed:
    """The embedding [V, H] as the head's matrix, sharing its memory."""
    kind = DTYPES[str(embedding.dtype).removeprefix("torch.")]
    return Packed.of(MatrixSpec(kind, *embedding.shape), {"weight": embedding}, "tied head")


def _first_rows(whole: Packed, rows: int) -> Packed:
    """Of a matrix its first rows, sharing its memory; all of one in which they do not lie together (int4). rows: of
    the carried formats, which have blocks of rows, as many as some blocks have."""
    spec = whole.spec
    if spec.rows <= rows or spec.format not in ("int8", "bf16", "fp16", "fp32", *CARRIED):
        return whole
    first = replace(spec, rows=rows)
    return Packed.of(first, {t.name: whole[t.name][:t.shape[0]] for t in first.tensors}, "the first rows of the head")


def _shape(got: Packed | Tensor) -> str:
    if isinstance(got, Packed):
        return f"{got.spec.format} [{got.spec.rows}, {got.spec.cols}]"
    return f"a tensor {list(got.shape)}"

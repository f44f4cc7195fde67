"""The dense weights of a Mixtral, read from a store: every tensor used exactly once.

Matrices stay packed as the store has them, and routers as the checkpoint has them, widened where they are multiplied;
on a device they become fp64, as its kernels read them. Norms become fp32.

H hidden, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix import names
from qmix.config import DTYPES, ModelConfig, QuantConfig
from qmix.device import Device
from qmix.errors import StoreError
from qmix.formats import Packed
from qmix.formats.packed import stacked
from qmix.kernels.router import RouterTensors
from qmix.kernels.table import KernelTable
from qmix.sizes import MatrixSpec
from qmix.spec import Router
from qmix.store import Store

READERS = 4  # threads: one alone does not keep the disk busy
STACKED = tuple(f".{part}_proj.weight" for part in "qkv")  # the ends of their names
DAMAGED = "the store is damaged or from another version: quantize again"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer without its experts: norms [H] fp32, the router with its weight [E, H], and packed matrices. heads: the
    projections to queries, keys and values; on a device one matrix, q over k over v, where the format allows it."""

    input_norm: Tensor
    heads: tuple[Packed, ...]
    o: Packed
    post_norm: Tensor
    router: RouterTensors


@dataclass(frozen=True, slots=True)
class Weights:
    """dtype: what activations, keys and values are computed in. embedding [V, H] in the checkpoint's dtype;
    with tied embeddings the head shares its memory."""

    dtype: torch.dtype
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Packed


def load_dense(store: Store, kernels: KernelTable, device: Device | None = None) -> Weights:
    """Every dense weight of `store`, ready for `kernels`, on `device` where one is given: then a few at a time are in
    host memory. StoreError names what is missing or wrong."""
    tensors = names.dense_tensors(store.config)
    dtype = compute_dtype(store.config, store.quant, torch.bfloat16 if device is None else device.half)

    def read(name: str) -> Packed | Tensor:
        found = store.dense(name)
        # Those that are stacked go there afterwards: their own memory would be left in pieces between others'.
        return found if device is None or name.endswith(STACKED) else found.to(device.place)

    with ThreadPoolExecutor(READERS, "qmix-dense") as readers:
        coming = {t.name: readers.submit(read, t.name) for t in tensors}
        try:
            weights = assemble(store.config, dtype, lambda name: coming.pop(name).result(),
                               None if device is None else device.place)
        except BaseException:
            readers.shutdown(wait=True, cancel_futures=True)
            raise
    layer = weights.layers[0]
    for packed in (layer.heads[0], weights.head):
        assert (packed.spec.format, packed.spec.block) in kernels.kernels, packed.spec
    return weights


def compute_dtype(config: ModelConfig, quant: QuantConfig, half: torch.dtype = torch.bfloat16) -> torch.dtype:
    """fp32 where every matrix is a plain one of fp32 or fp16, else `half`."""
    wide = quant.experts == quant.dense == "keep" and DTYPES[config.dtype] in ("fp16", "fp32")
    return torch.float32 if wide else half


def assemble(config: ModelConfig, dtype: torch.dtype, read: Callable[[str], Packed | Tensor],
             place: torch.device | None = None) -> Weights:
    """Weights from `read(name)`, which gives a Packed for linear layers and head, else a Tensor. place: q, k and v of
    a layer as one matrix, where that can be, and there."""
    left = {t.name: t for t in names.dense_tensors(config)}

    def matrix(name: str) -> Packed:
        want, got = left.pop(name), read(name)
        if not isinstance(got, Packed) or (got.spec.rows, got.spec.cols) != want.shape:
            raise StoreError(f"{name}: got {_shape(got)}, want a matrix {list(want.shape)}", DAMAGED)
        return got

    def plain(name: str) -> Tensor:
        want, got = left.pop(name), read(name)
        if not isinstance(got, Tensor) or tuple(got.shape) != want.shape:
            raise StoreError(f"{name}: got {_shape(got)}, want a tensor {list(want.shape)}", DAMAGED)
        return got

    def layer(prefix: str) -> LayerWeights:
        q, k, v, o = (matrix(f"{prefix}self_attn.{part}_proj.weight") for part in "qkvo")
        heads: tuple[Packed, ...] = (q, k, v)
        if place is not None:
            whole = stacked(heads)
            heads = tuple(m.to(place) for m in (heads if whole is None else (whole,)))
        gate = plain(prefix + "block_sparse_moe.gate.weight")
        return LayerWeights(
            input_norm=plain(prefix + "input_layernorm.weight").float(), o=o,
            heads=heads,
            post_norm=plain(prefix + "post_attention_layernorm.weight").float(),
            router=RouterTensors(spec, gate if place is None else gate.double()))

    spec = Router(config.num_experts, config.experts_per_token)
    embedding = plain(names.EMBEDDING)
    layers = tuple(layer(names.layer_prefix(i)) for i in range(config.num_layers))
    final_norm = plain(names.FINAL_NORM).float()
    head = tied_head(embedding) if config.tie_embeddings else matrix(names.HEAD)
    if left:
        raise StoreError(f"{next(iter(left))}: no layer uses it", DAMAGED)
    return Weights(dtype, embedding, layers, final_norm, head)


def tied_head(embedding: Tensor) -> Packed:
    """The embedding [V, H] as the head's matrix, sharing its memory."""
    kind = DTYPES[str(embedding.dtype).removeprefix("torch.")]
    return Packed.of(MatrixSpec(kind, *embedding.shape), {"weight": embedding}, "tied head")


def _shape(got: Packed | Tensor) -> str:
    if isinstance(got, Packed):
        return f"{got.spec.format} [{got.spec.rows}, {got.spec.cols}]"
    return f"a tensor {list(got.shape)}"

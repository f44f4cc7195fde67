"""What several test files share: tiny random checkpoints, their weights, and a naive experts callable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mixtrals as names
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizer_files import DEMO_TEMPLATE, spm_model
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import DTYPES, ExpertKey, QuantConfig, Step
from qmix.formats import Packed, pack
from qmix.forward.run_eager import NO_GUESSES, Guesses
from qmix.forward.runner import Runner
from qmix.forward.weights import DenseWeights, assemble, compute_dtype, load_dense
from qmix.kernels.table import KernelTable, select
from qmix.models import read_model
from qmix.offload.experts import PagedExperts
from qmix.offload.needs import Needs
from qmix.offload.plan import plan
from qmix.offload.router_stats import RouterStats
from qmix.offload.setup import Offload, OffloadOptions, open_offload
from qmix.quantize import quantize_checkpoint
from qmix.sizes import MatrixSpec
from qmix.spec import Model
from qmix.store import Store

TINY: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "sliding_window": None,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}
UNQUANTIZED = QuantConfig(experts="keep", dense="keep", method="", group_size=0, block=0)


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A config.json of a model that runs in milliseconds; an override of `...` removes the key."""
    return {k: v for k, v in {**TINY, **overrides}.items() if v is not ...}


def tiny_tensors(model: Model, seed: int = 0, dtype: torch.dtype = torch.bfloat16,
                 alike: bool = False) -> dict[str, Tensor]:
    """Random weights, scaled so that routing is uneven and the logits are far from flat. alike: all experts have the
    weights of the first, for models so wide that drawing each takes seconds."""
    random = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], gain: float) -> Tensor:
        return (torch.randn(shape, generator=random) * gain).to(dtype)

    tensors = {}
    for t in names.dense_tensors(model):
        unit = t.shape[-1] ** -0.5
        gain = {"embedding": 1.0, "linear": unit, "router": 2 * unit, "head": 3 * unit, "norm": 0.2}[t.role]
        tensors[t.name] = draw(t.shape, gain) + (1 if t.role == "norm" else 0)
    first: dict[str, Tensor] = {}
    for key in model.expert_keys:
        for matrix, (name, shape) in names.expert_tensors(model, key).items():
            one = first.get(matrix)
            tensors[name] = draw(shape, 1.5 * shape[1] ** -0.5) if one is None else one.clone()
            if alike:
                first.setdefault(matrix, tensors[name])
    return tensors


def write_checkpoint(path: Path, raw: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """config.json and tensors as model.safetensors, or spread over `shards` files with an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
                  for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_tiny_checkpoint(path: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, shards: int = 1,
                          alike: bool = False, **overrides: Any) -> Path:
    """A tiny random Mixtral in Hugging Face layout (without a tokenizer). alike: as tiny_tensors has it; overrides:
    keys of config.json, `...` to leave one out. Returns `path`."""
    raw = tiny_config(torch_dtype=str(dtype).removeprefix("torch."), **overrides)
    return write_checkpoint(path, raw, tiny_tensors(read_model(raw), seed, dtype, alike), shards)


def write_tiny_stores(folder: Path, formats: Mapping[str, QuantConfig], **overrides: Any) -> dict[str, Path]:
    """One fp32 checkpoint with a tokenizer, in several formats: {name: store}. overrides: keys of config.json."""
    source = write_tiny_checkpoint(folder / "tiny", dtype=torch.float32, vocab_size=512, **overrides)
    (source / "tokenizer.model").write_bytes(spm_model())
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": DEMO_TEMPLATE}))
    with Checkpoint.open(source) as checkpoint:
        for name, quant in formats.items():
            quantize_checkpoint(checkpoint, folder / name, quant)
    return {name: folder / name for name in formats}


def unquantized_weights(checkpoint: Checkpoint) -> DenseWeights:
    """The dense weights of a checkpoint as they are, without a store between."""
    model = checkpoint.model
    roles = {t.name: t.role for t in model.tensors()}

    def read(name: str) -> Packed | Tensor:
        tensor = checkpoint.dense(name)
        if roles[name] not in ("linear", "mlp", "head"):
            return tensor
        return pack(tensor, MatrixSpec(DTYPES[model.dtype], *tensor.shape))

    return assemble(model, compute_dtype(model, UNQUANTIZED), read)


def naive_experts(checkpoint: Checkpoint,
                  seen: Callable[..., None] = lambda *_: None) -> Callable[..., Tensor]:
    """The experts callable in float64, token by token and rank by rank, straight from the checkpoint."""
    weights = {key: [w.double() for w in checkpoint.expert(key)] for key in checkpoint.model.expert_keys}

    def experts(layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, step: Step,
                ahead: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        seen(layer, x, ids, topk_weights, step, ahead)
        if wanted is not None:
            x, ids, topk_weights = x[wanted], ids[wanted], topk_weights[wanted]
        out = torch.zeros(x.shape, dtype=torch.float64)
        for expert in range(checkpoint.model.num_experts):
            token, rank = (ids == expert).nonzero(as_tuple=True)
            w1, w2, w3 = weights[ExpertKey(layer, expert)]
            rows = x[token].double()
            y = (F.silu(rows @ w1.T) * (rows @ w3.T)) @ w2.T
            out.index_add_(0, token, y * topk_weights[token, rank, None].double())
        return out.to(x.dtype)

    return experts


def unquantized_model(checkpoint: Checkpoint, seen: Callable[..., None] = lambda *_: None,
                      guess: bool = True) -> Runner:
    """The runner on the checkpoint's own weights with naive experts; `seen` gets every call of theirs."""
    kernels = select({DTYPES[checkpoint.model.dtype]}, say=lambda line: None)
    return Runner(checkpoint.model, unquantized_weights(checkpoint), kernels, naive_experts(checkpoint, seen),
                  Guesses(1, checkpoint.model.top_k) if guess else NO_GUESSES)


def stored_model(source: Path, out: Path, quant: QuantConfig = UNQUANTIZED) -> Runner:
    """Quantize the checkpoint `source` into the store `out` and bring it up as the engine does."""
    with Checkpoint.open(source) as checkpoint:
        quantize_checkpoint(checkpoint, out, quant, threads=1)
    with Store.open(out) as store:
        formats = {DTYPES[store.model.dtype] if f == "keep" else f for f in (quant.experts, quant.dense)}
        kernels = select(formats | {DTYPES[store.model.dtype]}, say=lambda line: None)
        weights = load_dense(store.model, compute_dtype(store.model, quant), store.dense)
        return Runner(store.model, weights, kernels, resident_experts(store, kernels))


def offloaded(store: Store, kernels: KernelTable, slots: int | None = None, **options: Any) -> Offload:
    """The experts of a store in `slots` slots, None for all. Close it."""
    needs = Needs.of(store.model, store.quant, 64)
    tiny = replace(needs, dense=0, kv=0, workspace=0)
    ram = 256 * 2**20 + needs.record * (needs.records if slots is None else slots)
    stats = RouterStats(len(store.model.record_layers), store.model.num_experts)
    return open_offload(store, kernels, plan(tiny, ram, 0), OffloadOptions(**options), stats)


def resident_experts(store: Store, kernels: KernelTable) -> PagedExperts:
    """All experts of a store in memory; nothing stays open."""
    offload = offloaded(store, kernels)
    offload.close()
    return offload.experts


def prefill(model: Runner, ids: list[int], cache: Any, all_logits: bool = False) -> Tensor:
    """Append `ids` to one cache; logits [1, V] or [T, V]."""
    positions = torch.arange(cache.length, cache.length + len(ids))
    return model.forward(torch.tensor(ids), positions, [cache], Step("prefill"), all_logits)


def decode(model: Runner, token: int, cache: Any) -> Tensor:
    """Append one token; logits [1, V]."""
    return model.forward(torch.tensor([token]), torch.tensor([cache.length]), [cache], Step("decode"))

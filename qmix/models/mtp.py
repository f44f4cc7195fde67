"""The multi-token-prediction head of Qwen3-Next, Qwen3.5 and 3.6: one layer with attention and experts, of the kinds
that the model has, behind a projection; embedding and output head are the model's own.

Its order is that of vLLM's qwen3_next_mtp.py and llama.cpp's qwen35moe.cpp: the embedding comes before the hidden
state, and the hidden state is what the model's final norm gives, not what it reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from qmix.models.gated_delta import NAMES, gated_attention_sources
from qmix.models.parts import EXPERTS, FUSED
from qmix.models.source import Index, Layout, Source, halves
from qmix.spec import Attention, Layer, Model, Moe, MtpHead, Norms

PREFIX = "mtp."
TOP = {"mtp.embedding_norm": "mtp.pre_fc_norm_embedding.weight", "mtp.hidden_norm": "mtp.pre_fc_norm_hidden.weight",
       "mtp.fc": "mtp.fc.weight", "mtp.final_norm": "mtp.norm.weight"}
LAYER = f"{PREFIX}layers.0."


def mtp_head(model: Model) -> MtpHead | None:
    """That of a model with such layers; None where it has no attention or no experts."""
    mixer = next((layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)), None)
    mlp = next((layer.mlp for layer in model.layers if isinstance(layer.mlp, Moe)), None)
    if mixer is None or mlp is None:
        return None
    norm = model.final_norm
    return MtpHead(Layer(mixer, mlp, Norms(norm, norm)), norm, norm, norm)


def mtp_layouts(model: Model) -> tuple[Layout, ...]:
    """Where the head's tensors lie: with experts one by one, and fused."""
    at, dense = f"layers.{model.num_layers}.", dict(_dense(model))
    expert = model.layer(model.num_layers).mlp
    assert isinstance(expert, Moe)
    alone: dict[str, Source] = {}
    fused: dict[str, Source] = {}
    for e in range(expert.router.experts):
        prefix, index = f"{at}experts.{e}.", Index(e, expert.router.experts)
        alone |= {f"{prefix}{part}": Source(LAYER + name.format(e))
                  for part, name in zip(("gate", "up", "down"), EXPERTS, strict=True)}
        fused[prefix + "gate"], fused[prefix + "up"] = halves(LAYER + FUSED[0], expert.expert.inner, index)
        fused[prefix + "down"] = Source(LAYER + FUSED[1], (index,))
    return {**dense, **alone}, {**dense, **fused}


def _dense(model: Model) -> Iterator[tuple[str, Source]]:
    at, mixer = f"layers.{model.num_layers}.", model.layer(model.num_layers).mixer
    assert isinstance(mixer, Attention)
    gated = gated_attention_sources(mixer, f"{LAYER}self_attn.q_proj")
    for tensor in model.mtp_tensors():
        within = tensor.name.removeprefix(at)
        yield tensor.name, Source(TOP[tensor.name]) if tensor.name in TOP else \
            gated[within] if within in gated else Source(LAYER + NAMES[within])


def has_mtp_head(model: Model, there: Collection[str]) -> bool:
    """Whether the names `there` are of a checkpoint with such a head, and with nothing else that bears its prefix:
    several layers, or embeddings of its own, are another head."""
    found = {name for name in there if name.startswith(PREFIX)}
    return bool(found) and any(found <= {name for source in layout.values() for name in source.names}
                               for layout in mtp_layouts(model))

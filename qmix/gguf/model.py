"""GGUF files as checkpoints: their metadata becomes a config.json, and their tensors have a layout like any other.

An architecture that occurs in GGUF files says in its own file of qmix/models what they call it (`GGUF`), how its
metadata reads (`gguf_config`) and where its tensors are (`gguf_layouts`); qmix/models/gguf.py has what these share. A
key of the model that nobody read is refused, as in a config.json.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from typing import Any, Protocol, cast

from qmix.errors import ConfigError
from qmix.gguf.vocabulary import CONTROL
from qmix.models.gguf import EMBEDDING, ROPE_FREQS, WITH_EXPERTS, Shapes
from qmix.models.keys import MOST_LAYERS, Keys
from qmix.models.registry import ARCHITECTURES
from qmix.models.source import Layout
from qmix.spec import Model

UNIFORM = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")  # also written layer by layer
# Control tokens that end an answer whatever a file says of them, as llama.cpp takes them.
ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
# Keys that change nothing: labels, and what the tensors say too.
HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type")


class GgufArchitecture(Protocol):
    """What a file of qmix/models has where its models occur as GGUF files. GGUF: what these call it."""

    @property
    def GGUF(self) -> str: ...

    def gguf_config(self, keys: Keys, shapes: Shapes) -> dict[str, Any]:
        """A config.json. keys: of the metadata behind the architecture's name."""

    def gguf_layouts(self, model: Model) -> tuple[Layout, ...]:
        """As `layouts` of the architecture."""


def gguf_config(metadata: Mapping[str, Any], shapes: Shapes, rope_freqs: tuple[float, ...] | None = None
                ) -> dict[str, Any]:
    """The config.json of a GGUF file; ConfigError names the key at fault, or an architecture that is not known.
    rope_freqs: the numbers of that tensor, where the file has it."""
    general = Keys(metadata)
    kind = general.get("general.architecture", None)
    name = f"{kind}{WITH_EXPERTS}" if kind == "llama" and metadata.get("llama.expert_count") else kind
    known = {file.GGUF: file for file in map(_as_gguf, ARCHITECTURES) if file is not None}
    if name not in known:
        raise ConfigError(f"general.architecture: got {name!r:.60}, want {' or '.join(map(repr, sorted(known)))}",
                          "qmix reads no other architectures from GGUF files yet")
    general.fixed("general.type", "model")
    if EMBEDDING not in shapes:
        raise ConfigError(f"{EMBEDDING}: missing", "the file holds no whole model: fetch it again")
    prefix = f"{kind}."
    scope = {key.removeprefix(prefix): _plain(value) for key, value in metadata.items() if key.startswith(prefix)}
    if rope_freqs is not None:
        scope[ROPE_FREQS] = rope_freqs
    keys = Keys(scope, prefix)
    for key in UNIFORM:
        if isinstance(value := scope.get(key), tuple):
            layers = keys.count("block_count", most=MOST_LAYERS)
            keys.want(len(value) == layers, key, len(value), f"one number, or block_count = {layers} numbers")
            if len({*value}) == 1:
                scope[key] = value[0]
    config = known[name].gguf_config(keys, shapes)
    keys.fixed("attention.causal", True)
    keys.harmless(*HARMLESS)
    try:
        keys.finish()
    except ConfigError as e:
        raise ConfigError(e.message, "qmix would compute the model otherwise than the file says") from None
    return {**config, **_ends(general, shapes[EMBEDDING][0])}


def gguf_layouts(model: Model) -> tuple[Layout, ...]:
    """Those in which GGUF files of the model occur, today's first."""
    file = _as_gguf(model.architecture)
    assert file is not None
    return file.gguf_layouts(model)


def _as_gguf(kind: str) -> GgufArchitecture | None:
    """The file of a model_type, where its models occur as GGUF files."""
    file = ARCHITECTURES[kind]
    return cast(GgufArchitecture, file) if hasattr(file, "GGUF") else None


def gguf_skipped(model: Model, there: Collection[str]) -> set[str]:
    """Those of the names `there` that the model does not need: the layers of a multi-token-prediction head, which lie
    behind the last, and frequencies that are computed from the metadata instead."""
    heads = tuple(f"blk.{len(model.layers) + i}." for i in range(model.mtp))
    return {name for name in there if name.startswith(heads) or name.endswith(".attn_rot_embd.weight")}


def _plain(value: Any) -> Any:
    """A number that was written as fp32 as the decimal that it stands for: 9.99999974e-06 -> 1e-05."""
    if isinstance(value, float) and abs(value) < 3e38 and struct.unpack("<f", struct.pack("<f", value))[0] == value:
        return next(short for digits in range(1, 18) if struct.pack("<f", short := float(f"{value:.{digits}g}"))
                    == struct.pack("<f", value))
    return value


def _ends(general: Keys, rows: int) -> dict[str, Any]:
    """The ids that begin and end a text. rows: of the embedding."""
    prefix = "tokenizer.ggml."
    tokens, kinds = (_tuple(general.get(f"{prefix}{key}", None)) for key in ("tokens", "token_type"))
    count = min(rows, len(tokens)) if tokens else rows
    found = {}
    for name in ("bos", "eos", "eot", "eom"):
        key = f"{prefix}{name}_token_id"
        found[name] = general.token_ids(key)
        general.want(all(i < count for i in found[name]), key, max(found[name], default=None),
                     f"less than {count}, the tokens")
    known = [i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == CONTROL and text in ENDS]
    ends = (*found["eos"], *found["eot"], *found["eom"], *(i for i in known if i < count))
    return {"bos_token_id": next(iter(found["bos"]), None), "eos_token_id": [*dict.fromkeys(ends)] or None}


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()

"""Quantized GGUF files for tests of the stores that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")
import gguf
import gguf_models as models
import numpy as np
from architectures import random_model
from model_configs import with_keys
from sentencepiece import SentencePieceProcessor
from tokenizer_files import spm_model
from torch import Tensor

from qmix.formats import Packed
from qmix.store import Store

WIDE = {"mixtral": {"hidden_size": 256, "intermediate_size": 512},
        "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64},
        "gpt_oss": {"hidden_size": 96, "intermediate_size": 160}}  # no multiples of 256, as the real one's 2880
TypeOf = Callable[[str], str]


def q4_k_m(name: str) -> str:
    """As llama-quantize chooses for Q4_K_M, more bits where they help most; and a matrix in IQ4_XS."""
    if "attn_q." in name:
        return "IQ4_XS"
    if name == "output.weight" or "attn_v" in name or ("ffn_down" in name and "blk.1." not in name):
        return "Q6_K"
    return "Q8_0" if "attn_k" in name else "Q4_K"


def narrow(name: str) -> str:
    """The same where columns are no multiple of 256."""
    if "attn_k." in name:
        return "IQ4_NL"
    return "Q8_0" if "ffn_down" in name or name == "output.weight" else "Q5_1" if "attn_v" in name else "Q5_0"


def write(path: Path, kind: str, type_of: TypeOf, model: Any = None, **how: Any) -> Path:
    """With a tokenizer."""
    model = model if model is not None else random_model(with_keys(models.CONFIGS[kind], WIDE[kind]))
    pieces = SentencePieceProcessor(model_proto=spm_model())

    def keys(writer: Any) -> None:
        ids, kinds = range(len(pieces)), gguf.TokenType
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.id_to_piece(i).encode() for i in ids])
        writer.add_token_scores([pieces.get_score(i) for i in ids])
        writer.add_token_types([kinds.UNKNOWN if pieces.is_unknown(i) else kinds.CONTROL if pieces.is_control(i) else
                                kinds.BYTE if pieces.is_byte(i) else kinds.NORMAL for i in ids])

    return models.write(path, model, kind, type_of, keys=keys, **how)


def decoded(path: Path) -> dict[tuple[str, int], Tensor]:
    """What the package gguf makes of the experts of a file: fp32, gate above up, by the names of `matrices`."""
    there = {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type)))
             for t in gguf.GGUFReader(path).tensors if "_exps.weight" in t.name}
    found = {}
    for name in (name for name in there if "_up_" not in name):
        whole = torch.cat((there[name], there[name.replace("gate", "up")]), 1) if "gate" in name else there[name]
        found |= {(name, expert): matrix for expert, matrix in enumerate(whole)}
    return found


def matrices(store: Store) -> dict[str, Packed]:
    """By what GGUF files call the first tensor of each."""
    found = {}
    for key in store.model.expert_keys:
        buffer = torch.full((store.layout.record(key).nbytes,), 255, dtype=torch.uint8)
        store.read_record(key, buffer)
        w13, w2 = store.expert(key, buffer)
        found[f"blk.{key.layer}.ffn_gate_exps.weight", key.expert] = w13
        found[f"blk.{key.layer}.ffn_down_exps.weight", key.expert] = w2
    return found

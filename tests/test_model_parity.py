"""The model against transformers' MixtralForCausalLM in fp32: logits within 1e-4, and the same 64
greedy tokens, on tiny random models of every shape and on a small trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    decode,
    keep_model,
    prefill,
    stored_model,
    tiny_config,
    write_checkpoint,
    write_tiny_checkpoint,
)
from safetensors.torch import load_file
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.forward.runner import Runner

PROMPT = torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(1)).tolist()
STEPS = 64
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "every query its key": {"num_key_value_heads": 4},
    "one key for all": {"num_key_value_heads": 1},
    "explicit head size": {"head_dim": 40},
    "window shorter than the prompt": {"sliding_window": 9},
    "narrow window": {"sliding_window": 2},  # transformers' own cache keeps too much for a window of 1
    "tied embeddings": {"tie_word_embeddings": True},
    "one of five experts": {"num_local_experts": 5, "num_experts_per_tok": 1},
    "four of seven experts": {"num_local_experts": 7, "num_experts_per_tok": 4},
    "all of three experts": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "theta in rope_parameters": {"rope_theta": ..., "rope_parameters": {"rope_theta": 500.0,
                                                                        "rope_type": "default"}},
    "odd sizes": {"hidden_size": 72, "head_dim": 14, "intermediate_size": 50, "vocab_size": 131},
}


def reference(path: Path) -> Any:
    """transformers' model of a checkpoint, which must have loaded every tensor and made up none."""
    from transformers import MixtralForCausalLM
    model, report = MixtralForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def reference_run(model: Any, prompt: list[int]) -> tuple[list[int], Tensor]:
    """STEPS greedy tokens, and the logits [T, V] of the whole text in one pass."""
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
                             attention_mask=torch.ones(1, len(prompt)), pad_token_id=0)[0]
        return out[len(prompt):].tolist(), model(out[None]).logits[0]


def our_run(model: Runner, prompt: list[int]) -> tuple[list[int], Tensor]:
    """The same with qmix: prefill the prompt, then token by token."""
    cache = model.new_cache(len(prompt) + STEPS)
    logits = [prefill(model, prompt, cache, True)]
    tokens: list[int] = []
    for _ in range(STEPS):
        tokens.append(int(logits[-1][-1].argmax()))
        logits.append(decode(model, tokens[-1], cache))
    return tokens, torch.cat(logits)


def assert_same(path: Path, store: Path, prompt: list[int]) -> None:
    """The model on naive experts, and the model on a `keep` store as the engine runs it, against
    transformers."""
    want_tokens, want_logits = reference_run(reference(path), prompt)
    assert want_logits.std() > 1  # flat logits would agree by themselves
    with Checkpoint.open(path) as checkpoint:
        naive = keep_model(checkpoint)
    for model in (naive, stored_model(path, store)):
        tokens, logits = our_run(model, prompt)
        assert tokens == want_tokens
        error = (logits - want_logits).abs().max().item()
        print(f"largest logit {want_logits.abs().max():.3f}, largest error {error:.2e}")
        assert error < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_models(tmp_path: Path, name: str) -> None:
    path = write_tiny_checkpoint(tmp_path / "checkpoint", dtype=torch.float32, **CONFIGS[name])
    assert_same(path, tmp_path / "store", PROMPT)


def test_prompt_longer_than_a_block(tmp_path: Path) -> None:
    prompt = (PROMPT * 15)[:570]
    path = write_tiny_checkpoint(tmp_path / "checkpoint", dtype=torch.float32, sliding_window=530,
                                 max_position_embeddings=1024)
    assert_same(path, tmp_path / "store", prompt)


@pytest.mark.parametrize(("shard_size", "shards"), [("1GB", 1), ("200KB", 7)])
def test_checkpoints_that_transformers_wrote(tmp_path: Path, shard_size: str, shards: int) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM
    raw = {k: v for k, v in tiny_config().items() if k not in ("architectures", "model_type", "rope_theta")}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**raw, initializer_range=0.15))
    path = tmp_path / "checkpoint"
    model.save_pretrained(path, max_shard_size=shard_size)
    assert len(list(path.glob("*.safetensors"))) == shards
    assert_same(path, tmp_path / "store", PROMPT)


@pytest.mark.models
def test_trained_model(wiki_moe: Path, tmp_path: Path) -> None:
    """wiki-moe-29m, upcast to fp32."""
    raw = json.loads((wiki_moe / "config.json").read_text())
    tensors = {name: t.float() for name, t in load_file(wiki_moe / "model.safetensors").items()}
    path = write_checkpoint(tmp_path / "checkpoint", {**raw, "torch_dtype": "float32"}, tensors)
    text = "The history of the town begins in the twelfth century, when"
    import sentencepiece
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(wiki_moe / "tokenizer.model"))
    assert_same(path, tmp_path / "store", [1, *pieces.encode(text)])

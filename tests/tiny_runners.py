"""A small random model in fp32, which test_model.py and test_model_passes.py make fixtures of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    unquantized_model,
    write_tiny_checkpoint,
)
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.forward.runner import Runner

CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {}, "mha": {"num_key_value_heads": 4}, "window": {"sliding_window": 7},
    "head_dim": {"head_dim": 24}, "tied": {"tie_word_embeddings": True}, "top-1": {"num_experts_per_tok": 1},
    "top-3 of 5": {"num_local_experts": 5, "num_experts_per_tok": 3},
}
IDS = torch.randint(0, 128, (1500,), generator=torch.Generator().manual_seed(3)).tolist()


def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.float32)
    with Checkpoint.open(path) as opened:
        yield opened


def model(checkpoint: Checkpoint) -> Runner:
    return unquantized_model(checkpoint)


def close(got: Tensor, want: Tensor, relative: float = 1e-5) -> bool:
    """Largest difference, relative to the largest value."""
    return bool((got - want).abs().max() <= relative * want.abs().max())

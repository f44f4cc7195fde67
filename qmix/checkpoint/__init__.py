"""Checkpoints: weights, config.json and tokenizer of a model, in whichever layout, read one tensor at a time."""

from qmix.checkpoint.account import HEAD
from qmix.checkpoint.folder import ignored_keys
from qmix.checkpoint.reader import Checkpoint
from qmix.models.consolidated import is_consolidated
from qmix.shards import INDEX, SINGLE

__all__ = ["HEAD", "INDEX", "SINGLE", "Checkpoint", "ignored_keys", "is_consolidated"]

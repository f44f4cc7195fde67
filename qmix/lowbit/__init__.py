"""Weights that a checkpoint has quantized already, read as numbers: the layouts of qmix/schemes, done to values."""

from qmix.lowbit.matrix import Matrix, join

__all__ = ["Matrix", "join"]

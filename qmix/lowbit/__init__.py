"""Weights that a checkpoint has quantized already, read as numbers: the layouts of qmix/schemes, done to values."""

from qmix.lowbit.carry import fits, ggml_blocks, int4_blocks, mxfp4_blocks
from qmix.lowbit.matrix import Matrix, is_zero, join

__all__ = ["Matrix", "fits", "ggml_blocks", "int4_blocks", "is_zero", "join", "mxfp4_blocks"]

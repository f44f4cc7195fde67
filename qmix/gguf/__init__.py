"""GGUF files: what their headers say (header.py, types.py), which files belong together (split.py), and which model
they hold (model.py). No torch; the numbers are decoded in qmix/formats/ggml."""

from qmix.gguf.header import Header, read_header
from qmix.gguf.split import pieces
from qmix.gguf.types import TYPES, BlockType

__all__ = ["TYPES", "BlockType", "Header", "pieces", "read_header"]

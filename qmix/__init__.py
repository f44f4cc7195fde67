"""qmix runs Mixture-of-Experts language models on one consumer machine.

    engine = qmix.load("mixtral-int4")
    for token in engine.generate("Why is the sky blue?"):
        print(token.text, end="")

The names below import torch when first used; importing qmix itself does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmix.engine import Engine, load
    from qmix.quantize import quantize_checkpoint

__version__ = "0.1.0"
__all__ = ["Engine", "load", "quantize_checkpoint"]

_HOME = {"Engine": "qmix.engine", "load": "qmix.engine", "quantize_checkpoint": "qmix.quantize"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qmix' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

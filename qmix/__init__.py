"""qmix runs Mixture-of-Experts language models on one consumer machine.

    with qmix.load("mixtral-int4") as engine:
        for token in engine.generate("The tiger is"):
            print(token.text, end="")

docs/python.md shows the public names, which are those of __all__. They import torch when first used; importing qmix
itself does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint
    from qmix.config import Cancel, QuantConfig, SamplingParams
    from qmix.engine import Engine, Placement, Session, load
    from qmix.errors import QmixError
    from qmix.generate import Summary, Timings, Token
    from qmix.quantize import quantize_checkpoint
    from qmix.tokenizer import Message

__version__ = "0.3.0"
__all__ = ["Cancel", "Checkpoint", "Engine", "Message", "Placement", "QmixError", "QuantConfig", "SamplingParams",
           "Session", "Summary", "Timings", "Token", "load", "quantize_checkpoint"]

_HOME = {"Cancel": "qmix.config", "Checkpoint": "qmix.checkpoint", "Engine": "qmix.engine",
         "Message": "qmix.tokenizer", "Placement": "qmix.engine", "QmixError": "qmix.errors",
         "QuantConfig": "qmix.config", "SamplingParams": "qmix.config", "Session": "qmix.engine",
         "Summary": "qmix.generate", "Timings": "qmix.generate", "Token": "qmix.generate", "load": "qmix.engine",
         "quantize_checkpoint": "qmix.quantize"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qmix' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

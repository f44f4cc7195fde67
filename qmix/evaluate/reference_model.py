"""transformers' own model of a checkpoint, without weights."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qmix.errors import QmixError, UsageError
from qmix.evaluate.reference_memory import sink_heads
from qmix.evaluate.reference_weights import Weights
from qmix.spec import Attention, Model


def import_libraries(path: Path) -> None:
    """Both libraries, before memory is measured. UsageError says how to install them."""
    cure = "pip install 'qmix[reference]'; or name a store made by qmix quantize --format keep --dense keep"
    try:
        import accelerate  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("accelerate", "transformers"):
            raise
        raise UsageError(f"--against {path}: a checkpoint is run by transformers and accelerate, and {error.name} is "
                         "not installed", cure) from None
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise UsageError(f"--against {path}: a checkpoint is run by transformers 5 or newer, and "
                         f"{transformers.__version__} is installed", cure)
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that weights are on no device is what they are for


def skeleton(path: Path, ours: Model) -> Any:
    """transformers' model of the checkpoint's config, its weights on no device, its buffers in RAM. Of a model that
    also sees and hears it is the language model alone."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    theirs.tie_word_embeddings = ours.tied  # which may stand beside the language model's keys
    windows = {layer.mixer.window for layer in ours.layers if isinstance(layer.mixer, Attention)}
    if windows == {None}:
        theirs.sliding_window = None  # exporters write 0 for none too
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(theirs, dtype=getattr(torch, ours.dtype), trust_remote_code=False,
                                                 attn_implementation="eager" if sink_heads(ours) else "sdpa")
    model.tie_weights()
    return model.eval()


def check_names(model: Any, weights: Weights) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in found.keys() | weights.shapes.keys() if found.get(name) != weights.shapes.get(name))
    if wrong:
        raise QmixError(f"transformers {version('transformers')} has another layout of the model than qmix expects: "
                        f"{wrong[0]}: {found.get(wrong[0])}, want {weights.shapes.get(wrong[0])}",
                        "install the version that constraints.txt names, or name a store as the reference")

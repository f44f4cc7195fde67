"""Runs the kernels of prompts once before the first prompt, so that Triton compiles them while the model loads.

If a piece fails, qmix says so and the load continues: a prompt may never need that piece, and if one does, it fails
there with an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from qmix.device import Device
from qmix.formats.packed import Packed
from qmix.forward.weights import DenseWeights
from qmix.kernels.device_table import DeviceKernels
from qmix.offload.device_experts import DeviceExperts
from qmix.offload.setup import Offload
from qmix.spec import Attention, Model

COMPILED = (12, 40, 200)  # tokens of a prompt: numbers for which kernels are cut differently
LOG = logging.getLogger(__name__)


def compile_prompts(kernels: DeviceKernels, weights: DenseWeights, offload: Offload, model: Model, device: Device,
                    dtype: torch.dtype, say: Callable[[str], None]) -> None:
    """One line for each way in which a piece fails: its name, the error's type and first line. The traceback goes to
    Python's logging, at level DEBUG, of which the line speaks where somebody listens."""
    said: set[str] = set()
    for name, piece in _pieces(kernels, weights, offload, model, device, dtype):
        try:
            piece()
        except Exception as e:
            reason = f"{type(e).__name__}: {(str(e).strip().splitlines() or ['no message'])[0]}"
            LOG.debug("%s failed when compiled before the first prompt", name, exc_info=True)
            if reason not in said:
                where = " (the log has the traceback)" if LOG.isEnabledFor(logging.DEBUG) else ""
                say(f"{name} failed when compiled before the first prompt; prompts that need it will fail too: "
                    f"{reason}{where}")
            said.add(reason)


def _pieces(kernels: DeviceKernels, weights: DenseWeights, offload: Offload, model: Model, device: Device,
            dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what it is, what runs it once), for products of the dense matrices and of one expert of each kind, and for
    attention: of each shape that a layer has, once."""
    prompts = kernels.prompts
    matrices = {m.spec: m for m in (*weights.matrices.values(), *weights.stacks.values())}.values()
    mixers = [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]
    shapes = dict.fromkeys((a.heads, a.kv_heads, a.head_dim, a.window) for a in mixers)

    def expert(x: Tensor, w13: Packed, w2: Packed) -> None:
        prompts.linear(prompts.gated(x, w13), w2)

    together = offload.experts.prompts if isinstance(offload.experts, DeviceExperts) else None
    if together is not None:
        for size in together.sizes():
            yield (f"the experts of a prompt in tiles of {size} tokens",
                   partial(together.try_out, size, model.hidden, model.top_k, dtype))
    for tokens in COMPILED:
        x = torch.zeros(tokens, model.hidden, dtype=dtype, device=device.torch_device)
        for m in matrices:
            yield (f"a product of {tokens} tokens with a dense matrix in {m.spec.format}",
                   partial(prompts.linear, x.new_zeros(tokens, m.spec.cols), m))
        for w13, w2 in () if together is not None else offload.experts.views:
            yield f"an expert in {w13.spec.format} of {tokens} tokens", partial(expert, x, w13, w2)
        for heads, kv_heads, size, window in shapes:
            query, kept = x.new_zeros(tokens, heads, size), x.new_zeros(kv_heads, tokens, size)
            yield f"attention of {tokens} tokens", partial(kernels.attend, query, kept, kept, window)

"""The unquantized original as a reference: transformers computes it, accelerate places it, qmix only reads the files.

    checkpoint -> transformers' own model without weights -> accelerate's device map for a number of bytes
    -> what fits lies in RAM; the rest is read from the checkpoint, module by module, whenever it is used

accelerate's disk offload wants a folder with a second copy of the weights, for transformers stacks a layer's experts
into one tensor. A mapping takes its place here: it reads the same stack from the checkpoint itself, so that 94 GB
need neither 94 GB more nor a `keep` store. On a GPU the device map divides the weights between VRAM, RAM and disk, and
the GPU computes everything: weights in RAM or on disk are copied to it module by module. Everything runs in the
checkpoint's dtype, as transformers does by default; norms, the softmax of router and attention and rotary angles are in
fp32 there.

E experts, F expert inner, H hidden, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import Cancel
from qmix.errors import DoesNotFit, Interrupted, UsageError
from qmix.evaluate.reference_memory import largest_part, scoring, tensor_bytes, workspace
from qmix.evaluate.reference_model import check_names, import_libraries, skeleton
from qmix.evaluate.reference_weights import Weights
from qmix.gguf.header import is_gguf
from qmix.offload.workspace import SCORED_PIECE
from qmix.sizes import MIB, format_bytes


class Original:
    """A checkpoint that scores like an engine's session. Open within a `with`, `plan`, then `read`."""

    def __init__(self, checkpoint: Checkpoint, model: Any, say: Callable[[str], None]):
        self.path = checkpoint.path
        self.model = checkpoint.model
        self._checkpoint, self._model, self._say = checkpoint, model, say
        self._ram = self._vram = 0
        self._device: torch.device | None = None
        self._weights = Weights(checkpoint)
        self._cancel: Cancel | None = None
        self._ready = False
        check_names(model, self._weights)

    @classmethod
    def open(cls, path: Path, say: Callable[[str], None]) -> Original:
        """UsageError where transformers or accelerate are not installed, CheckpointError as Checkpoint.open."""
        import_libraries(path)
        if is_gguf(path):
            raise UsageError(f"{path}: a GGUF file, which transformers does not compute as it is",
                             "compare with the original checkpoint, as safetensors")
        with ExitStack() as opened:
            checkpoint = opened.enter_context(Checkpoint.open(path, mtp=False))
            found = cls(checkpoint, skeleton(checkpoint.folder, checkpoint.model), say)
            opened.pop_all()
            return found

    def __enter__(self) -> Original:
        return self

    def __exit__(self, *error: object) -> None:
        self._model = None
        self._checkpoint.close()

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the bits of its logits, threads and torch aside."""
        return {"checkpoint": self._checkpoint.fingerprint(), **self._how}

    def about(self) -> dict[str, Any]:
        """As suite.about of a store."""
        nbytes, model = self._checkpoint.nbytes, self.model
        weights = chain(model.tensors(), (t for key in model.expert_keys for t in model.expert_tensors(key)))
        parameters = sum(prod(tensor.shape) for tensor in weights)
        return {"checkpoint": str(self.path), "fingerprint": self._checkpoint.fingerprint(),
                "parameters": parameters, "bytes": nbytes, "bits_per_weight": round(8 * nbytes / parameters, 3),
                "dtype": self.model.dtype, "run_by": self._how}

    @property
    def _how(self) -> dict[str, Any]:
        config = self._model.config
        return {"transformers": version("transformers"), "accelerate": version("accelerate"),
                "computed_in": self.model.dtype, "attention": config._attn_implementation,
                "experts": config._experts_implementation}

    def least_bytes(self, context: int) -> int:
        """Of the memory of the processor that computes. Without it no window can be read: one module's weights, and the
        workspace."""
        return largest_part(self.model) + workspace(self.model, context)

    def least_beside(self, context: int) -> int:
        """Of RAM, where a GPU computes: a module on its way there, and the logits that come back."""
        return largest_part(self.model) + scoring(self.model, context) + 32 * MIB

    @property
    def weight_bytes(self) -> int:
        """Of memory, beyond the least, that could hold weights."""
        return self._checkpoint.nbytes

    def plan(self, ram: int, context: int, vram: int = 0, device: torch.device | None = None) -> None:
        """Take so many bytes in all, once the first window is read. device: the GPU that computes, within vram."""
        self._device = device
        self._ram = ram - (workspace(self.model, context) if device is None else self.least_beside(context)
                           - largest_part(self.model))
        self._vram = vram - workspace(self.model, context)

    def session(self) -> Original:
        return self

    def trim(self, length: int) -> None:
        """Nothing is kept between windows."""
        assert length == 0

    def read(self, ids: Sequence[int], skip: int = 0, cancel: Cancel | None = None) -> Iterator[Tensor]:
        """Session.read: the logits after each id but the first `skip`, in the same pieces."""
        self._cancel = cancel
        with _gpu_memory_suffices():
            if not self._ready:
                self._bring_up()
            with torch.inference_mode():
                tokens = torch.tensor([ids], device=self._device)
                states = self._model.model(tokens, use_cache=False).last_hidden_state[0, skip:]

        def pieces() -> Iterator[Tensor]:
            for part in states.split(SCORED_PIECE):
                with torch.inference_mode(), _gpu_memory_suffices():
                    logits = self._head(part).float().cpu()
                yield logits
                del logits

        return pieces()

    def _head(self, states: Tensor) -> Tensor:
        """As the model's own forward has it behind its last norm."""
        logits: Tensor = self._model.lm_head(states)
        cap = self.model.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _bring_up(self) -> None:
        """Give the model its weights, or hooks that read them, within `plan`."""
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import set_module_tensor_to_device

        model, weights = self._model, self._weights
        device_map = infer_auto_device_map(model, self._memory(), model._no_split_modules, self.model.dtype,
                                           offload_buffers=True)  # without it, a warning of some bytes of rotary angles
        computes = "cpu" if self._device is None else str(self._device)
        main = "cpu" if self._device is None else self._device.index or 0
        held = {name: device for name in weights if (device := _device_of(device_map, name)) != "disk"}
        for name, device in held.items():
            self._stop_if_cancelled()
            if device == main:
                set_module_tensor_to_device(model, name, computes, weights[name])
            else:
                weights.hold(name)
        model.tie_weights()
        # What is not where the computing is done is brought there by hooks, from `weights`: it knows what RAM holds.
        there = {module: computes if device == main else "disk" for module, device in device_map.items()}
        self._model = dispatch_model(model, there, main_device=computes, state_dict=weights, offload_index={})
        for layer in model.model.layers:
            layer.register_forward_pre_hook(self._stop_if_cancelled)
        self._ready = True
        self._say(f"transformers {version('transformers')} with accelerate {version('accelerate')}, in "
                  f"{self.model.dtype}; {self._where(held, main)}")

    def _memory(self) -> dict[int | str, int]:
        """accelerate's max_memory: bytes of weights by GPU (its number) and of RAM. Of either, it leaves room for the
        largest module."""
        ram: dict[int | str, int] = {"cpu": max(0, self._ram)}
        return ram if self._device is None else {self._device.index or 0: max(0, self._vram), **ram}

    def _where(self, held: Mapping[str, Any], main: int | str) -> str:
        """For people: where the weights are."""
        def nbytes(chosen: Callable[[str], bool]) -> int:
            return sum(tensor_bytes(shape, self.model) for name, shape in self._weights.shapes.items() if chosen(name))

        read, moved = nbytes(lambda name: name not in held), nbytes(lambda name: held.get(name, main) != main)
        if not read and not moved:
            return f"all its weights in {'RAM' if self._device is None else 'VRAM'}"
        each = [f"reads {format_bytes(read)} from the checkpoint"] if read else []
        each += [f"copies {format_bytes(moved)} from RAM to the GPU"] if moved else []
        return f"each window {' and '.join(each)}"

    def _stop_if_cancelled(self, *forward: object) -> None:
        if self._cancel:
            raise Interrupted("cancelled")


@contextmanager
def _gpu_memory_suffices() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise DoesNotFit(f"the reference needs more VRAM than planned: {str(e).splitlines()[0]}",
                         "choose a smaller -c/--ctx-size, give it more --vram, or --device cpu") from None


def _device_of(device_map: Mapping[str, Any], name: str) -> Any:
    """Of a tensor, the device of the longest module name before it."""
    inside = [module for module in device_map if module == "" or name == module or name.startswith(module + ".")]
    return device_map[max(inside, key=len)]

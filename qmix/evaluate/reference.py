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

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmix.checkpoint import HEAD, Checkpoint
from qmix.config import Cancel
from qmix.errors import DoesNotFit, Interrupted, QmixError, UsageError
from qmix.gguf.header import is_gguf
from qmix.kernels.kv_size import channels
from qmix.models import Source, layouts
from qmix.models.source import Index, PerHead, Rows, Squeeze, Strided, Transpose
from qmix.offload.plan import SCORED_COPIES, SCORED_PIECE, SCORED_ROWS, dense_mlps
from qmix.sizes import MIB, format_bytes
from qmix.sources import apply
from qmix.spec import Attention, DeltaNet, Model


class Weights(Mapping[str, Tensor]):
    """The tensors of transformers' own model by its names, each read from the checkpoint whenever it is asked for,
    unless RAM holds it. It has a layer's experts in one tensor each for gate and up, and for down."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._held: dict[str, Tensor] = {}
        model = checkpoint.model
        self._parts: dict[str, list[tuple[str, Source]]] = {}  # of each tensor, what of the model lies where in it
        self.shapes: dict[str, tuple[int, ...]] = {}
        table = layouts(model)[-1]  # as transformers 5 holds it
        for tensor in chain(model.tensors(), (t for key in model.expert_keys for t in model.expert_tensors(key))):
            source = table[tensor.name]
            self._parts.setdefault(source.name, []).append((tensor.name, source))
            self.shapes[source.name] = _whole(tensor.shape, source)
        if model.tied:
            self._parts[HEAD] = self._parts[table["embedding"].name]
            self.shapes[HEAD] = self.shapes[table["embedding"].name]

    def __getitem__(self, name: str) -> Tensor:
        name = self._parts[name][0][1].name  # a tied head is the embedding
        if name in self._held:
            return self._held[name]
        parts = self._parts[name]
        if len(parts) == 1:
            return self._checkpoint.dense(parts[0][0]).view(self.shapes[name])
        out = torch.empty(self.shapes[name], dtype=getattr(torch, self._checkpoint.model.dtype))
        for ours, source in parts:
            if any(isinstance(step, PerHead) for step in source.steps):  # of whose rows there is no view
                out[apply(torch.arange(len(out)), source.steps)] = self._checkpoint.dense(ours)
            else:
                self._checkpoint.read_into(ours, apply(out, source.steps))
        return out

    def hold(self, name: str) -> None:
        """Keep a tensor in RAM from now on."""
        self._held[self._parts[name][0][1].name] = self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _whole(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    """Of the tensor of which `source` cuts a piece of `shape`."""
    for step in reversed(source.steps):
        if isinstance(step, Index):
            shape = (step.of, *shape)
        elif isinstance(step, Transpose):
            shape = shape[::-1]
        elif isinstance(step, Squeeze):
            shape = (*shape[:step.dim], 1, *shape[step.dim:])
        elif not isinstance(step, PerHead):
            assert isinstance(step, Rows | Strided), step
            shape = (step.of if isinstance(step, Rows) else step.step * shape[0], *shape[1:])
    return shape


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
        _check_names(model, self._weights)

    @classmethod
    def open(cls, path: Path, say: Callable[[str], None]) -> Original:
        """UsageError where transformers or accelerate are not installed, CheckpointError as Checkpoint.open."""
        _import(path)
        if is_gguf(path):
            raise UsageError(f"{path}: a GGUF file, which transformers does not compute as it is",
                             "compare with the original checkpoint, as safetensors")
        with ExitStack() as opened:
            checkpoint = opened.enter_context(Checkpoint.open(path, mtp=False))
            found = cls(checkpoint, _skeleton(checkpoint.folder, checkpoint.model), say)
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
        return _largest(self.model) + workspace(self.model, context)

    def least_beside(self, context: int) -> int:
        """Of RAM, where a GPU computes: a module on its way there, and the logits that come back."""
        return _largest(self.model) + scoring(self.model, context) + 32 * MIB

    @property
    def weight_bytes(self) -> int:
        """Of memory, beyond the least, that could hold weights."""
        return self._checkpoint.nbytes

    def plan(self, ram: int, context: int, vram: int = 0, device: torch.device | None = None) -> None:
        """Take so many bytes in all, once the first window is read. device: the GPU that computes, within vram."""
        self._device = device
        self._ram = ram - (workspace(self.model, context) if device is None else self.least_beside(context)
                           - _largest(self.model))
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
            return sum(_nbytes(shape, self.model) for name, shape in self._weights.shapes.items() if chosen(name))

        read, moved = nbytes(lambda name: name not in held), nbytes(lambda name: held.get(name, main) != main)
        if not read and not moved:
            return f"all its weights in {'RAM' if self._device is None else 'VRAM'}"
        each = [f"reads {format_bytes(read)} from the checkpoint"] if read else []
        each += [f"copies {format_bytes(moved)} from RAM to the GPU"] if moved else []
        return f"each window {' and '.join(each)}"

    def _stop_if_cancelled(self, *forward: object) -> None:
        if self._cancel:
            raise Interrupted("cancelled")


def workspace(model: Model, context: int) -> int:
    """Bytes that a window of T tokens takes beside weights, at most: residuals, and one in fp32 for a norm; q, k, v and
    the attention's output; for each choice of a token, its row in and out of an expert, gate and up and what becomes of
    them; the mask; with sinks the scores of all heads, up to six times; a matrix that the CPU's kernels lay
    out anew; a piece of logits, and what scoring makes of it."""
    item, hidden = getattr(torch, model.dtype).itemsize, model.hidden
    inner = max(model.expert_inner, *(mlp.inner for mlp in dense_mlps(model)), 0)
    heads = max(layer.mixer.heads * layer.mixer.head_dim for layer in model.layers
                if isinstance(layer.mixer, Attention))
    chosen = model.top_k * (4 * hidden + 5 * inner)
    token = item * (4 * hidden + chosen + 4 * heads) + 12 * hidden
    matrix = _nbytes((2 * inner, hidden), model)
    scores = 5 + 6 * _sinks(model) * item
    deltas = [_delta_row(layer.mixer) for layer in model.layers if isinstance(layer.mixer, DeltaNet)]
    token += max(deltas, default=0)
    return context * token + scores * context * context + matrix + scoring(model, context) + 32 * MIB


def _delta_row(d: DeltaNet) -> int:
    """Bytes of a token in a gated delta net, in fp32: q, k, v and z; the first three through the convolution; queries
    and keys by value head, with their scaled copies; values; in each chunk of 64 tokens what they are to each other."""
    keys, values = d.value_heads * d.key_dim, d.value_heads * d.value_dim
    return 4 * (5 * channels(d) + 9 * keys + 8 * values + 5 * 64 * d.value_heads)


def scoring(model: Model, context: int) -> int:
    """Bytes of a piece of logits, and of what becomes of it."""
    head = min(context, SCORED_PIECE) * model.vocab * (getattr(torch, model.dtype).itemsize + 4)
    return head + SCORED_ROWS * SCORED_COPIES * model.vocab * 8


@contextmanager
def _gpu_memory_suffices() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise DoesNotFit(f"the reference needs more VRAM than planned: {str(e).splitlines()[0]}",
                         "choose a smaller -c/--ctx-size, give it more --vram, or --device cpu") from None


def _largest(model: Model) -> int:
    """Bytes of the largest part that is brought in at once: a layer, as accelerate plans it, or embedding or head."""
    layers = [sum(prod(t.shape) for t in model.layer_tensors(i))
              + model.experts_in(i) * 3 * model.hidden * model.expert_inner for i in range(model.num_layers)]
    return _nbytes((max(*layers, model.vocab * model.hidden),), model)


def _nbytes(shape: Sequence[int], model: Model) -> int:
    count = getattr(torch, model.dtype).itemsize
    for size in shape:
        count *= size
    return count


def _import(path: Path) -> None:
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


def _skeleton(path: Path, ours: Model) -> Any:
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
                                                 attn_implementation="eager" if _sinks(ours) else "sdpa")
    model.tie_weights()
    return model.eval()


def _sinks(model: Model) -> int:
    """The most heads of a layer with sinks. transformers computes these with "eager" attention alone, which keeps the
    scores of all heads."""
    mixers = [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]
    return max((mixer.heads for mixer in mixers if mixer.sinks), default=0)


def _check_names(model: Any, weights: Weights) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in found.keys() | weights.shapes.keys() if found.get(name) != weights.shapes.get(name))
    if wrong:
        raise QmixError(f"transformers {version('transformers')} has another layout of the model than qmix expects: "
                        f"{wrong[0]}: {found.get(wrong[0])}, want {weights.shapes.get(wrong[0])}",
                        "install the version that constraints.txt names, or name a store as the reference")


def _device_of(device_map: Mapping[str, Any], name: str) -> Any:
    """Of a tensor, the device of the longest module name before it."""
    inside = [module for module in device_map if module == "" or name == module or name.startswith(module + ".")]
    return device_map[max(inside, key=len)]

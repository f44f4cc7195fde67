"""What the sides of offload_peers.py and peers.py share: loading either program, and what the system counted.

Imports nothing that the peer's interpreter may lack. llama.cpp is driven through its C API, as llama-cpp-python
binds it; an option that this version of it does not have is an error, never left out in silence.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def known_options(load: Callable[..., Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `wanted` that are not None and that `load` has; which of them it has not is said."""
    known, given = inspect.signature(load).parameters, {k: v for k, v in wanted.items() if v is not None}
    ignored = [name for name in given if name not in known]
    if ignored:
        say(f"this qmix does not know {', '.join(ignored)}: left out")
    return {name: value for name, value in given.items() if name in known}


class LlamaModel:
    """A GGUF file in llama.cpp. load_mode: "auto" | "none" | "mmap" | "direct_io"; repack: whether weights are
    rearranged at load for the processor, which is faster and keeps a copy; gpu_layers: on the GPU, the others are
    computed by the CPU."""

    def __init__(self, path: str, *, load_mode: str = "auto", repack: bool = True, gpu_layers: int = 0):
        import llama_cpp

        self.ll = ll = llama_cpp
        # Kept: llama.cpp calls it for as long as it runs. Level 4 is errors.
        self._log = ll.llama_log_callback(lambda level, text, data: say(text.decode().strip()) if level == 4 else None)
        ll.llama_log_set(self._log, None)
        options = {"use_extra_bufts": repack, "n_gpu_layers": gpu_layers}
        if hasattr(ll, "LLAMA_LOAD_MODE_AUTO"):
            options["load_mode"] = getattr(ll, f"LLAMA_LOAD_MODE_{load_mode.upper()}")
        elif load_mode in ("none", "mmap"):  # its older binding
            options["use_mmap"] = load_mode == "mmap"
        elif load_mode != "auto":
            raise SystemExit(f"llama.cpp {ll.__version__}: has no load mode {load_mode}")
        self.model = ll.llama_model_load_from_file(path.encode(), _set(ll.llama_model_default_params(), options))
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        self.vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))

    def context(self, tokens: int, threads: int, *, batch: int, ubatch: int, **options: Any) -> LlamaContext:
        return LlamaContext(self, {"n_ctx": tokens, "n_batch": batch, "n_ubatch": ubatch, "n_threads": threads,
                                   "n_threads_batch": threads, **options})


class LlamaContext:
    """A KV cache and its buffers; used from position 0 on."""

    def __init__(self, model: LlamaModel, options: Mapping[str, Any]):
        self._model, self._ll = model, model.ll
        self._context = self._ll.llama_init_from_model(
            model.model, _set(self._ll.llama_context_default_params(), options))
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {options['n_ctx']}")

    def step(self, tokens: Sequence[int], *, every: bool = False) -> Any:
        """Append tokens; a pointer to the logits after the last one. every: of every token, without which the last
        layer's experts compute the last token alone."""
        ll = self._ll
        held = (ll.llama_token * len(tokens))(*tokens)  # the batch only points there: it must outlive the call
        batch = ll.llama_batch_get_one(held, len(tokens))
        wanted = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))
        if every:
            batch.logits = wanted
        code = ll.llama_decode(self._context, batch)
        if code:
            raise SystemExit(f"llama_decode: {code}")
        return ll.llama_get_logits(self._context)

    def best(self, tokens: Sequence[int]) -> int:
        """Append tokens; the likeliest next one."""
        import numpy as np

        return int(np.ctypeslib.as_array(self.step(tokens), (self._model.vocab,)).argmax())

    def clear(self) -> None:
        self._ll.llama_memory_clear(self._ll.llama_get_memory(self._context), True)

    def close(self) -> None:
        self._ll.llama_free(self._context)


def _set(params: Any, options: Mapping[str, Any]) -> Any:
    """`params`, changed; ctypes itself would take any attribute."""
    fields = {field[0] for field in params._fields_}
    for name, value in options.items():
        if name not in fields:
            raise SystemExit(f"this llama.cpp has no option {name}")
        setattr(params, name, value)
    return params


def from_disk() -> int:
    """Bytes that this process had the disk read, mapped pages included."""
    return number("/proc/self/io", r"^read_bytes: (\d+)")


def faults() -> int:
    """Pages waited for so far (majflt, the 12th field; counted behind the name, which may hold blanks)."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[9])


def high_water() -> int:
    """VmHWM of this process, in bytes."""
    return 1024 * number("/proc/self/status", r"VmHWM:\s+(\d+)")


def number(path: str, pattern: str) -> int:
    found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    return int(found[1]) if found else 0

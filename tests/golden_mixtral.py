"""Prints, as JSON, a digest of what Mixtral's bits are: the records that quantizing gives, the logits and the tokens.

    python tests/golden_mixtral.py CHECKPOINT

Run it with ENVIRONMENT: qmix's kernels, torch, oneDNN, MKL and the C library each choose code by the processor, and
ENVIRONMENT fixes all of these choices. What is left are the bits of torch's build and of the C library's functions, of
which `libm` is a digest. They were the same on a Zen 5 with AVX-512 and, under qemu-user, on a Haswell and an EPYC
without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import tempfile
from ctypes import POINTER, byref, c_double, c_float
from pathlib import Path
from typing import Any

import torch

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.engine import Engine, load
from qmix.quantize import quantize_checkpoint
from qmix.store import Store

_WITHOUT = ("AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ", "AVX512CD", "AVX2", "AVX", "FMA", "FMA4")
ENVIRONMENT = {
    "QMIX_NATIVE": "portable", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    # The second name is that of glibc before 2.33.
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=" + ",".join(f"-{name},-{name}_Usable" for name in _WITHOUT),
}
PROMPT = "Once upon a time there was a fox"
DECODED = 32


def build() -> str:
    """What decides bits beside the processor: torch's build. Not the version of Python: its wheels share the code."""
    return torch.__version__


def libm() -> str:
    """Of the functions that the kernels and torch call, a digest of some thousand values."""
    library, found = ctypes.CDLL("libm.so.6"), hashlib.sha256()
    single = [getattr(library, name) for name in ("expf", "tanhf")]
    for f in single:
        f.argtypes, f.restype = [c_float], c_float
    library.exp.argtypes, library.exp.restype = [c_double], c_double
    library.sincos.argtypes, library.sincos.restype = [c_double, POINTER(c_double), POINTER(c_double)], None
    sine, cosine = c_double(), c_double()
    for i in range(2000):
        x = -i * 0.0071
        library.sincos(-7 * x, byref(sine), byref(cosine))
        values = (*(f(x) for f in single), library.exp(x), sine.value, cosine.value)
        found.update(" ".join(value.hex() for value in values).encode())
    return found.hexdigest()[:16]


def records(checkpoint: Path, folder: Path, quant: QuantConfig) -> dict[str, str]:
    """Quantize; digests of all experts' records and of the dense tensors."""
    with Checkpoint.open(checkpoint) as source:
        quantize_checkpoint(source, folder, quant, threads=1)
    with Store.open(folder) as store:
        kinds = {"records": store.manifest.records, "dense": store.manifest.dense}
        return {kind: hashlib.sha256("".join(entry.xxh3 for entry in entries.values()).encode()).hexdigest()[:16]
                for kind, entries in kinds.items()}


def answers(engine: Engine) -> dict[str, Any]:
    """A prompt, then the likeliest token each time; then the same ids again, all of them one by one."""
    ids, session, tokens = engine.tokenizer.encode(PROMPT, limit=256), engine.session(), []
    logits = session.prefill(ids)
    passes = {"prompt": hashlib.sha256(logits.numpy().tobytes()), "decode": hashlib.sha256(),
              "one by one": hashlib.sha256()}
    for _ in range(DECODED):
        tokens.append(int(logits.argmax()))
        logits = session.decode(tokens[-1])
        passes["decode"].update(logits.numpy().tobytes())
    session.trim(0)
    for token in [*ids, *tokens]:
        passes["one by one"].update(session.decode(token).numpy().tobytes())
    return {"logits": {name: found.hexdigest()[:16] for name, found in passes.items()}, "tokens": tokens}


def main(checkpoint: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"torch": build(), "libm": libm()}
        for method in ("rtn", "hqq"):
            found[method] = records(checkpoint, Path(folder, method), QuantConfig(method=method))
        with load(Path(folder, "hqq"), context=256, threads=1) as engine:
            assert engine.kernels["int4"] == "native portable, int8 activations", engine.kernels
            found |= answers(engine)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

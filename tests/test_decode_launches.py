"""What decoding a token gives to a GPU, launch by launch, for Mixtral 8x7B: each is a node of a CUDA graph there.
Nothing is compiled and nothing runs: Triton's launches and torch's copies are written down."""

from __future__ import annotations

import json

from test_cuda import in_another_process, needs_triton
from warm_python import WarmPython

CODE = """
import json, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import jit
from mixtrals import mixtral
from qmix.config import Step
from qmix.device import StandIn
from qmix.formats.packed import TORCH_DTYPES, Packed
from qmix.forward.kv_cache import SessionCache
from qmix.forward.run_graph import DeviceDecode
from qmix.forward.weights import assemble
from qmix.kernels import cuda
from qmix.kernels.configs import Configs
from qmix.kernels.cuda_ops import TritonOps
from qmix.kernels.device_ops import ExpertSlots
from qmix.sizes import MatrixSpec, RecordLayout

L, H, F, V = 2, 4096, 14336, 512
seen = []
jit.JITFunction.run = lambda self, *args, **kwargs: seen.append(self.__name__)
cuda._check_weights = lambda *_: None

class Copies(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "copy_" in str(function):
            seen.append("copy")
        return function(*args, **(kwargs or {}))

class Event:
    def wait(self): pass

class AtOnce(StandIn):
    compute = property(lambda self: self, lambda self, stream: None)

    def run(self, work):
        with Copies():
            work()

    def record(self):
        return Event()

def matrix(rows, cols, format="int8"):
    spec = MatrixSpec(format, rows, cols, *((1, 64, 64) if format == "int4" else ()))
    return Packed.of(spec, {t.name: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in spec.tensors})

class Experts:
    def __init__(self, resident, ops):
        record = RecordLayout(MatrixSpec("int4", 2 * F, H, 2, 64, 64), MatrixSpec("int4", H, F, 1, 64, 64))
        slab = torch.empty(2 * record.nbytes + 64, dtype=torch.uint8)
        slab = slab[-slab.data_ptr() % 64:][:2 * record.nbytes].view(2, -1)
        self.resident, self._ops, self._slots = resident, ops, ExpertSlots(slab, record, ())
        self._table = torch.zeros(8, dtype=torch.int32)

    def begin(self, layer, routed):
        return lambda: self._ops.experts(routed.x, self._slots, routed.ids, self._table, routed.rows)

    def refresh(self, layer): pass
    def launched(self, layer): pass
    def lacking(self, layer, routed): return False
    def finish(self, layer, routed, step): pass
    def count(self, layer, ids, weights, step): pass

def token(resident, dense):
    config = mixtral(V, H, F, L, 32, 8, 128, 8, 2, 1e6, 1e-5, 32768)
    wanted = {t.name: t for t in config.tensors()}

    def read(name):
        t = wanted[name]
        if t.role in ("linear", "head"):
            return matrix(*t.shape, dense if t.role == "linear" else "int8")
        return torch.empty(t.shape, dtype=torch.bfloat16)

    weights = assemble(config, torch.bfloat16, read, torch.device("cpu"))  # q, k and v become one matrix
    assert len(weights.stacks) == L
    ops = TritonOps(Configs())
    # All resident: the router's guesses serve nobody.
    decode = DeviceDecode(config, weights, AtOnce(), ops, Experts(resident, ops), 1 - resident, 2 * (1 - resident))
    seen.clear()
    decode(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64),
           [SessionCache(config, 256, torch.bfloat16)], Step("decode", (0,)))
    return list(seen)

print(json.dumps({f"{dense} {resident}": token(resident, dense) for dense in ("int8", "int4") for resident in (0, 1)}))
"""
START = ["copy", "embed", "rope_cos_sin"]
HEAD = ["norm", "gemv", "copy"]
EXPERTS = ["jobs", "gemv", "finish", "gemv", "finish"]


@needs_triton
def test_launches_of_a_token(warm_python: WarmPython) -> None:
    """Two layers, of which only the first has a later one to guess for: it takes no launch more."""
    done = in_another_process(warm_python, CODE)
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for dense, product in (("int8", ["gemv"]), ("int4", ["gemv", "finish"])):
        attention = ["norm", *product, "attend", "merge", *product, "logits", "choose"]
        assert found[f"{dense} 0"] == START + [*attention, "copy", *EXPERTS] * 2 + HEAD
        assert found[f"{dense} 1"] == START + [*attention, *EXPERTS] * 2 + [*HEAD, "copy", "copy"]

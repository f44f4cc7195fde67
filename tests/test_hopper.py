"""On Hopper no product of Triton's reads an operand from registers, however it is cut: ptxas before CUDA 13.3 may use
those registers again while the product still reads them. Seen in the PTX that Triton makes for compute capability 9.0,
with its specialization of the arguments; nothing is assembled and nothing runs."""

from __future__ import annotations

from pathlib import Path

from test_cuda import in_another_process, needs_triton
from warm_python import WarmPython

from qmix.kernels.attend import attend_torch
from qmix.kernels.configs import BUILT_IN
from qmix.kernels.cuda_prompt import choose_prompt_attention

SETUP = """
import re
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver, jit
from qmix.errors import UsageError
from qmix.kernels import cuda, cuda_grouped, cuda_prompt, tuning
from qmix.kernels.configs import WGMMA_TOKENS, built_in

class Hopper:
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    map_python_to_cpp_type = staticmethod(lambda kind: kind)

driver.set_active(Hopper())
CUDABackend.make_cubin = lambda *_, **__: b""
real, made = jit.JITFunction.run, []

def compile_only(self, *args, grid, warmup, **kwargs):
    made.append(real(self, *args, grid=grid, warmup=True, **kwargs).asm["ptx"])

jit.JITFunction.run = compile_only
cuda_prompt.capability = cuda_grouped.capability = lambda _: (9, 0)
cuda._check_weights = lambda *_: None
cuda.dot_of = lambda jit, x, dot=None: jit.tl.float16 if x.dtype == torch.float16 else jit.tl.bfloat16

def products(ptx):
    "Of WGMMA: how many take their first operand from registers, from shared memory."
    after = re.findall(r"wgmma\\.mma_async[^{]*{[^}]*},\\s*(.)", ptx)
    return after.count("{"), after.count("%")

def attend(config, query=torch.bfloat16, cache=torch.bfloat16):
    keys = torch.empty(2, 700, 64, dtype=cache)[:, :600]
    cuda_prompt.attend_many(torch.empty(512, 8, 64, dtype=query), keys, keys, config=config)
    return products(made[-1])
"""

ATTENTION = """
assert attend(built_in((9, 0)).attention) == (0, 0) and "mma.sync" in made[-1]
done = refused = 0
for config in tuning.candidates("attention"):
    try:
        assert attend(config) == (0, 0), config
        done += 1
    except UsageError as e:
        assert "on Hopper, where larger ones may give wrong numbers" in str(e)
        refused += 1
assert attend(built_in((9, 0)).attention, torch.float32) == (0, 0)
assert done >= 2 and refused >= 2
cuda_prompt.capability = lambda _: None  # what is refused has what this looks for
assert attend(built_in((8, 0)).attention)[0] > 0
"""

MATMUL = """
from qmix.formats.packed import TORCH_DTYPES, Packed
from qmix.kernels.cuda import Matrices
from qmix.kernels.device_ops import ExpertSlots
from qmix.sizes import CARRIED, MatrixSpec, RecordLayout, with_layout

def spec_of(name, rows, parts=1):
    how = with_layout(name) if name in CARRIED else {"format": name, "group_size": 64, "block": 64}
    return MatrixSpec(rows=rows, cols=512, parts=parts, **how)

def matmul(config, dtype, name="int4"):
    spec = spec_of(name, 512)
    m = Packed.of(spec, {t.name: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in spec.tensors})
    y = torch.empty(512, spec.padded_rows, dtype=dtype)
    cuda.many(torch.empty(512, 512, dtype=dtype), Matrices.of(m), 0, y, config=config)
    return products(made[-1])

cuts = [*tuning.candidates("matmul"), built_in((9, 0)).matmul]
for config in {(c.tokens, c.rows, c.warps): c for c in cuts}.values():  # of those with other stages the last
    registers, shared = matmul(config, torch.bfloat16)
    assert not registers and (shared or config.tokens < WGMMA_TOKENS), config
assert matmul(built_in((9, 0)).matmul, torch.float16, "int3")[0] == 0
assert matmul(built_in((9, 0)).matmul, torch.float32)[0] == 0  # rounded to bf16

def experts(config, size, name="int4"):
    "Both products of a prompt's experts."
    record = RecordLayout(spec_of(name, 1024, 2), spec_of(name, 512))
    slots, ops = ExpertSlots(torch.empty(2, record.nbytes, dtype=torch.uint8), record, ()), \
        cuda_grouped.TritonPromptExperts(config)
    x, table = torch.empty(512, 512, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    tiles = ops.sort(torch.zeros(512, 2, dtype=torch.int64), 2, size)
    inner = ops.gate_up(x, slots, tiles, range(2), table)
    first = products(made[-1])
    ops.down(inner, slots, tiles, range(2), table, torch.empty(512, 2, 512))
    return [first, products(made[-1])]

own = built_in((9, 0)).matmul
wanted = [(own, 128, "int4"), (own, 64, "int4"), (own, 128, "int3"), (own, 128, "q5_k"), (own, 64, "q6_k"),
          (own, 128, "iq4_nl")]
for config, size, name in (*wanted, *((c, min(c.tokens, 128), "int4") for c in cuts[:3])):
    for registers, shared in experts(config, size, name):
        assert not registers and (shared or size < WGMMA_TOKENS), (config, size, name)
for name in ("q8_0", "q4_k"):
    registers, shared = matmul(own, torch.bfloat16, name)
    assert shared and not registers, name
print("right")
"""


@needs_triton
def test_no_product_reads_registers(tmp_path: Path, warm_python: WarmPython) -> None:
    done = in_another_process(warm_python, SETUP + ATTENTION + MATMUL, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout == "right\n", done.stderr[-2000:]


def test_torch_attends_on_hopper_and_without_tensor_cores() -> None:
    for card, configs in BUILT_IN.items():
        assert (choose_prompt_attention(card, configs.attention) is attend_torch) == (card in ((7, 5), (9, 0)))
    assert choose_prompt_attention(None, BUILT_IN[8, 0].attention) is not attend_torch

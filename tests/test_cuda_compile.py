"""The device code of cuda_ops.py and cuda_prompt.py compiles to machine code for cards that are not here, with Triton's
own assembler; and what the source promises about threads and registers holds in what it is compiled to."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cuda import in_another_process, needs_triton

COMPILE = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qmix.kernels import cuda_attend_jit, cuda_dense_jit, cuda_layer_jit, cuda_ops
from qmix.kernels.configs import WIDE, built_in

target = int(sys.argv[1])
configs = built_in(divmod(target, 10))
HALF = "*bf16" if target >= 80 else "*fp16"  # of a cache
KINDS = {"scale": "*bf16", "x": "*fp32", "y": "*fp32", "weight": "*fp32", "weights": "*fp32", "eps": "fp32",
         "tokens": "*i64", "embedding": "*bf16", "positions": "*i64", "keys": HALF, "values": HALF, "out": "*fp32",
         "routers": "*fp64", "ids": "*i32", **dict.fromkeys(("residual", "rows", "gains", "normed", "qkv", "inverse",
         "query", "cos_sin", "partial", "tops", "totals"), "*fp32")}

def compiled(function, kinds=(), warps=4, stages=1, **constants):
    kinds = KINDS | dict(kinds)
    names = function.arg_names
    kinds = {a: "constexpr" if a in constants else kinds.get(a, "i32") for a in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names) if kinds[a].startswith("*") or
               a not in constants and (a in ("cols", "width", "size", "half", "hidden") or a.endswith("_stride") or
                                       a[:2] in ("k_", "v_", "q_"))}
    source = ASTSource(function, kinds, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)

def varying(function):
    return {p.name for p in function.params if p.do_not_specialize}

def spills(done):
    return ".local" in done.asm["ptx"]

# gemv: no data moves between threads before the end, and the order of sums does not depend on the number of tokens.
for kind in ("*i8", HALF):
    orders = set()
    for tokens in (1, 8):
        done = compiled(cuda_dense_jit.gemv, {"weight": kind, "tokens": "i32"}, M=tokens, ROWS=configs.dense.rows,
                        COLS=configs.dense.cols, UNROLL=configs.dense.unroll, SCALED=kind == "*i8", ADD=True)
        code = done.asm["ttgir"]
        assert "convert_layout" not in code.split("scf.for")[1].split("scf.yield")[0]
        assert re.search(r"ld.global[^;]*v[24]", done.asm["ptx"])
        orders.add(re.findall("#blocked = .*", code)[0])
    assert len(orders) == 1, orders
compiled(cuda_layer_jit.embed, SIZE=cuda_ops.PIECE)
compiled(cuda_layer_jit.norm, warps=8, K=2, WIDTH=4096)
router = {"logits": "*fp32", "router": "*fp64", "ahead": "*i32", "more_ids": "*i32", "more_gains": "*fp32"}
assert not spills(compiled(cuda_layer_jit.logits, router, warps=8, WIDTH=4096))
for guesses, more in ((2, False), (0, True)):
    compiled(cuda_layer_jit.choose, router, warps=1, K=2, GUESSES=guesses, EXPERTS=8, MORE=more)
for kernel in (cuda_layer_jit.keep, cuda_layer_jit.rope_cos_sin):
    assert "cos.approx" not in compiled(kernel, warps=2, WIDTH=64).asm["ptx"]
ints = dict.fromkeys(("ids", "table", "slots", "rows", "places"), "*i32") | {"tokens": "i32"}
for pairs in (True, False):
    compiled(cuda_layer_jit.jobs, ints, warps=1, M=4, PAIRS=pairs)
for group, warps in ((4, 4), (8, 8)):
    for rope, int8 in ((True, False), (False, False), (True, True)):
        kinds = {"scale": "fp32", "key_scales": "*fp32", "value_scales": "*fp32"} | (
            {"keys": "*i8", "values": "*i8"} if int8 else {})
        assert not spills(compiled(cuda_attend_jit.attend, kinds, warps, GROUP=group, SPLIT=64, STEP=16, WIDTH=128,
                                   ROPE=rope, INT8=int8))
compiled(cuda_attend_jit.merge, SPLIT=64, SPLITS=128, STEP=16, WIDTH=128)
assert varying(cuda_attend_jit.attend_many) == {"window", "tokens", "past"}  # vary by prompt
tile = configs.attention
floats = {"query": HALF, "out": HALF, "scale": "fp32", "tokens": "i32"}
many = compiled(cuda_attend_jit.attend_many, floats, tile.warps, tile.stages, BLOCK_M=tile.tokens,
                BLOCK_N=tile.positions, WIDTH=128)
assert many.metadata.shared <= (64 if target < 80 else 99) * 1024, many.metadata.shared
compiled(cuda_attend_jit.attend_many, floats | {"keys": "*fp32", "values": "*fp32"}, WIDE.warps, WIDE.stages,
         BLOCK_M=WIDE.tokens, BLOCK_N=WIDE.positions, WIDTH=128)
# Triton makes a constant of each argument that is 1.
compiled(cuda_dense_jit.gemv, {"weight": "*i8"}, M=1, ROWS=8, COLS=64, UNROLL=4, SCALED=True, ADD=False, tokens=1,
         cols=1)
compiled(cuda_layer_jit.norm, K=1, WIDTH=1, hidden=1, gains_stride=1, rows_rank=1)
compiled(cuda_layer_jit.logits, router, WIDTH=1, experts=1, hidden=1, n_stride=1)
compiled(cuda_layer_jit.choose, router, warps=1, K=1, GUESSES=1, EXPERTS=1, MORE=True, experts=1, gains_stride=1,
         ids_stride=1, ahead_token=1, ahead_layer=1)
compiled(cuda_layer_jit.keep, WIDTH=64, queries=1, kv_heads=1, half=1, k_position=1)
compiled(cuda_layer_jit.jobs, ints, M=1, PAIRS=True, tokens=1, k=1, ids_stride=1, count=1, first=1)
compiled(cuda_attend_jit.attend, {"scale": "fp32", "key_scales": HALF, "value_scales": HALF}, GROUP=1, SPLIT=64,
         STEP=16, WIDTH=128, ROPE=True, INT8=False, window=1, splits=1)
compiled(cuda_attend_jit.merge, SPLIT=64, SPLITS=1, STEP=16, WIDTH=128, window=1, splits=1)
compiled(cuda_attend_jit.attend_many, floats, BLOCK_M=16, BLOCK_N=32, WIDTH=128, group=1)
print("compiled", many.asm["ptx"].count("mma"))
"""


@needs_triton
@pytest.mark.parametrize("target", [75, 86, 90])
def test_it_compiles_for_cards(target: int, tmp_path: Path) -> None:
    """Attention of prompts uses tensor cores from sm_80 up; for sm_75 Triton has none to give."""
    (tmp_path / "c.py").write_text(COMPILE)
    code = f"import sys; sys.argv[1:] = ['{target}']\n" \
        f"exec(compile(open({str(tmp_path / 'c.py')!r}).read(), {str(tmp_path / 'c.py')!r}, 'exec'))"
    done = in_another_process(code, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.stdout.startswith("compiled"), done.stderr[-2000:]
    assert (int(done.stdout.split()[1]) > 0) == (target >= 80)

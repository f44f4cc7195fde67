"""Whether a kernel's rows are independent: drafts are exact only where a row has the bits that it has alone.

Plain, nf4 and fp4 products of few rows are made row by row and need no check; the packed ones of grouped formats and
int8 are compared, once, where drafts are asked for.
"""

from __future__ import annotations

import torch

from qmix.config import GROUPED_BITS
from qmix.formats import grouped, int8, mxfp4
from qmix.formats.packed import Packed
from qmix.kernels.cpu import FEW
from qmix.kernels.table import PUBLISHED, KernelTable, random_matrix
from qmix.sizes import CARRIED, MX_BLOCK, MX_GROUP, MatrixSpec

ROWS, COLS = 384, 1024


def bound_formats(table: KernelTable) -> list[str]:
    """The formats of `table` whose rows depend on their company, for 2 to 8 rows of bf16 and fp32."""
    found = []
    for (name, block), kernel in table.kernels.items():
        if name not in (*GROUPED_BITS, "int8", *PUBLISHED) or name in found:
            continue
        m = _random(name, block)
        x = torch.randn(FEW, m.spec.cols, generator=torch.Generator().manual_seed(2))
        for rows in (x, x.bfloat16()):
            alone = torch.cat([kernel(row.clone(), m) for row in rows.split(1)])
            if not all(torch.equal(kernel(rows[:count].clone(), m), alone[:count]) for count in range(2, FEW + 1)):
                found.append(name)
                break
    return found


def _random(name: str, block: int) -> Packed:
    random = torch.Generator().manual_seed(3)
    if name in CARRIED:
        return random_matrix(name, block)
    if name == "int8":
        return int8.pack(torch.randn(ROWS, COLS, generator=random), MatrixSpec("int8", ROWS, COLS))
    if name == "mxfp4":
        spec = MatrixSpec(name, ROWS, COLS, group_size=MX_GROUP, block=MX_BLOCK)
        return mxfp4.pack(torch.randn(ROWS, COLS, generator=random), spec)
    spec = MatrixSpec(name, ROWS, COLS, group_size=64, block=block)
    q = torch.randint(0, 2**spec.bits, (ROWS, COLS), dtype=torch.uint8, generator=random)
    scale, zero = torch.randn(2, ROWS, COLS // 64, generator=random).bfloat16()
    return grouped.pack(q, scale, zero, spec)

"""Where the records of a model's experts lie in memory, in a table that the library reads: so a layer's router and
experts are calls of one Sequence, and the interpreter is entered where a record is missing.

T tokens, H hidden, F expert inner, L layers, E experts, K chosen per token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from qmix.formats.packed import Packed
from qmix.kernels.native import jobs
from qmix.kernels.native.products import layout_of

_RECORD, _KIND = ctypes.sizeof(ctypes.c_int64), ctypes.sizeof(ctypes.c_int32)


class ExpertTable:
    """The addresses of L * E records. kinds: of each kind of record, (a slot with one, its w13, its w2): all records of
    a kind are laid out alike. What is entered must stay where it is, whole, until it is taken out."""

    def __init__(self, layers: int, experts: int, kinds: Sequence[tuple[Tensor, Packed, Packed]]):
        self._experts = experts
        self._records = (ctypes.c_int64 * (layers * experts))()  # 0: not in memory
        self._kinds = (ctypes.c_int32 * (layers * experts))()
        self._records_at, self._kinds_at = ctypes.addressof(self._records), ctypes.addressof(self._kinds)
        packed = b"".join(_matrix(slot, m) for slot, *matrices in kinds for m in matrices)
        self._layouts = ctypes.create_string_buffer(packed, len(packed))
        self._layouts_at = ctypes.addressof(self._layouts)
        w13, w2 = kinds[0][1:]
        self.hidden, self.inner = w2.spec.rows, w13.spec.rows // 2

    def enter(self, layer: int, expert: int, slot: Tensor, kind: int = 0) -> None:
        """The record is in `slot`, whole."""
        self._kinds[layer * self._experts + expert] = kind
        self._records[layer * self._experts + expert] = slot.data_ptr()

    def leave(self, layer: int, expert: int) -> None:
        """Its slot is about to be filled with something else."""
        self._records[layer * self._experts + expert] = 0

    def job(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, between: Tensor, rows: Tensor,
            out: Tensor) -> bytes:
        """native.h's qmix_experts: out [T, H] = the weighted sum of the experts ids [T, K] int64 of x [T, H] fp32 or
        bf16 by topk_weights [T, K]; between [T * K, F] and rows [T, K, H] are memory for what is computed on the way.
        fp32 but for x and ids; all contiguous, and kept as long as the job, as this table is."""
        first = layer * self._experts
        return jobs.EXPERTS.pack(
            self._records_at + first * _RECORD, self._kinds_at + first * _KIND, self._layouts_at, x.data_ptr(),
            ids.data_ptr(), topk_weights.data_ptr(), between.data_ptr(), rows.data_ptr(), out.data_ptr(), ids.shape[1],
            self.hidden, self.inner, jobs.TYPES[x.dtype])


def _matrix(slot: Tensor, m: Packed) -> bytes:
    """native.h's qmix_matrix of a matrix in a slot."""
    of, start, end = layout_of(m), slot.data_ptr(), slot.data_ptr() + slot.nbytes
    addresses = (of.weight, of.params, of.bias, *of.up[:2])
    places = [address for address in addresses if address]
    assert start <= min(places) and max(places) < end, "the matrix lies elsewhere"
    weight, params, bias, *up = (address - start if address else 0 for address in addresses)
    return jobs.MATRIX.pack(weight, params, bias, *of.sizes, *of.layout, *of.activation, *up, *of.up[2:])

"""The kernels that a store needs."""

from __future__ import annotations

from collections.abc import Callable

from qmix.config import DTYPES, QuantConfig
from qmix.kernels.table import KernelTable, select
from qmix.spec import Model
from qmix.store import Store


def select_kernels(model: Model, quant: QuantConfig, say: Callable[[str], None],
                   activations: str = "auto") -> KernelTable:
    """The kernels for the formats that this store uses."""
    return select(*stored_formats(model, quant), say=say, activations=activations)


def stored_formats(model: Model, quant: QuantConfig) -> tuple[set[str], set[int]]:
    """(formats of a store's matrices, blocks of the grouped ones)."""
    plain = DTYPES[model.dtype]
    formats = {plain if f == "keep" else f for f in quant.formats} | {plain}
    return formats, {quant.block} if quant.grouped else set()


def native_throughout(store: Store, kernels: KernelTable) -> bool:
    """Whether the native kernels compute all large matrices. Then torch gets one thread while decoding: its own
    second one, after an operation of microseconds, spins for milliseconds on the core that the native one needs (19
    tok/s instead of 26 with two cores)."""
    quant, native = store.quant, kernels.native
    return native is not None and quant.formats <= set(native.formats) and \
        not store.model.tied

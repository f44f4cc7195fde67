"""qmix's own CPU kernels, in C: products with packed weights, for one token up to many, attention of one
token over a KV cache of bf16 or int8, and norm, router and rotary embedding of a few tokens.

The library holds the same kernels for several instruction sets ("levels") and runs the best that this processor has.
Without it (no C compiler when qmix was installed, a build that failed) torch's packed products do the work, and
`trouble` says why.

Activations are either rounded to 8 bits ("int8": one step for each token and group of columns, products summed exactly
in integers; the fastest) or to bf16 ("bf16"). Results and sums are fp32. The bits of a row of the result do not depend
on how many rows are computed together, nor on the number of threads.
"""

from qmix.kernels.native.attention import HEAD_UNIT, Attention, KVLayer
from qmix.kernels.native.layer import NativeLayerOps
from qmix.kernels.native.loader import build_report, levels, library, trouble, wanted_levels
from qmix.kernels.native.products import DENSE_GROUP, FORMATS, NativeProducts, Product, as_seen
from qmix.kernels.native.sequence import CallSequence

__all__ = [
    "DENSE_GROUP", "FORMATS", "HEAD_UNIT", "Attention", "CallSequence", "KVLayer", "NativeLayerOps", "NativeProducts",
    "Product", "as_seen", "build_report", "levels", "library", "trouble", "wanted_levels",
]

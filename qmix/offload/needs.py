"""What a model takes, in bytes, wherever it runs: dense weights, KV cache, workspace and records.

plan.py divides the budgets of the memories by it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

from qmix.config import DTYPES, QuantConfig
from qmix.errors import UsageError
from qmix.kernels.configs import Gemv
from qmix.kernels.kv_size import kv_bytes, placed_bytes, taps_bytes
from qmix.offload.device_needs import scratch_bytes
from qmix.offload.workspace import scoring_bytes, workspace_bytes
from qmix.sizes import KV_FORMATS, dense_bytes, kv_owners, record_layouts
from qmix.spec import Model

DEFAULT_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a model takes wherever it runs; records: how many of `record` bytes each, or in a mixed store on
    average, where kinds has (records, bytes of one) for each kind; kv_cache: how keys and values are kept, one of
    sizes.KV_FORMATS; decoded: what an int8 cache takes of a GPU besides, whose prompts decode all heads at once;
    embedding: bytes of `dense` of which a token reads one row, or, of a multi-token-prediction head, nothing; tiles:
    what a GPU takes besides for the experts of a prompt, which it computes many at a time; placed: what recurrent
    states take there besides; scratch: what decoded weights, partial sums and the buffers of decoding take there
    (device_needs.py), with the kernels cut as is built in. mtp: of the records, those of such a head, which is none of
    the `layers`."""

    context: int
    dense: int
    kv: int
    workspace: int
    record: int
    records: int
    layers: int
    top_k: int
    kv_cache: str = "bf16"
    kinds: tuple[tuple[int, int], ...] = ()
    scoring: bool = False
    decoded: int = 0
    embedding: int = 0
    tiles: int = 0
    placed: int = 0
    scratch: int = 0
    mtp: int = 0

    @classmethod
    def of(cls, model: Model, quant: QuantConfig, context: int, kv: str = "bf16",
           scoring: bool = False) -> Needs:
        """scoring: the workspace also holds what reading logits after every token takes. UsageError for a `kv` that
        there is not."""
        if kv not in KV_FORMATS:
            raise UsageError(f"--kv-cache {kv}: want " + " or ".join(KV_FORMATS))
        itemsize = compute_bytes(model, quant)
        keys, layouts = model.expert_keys, record_layouts(model, quant)
        counts = Counter(map(quant.kind_of, keys))
        kinds = tuple((counts[i], layout.nbytes) for i, layout in enumerate(layouts))
        mean = -(-sum(count * nbytes for count, nbytes in kinds) // len(keys))
        apart = any("+" in w13 for w13, _ in quant.kinds)
        bare, grouped = (workspace_bytes(model, context, itemsize, kv, how, apart) for how in (False, True))
        workspace = bare + (scoring_bytes(model, context) if scoring else 0)
        return cls(context, resident_dense_bytes(model, quant), kv_bytes(model, context, itemsize, kv),
                   workspace, mean, len(keys), len(model.record_layers), model.top_k, kv,
                   kinds if len(kinds) > 1 else (), scoring,
                   2 * context * widest_kv(model) * itemsize if kv == "int8" else 0, unread_bytes(model, quant),
                   grouped - bare, placed_bytes(model), scratch_bytes(model, quant, context, itemsize, scoring),
                   len(keys) - len(model.trunk.expert_keys))

    @property
    def on_device(self) -> Needs:
        """What a GPU has to hold: also tiles and scratch, the heads of an int8 cache that prompts decode, and places
        of recurrent states."""
        workspace = self.workspace + self.scratch + self.decoded + self.tiles
        return replace(self, kv=self.kv + self.placed, workspace=workspace)

    def with_kernels(self, model: Model, quant: QuantConfig, gemv: Gemv) -> Needs:
        """Where the kernels of few tokens are cut otherwise than is built in."""
        return replace(self, scratch=scratch_bytes(model, quant, self.context, compute_bytes(model, quant),
                                                    self.scoring, gemv))

    @property
    def by_kind(self) -> tuple[tuple[int, int], ...]:
        """(records, bytes of one) of each kind."""
        return self.kinds or ((self.records, self.record),)

    @property
    def least(self) -> tuple[int, ...]:
        """Slots of each kind: what one layer of a token uses, and as much again on its way for the next."""
        return tuple(min(count, 2 * self.top_k) for count, _ in self.by_kind)

    @property
    def least_bytes(self) -> int:
        return sum(count * nbytes for count, (_, nbytes) in zip(self.least, self.by_kind, strict=True))

    @property
    def expert_bytes(self) -> int:
        """Of all records."""
        return sum(count * nbytes for count, nbytes in self.by_kind)

    @property
    def least_slots(self) -> int:
        return sum(self.least)


def choose_context(model: Model, asked: int) -> int:
    """0 asks for the default: min(model, 8192)."""
    return min(model.max_positions, DEFAULT_CONTEXT) if asked == 0 else asked


def compute_bytes(model: Model, quant: QuantConfig) -> int:
    """Of a number of the compute dtype (forward.weights.compute_dtype): of activations, keys and values."""
    return 4 if quant.unrounded and DTYPES[model.dtype] != "bf16" else 2


def resident_dense_bytes(model: Model, quant: QuantConfig) -> int:
    """Dense weights as they lie in memory: norms in fp32, the rest as stored, and convolutions in fp32 besides."""
    stored = sum(4 * prod(t.shape) if t.role == "norm" else dense_bytes(model, quant, t) for t in model.tensors())
    return stored + taps_bytes(model)


def unread_bytes(model: Model, quant: QuantConfig) -> int:
    """Of the embedding, of which a token reads one row, none where it is the head too; and of a multi-token-prediction
    head."""
    embedding = next(t for t in model.tensors() if t.role == "embedding")
    head = resident_dense_bytes(model, quant) - resident_dense_bytes(model.trunk, quant)
    return head + (0 if model.tied else dense_bytes(model, quant, embedding))


def widest_kv(model: Model) -> int:
    """Numbers of the keys of a position in the layer that has most."""
    return max((a.kv_heads * a.head_dim for a in kv_owners(model)), default=0)

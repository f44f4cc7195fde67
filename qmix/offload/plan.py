"""What goes where, in integers, before anything is loaded.

A budget is a promise about the whole process. What the process holds before it loads anything (interpreter and
libraries), the dense weights, the KV cache, the workspace of one prefill pass and a reserve come first. The rest is
slots for expert records. What does not fit is refused with the numbers.

With a GPU the fast tier is VRAM: it holds dense weights, KV cache and workspace, and RAM holds, apart from the program,
only slots. If RAM has room for all records it holds them all, those in VRAM too: a record that leaves VRAM is then in
RAM already, and nothing is ever copied down. Otherwise the two tiers hold different records: a record in VRAM needs
no slot in RAM, and a record that leaves VRAM is copied down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from qmix.config import DTYPES, QuantConfig
from qmix.errors import DoesNotFit, UsageError
from qmix.kernels import prompt_tiles
from qmix.kernels.configs import Gemv
from qmix.kernels.kv_size import channels, kv_bytes, placed_bytes, recurrent_bytes, taps_bytes
from qmix.offload.device_needs import scratch_bytes
from qmix.sizes import (
    GIB,
    KV_FORMATS,
    KV_PIECE,
    MIB,
    MTP_PENDING,
    dense_bytes,
    format_bytes,
    kv_owners,
    pass_tokens,
    record_layouts,
)
from qmix.spec import Attention, DeltaNet, Mlp, Model, Moe

DEFAULT_CONTEXT = 8192
ATTENTION_BLOCK = 512  # query positions of one attention call
SCORED_PIECE = 512  # rows of logits that are made together where every token's are read
SCORED_ROWS = 16  # of them, how many are looked at in fp64 at a time
SCORED_COPIES = 6  # of those rows: log-probabilities, probabilities, products, of two models
EXPERT_CHUNK = 512  # tokens that one expert computes at a time
MARGIN = GIB  # what `auto` leaves to other programs
UNMEASURED = 384 * MIB  # of a GPU's memory, for code, graphs and libraries, until measured: an H200 had 306 MiB there
RESERVE = 256 * MIB  # kept free within the budget, or 2 % of it where that is more
PROGRAM = 260 * MIB  # interpreter and libraries, where they are not there to be measured
CUDA_CONTEXT = 600 * MIB  # what a CUDA context with its libraries takes, before it is measured
STAGING = 2  # RAM slots through which records pass on their way from the disk to VRAM


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
        workspace = workspace_bytes(model, context, itemsize, kv) + (scoring_bytes(model, context) if scoring else 0)
        return cls(context, resident_dense_bytes(model, quant), kv_bytes(model, context, itemsize, kv),
                   workspace, mean, len(keys), len(model.record_layers), model.top_k, kv,
                   kinds if len(kinds) > 1 else (), scoring,
                   2 * context * widest_kv(model) * itemsize if kv == "int8" else 0, unread_bytes(model, quant),
                   workspace_bytes(model, context, itemsize, kv, True) - workspace_bytes(model, context, itemsize, kv),
                   placed_bytes(model), scratch_bytes(model, quant, context, itemsize, scoring),
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


@dataclass(frozen=True, slots=True)
class TierPlan:
    """One memory: `budget` bytes, of which `base` are taken before anything is loaded. fixed: what is not slots;
    kinds: (slots, bytes of one) of each kind of record; beside: of a GPU's reserve, what is for code, graphs and
    libraries, which torch does not count."""

    name: str
    budget: int
    base: int
    dense: int
    kv: int
    workspace: int
    reserve: int
    kinds: tuple[tuple[int, int], ...]
    beside: int = 0

    @property
    def slots(self) -> int:
        return sum(count for count, _ in self.kinds)

    @property
    def fixed(self) -> int:
        return self.base + self.dense + self.kv + self.workspace + self.reserve

    @property
    def experts(self) -> int:
        return sum(count * nbytes for count, nbytes in self.kinds)

    @property
    def total(self) -> int:
        """Never more than the budget."""
        return self.fixed + self.experts

    def parts(self) -> list[tuple[str, int]]:
        """(what, bytes), zeros left out."""
        parts = [("program", self.base), ("dense", self.dense), ("KV cache", self.kv), ("workspace", self.workspace),
                 ("reserve", self.reserve), ("expert slots", self.experts)]
        return [(name, nbytes) for name, nbytes in parts if nbytes]


@dataclass(frozen=True, slots=True)
class Plan:
    """tiers: fastest first, RAM always, VRAM where there is a GPU."""

    needs: Needs
    tiers: tuple[TierPlan, ...]

    @property
    def context(self) -> int:
        return self.needs.context

    @property
    def ram(self) -> TierPlan:
        return self.tiers[-1]

    @property
    def slots(self) -> int:
        """Different records held in some memory."""
        return sum(self.held)

    @property
    def held(self) -> tuple[int, ...]:
        """`slots`, of each kind."""
        staging = STAGING if len(self.tiers) > 1 else 0
        return tuple(min(count, max(self.ram.kinds[i][0], sum(tier.kinds[i][0] for tier in self.tiers) - staging))
                     for i, (count, _) in enumerate(self.needs.by_kind))

    @property
    def inclusive(self) -> bool:
        """Whether RAM holds what VRAM holds too, so that nothing is copied down."""
        return len(self.tiers) > 1 and any(
            slots >= count > fast for (slots, _), (fast, _), (count, _) in zip(
                self.ram.kinds, self.tiers[0].kinds, self.needs.by_kind, strict=True))

    @property
    def resident(self) -> bool:
        """Whether nothing is read from the disk once everything is loaded."""
        return self.slots >= self.needs.records

    @property
    def on_disk(self) -> int:
        """Bytes of the records that are nowhere else."""
        return sum((count - held) * nbytes for (count, nbytes), held in zip(self.needs.by_kind, self.held, strict=True))

    def lines(self) -> list[str]:
        """What `chat` and `generate` print: a line per memory, one on the experts, a warning where it is tight."""
        found = [f"{tier.name} {format_bytes(tier.total - tier.reserve)} of {format_bytes(tier.budget)}: " + ", ".join(
            f"{name} {format_bytes(nbytes)}" for name, nbytes in tier.parts() if name != "reserve")
            + (f" ({self.context} tokens)" if tier.kv else "") for tier in self.tiers]
        needs = self.needs
        if self.resident:
            whole = ", all of them in RAM" if self.inclusive else ""
            return [*found, f"experts: all {needs.records} resident{whole}"]
        layers = needs.layers + (needs.mtp > 0)
        per_layer = self.slots / layers
        found.append(f"experts: {self.slots} of {needs.records} in memory ({100 * self.slots // needs.records} %, "
                     f"{per_layer:.1f} of {needs.records // layers} a layer), "
                     f"{format_bytes(self.on_disk)} read from disk as needed")
        if per_layer < 2 * needs.top_k:
            found.append(f"warning: fewer than {2 * needs.top_k} slots a layer: most tokens will wait for the disk; "
                         "more --ram or a smaller -c/--ctx-size helps")
        return found


def margin_of(available: int, asked: int | None) -> int:
    """Bytes of the `available` ones that stay free for other programs: as asked, or MARGIN, but no more than an
    eighth."""
    return min(MARGIN, available // 8) if asked is None else asked


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


def dense_mlps(model: Model) -> list[Mlp]:
    """The MLPs that are not records."""
    found: list[Mlp] = []
    for i, layer in enumerate(model.layers):
        if isinstance(layer.mlp, Moe):
            found += [mlp for mlp in (layer.mlp.shared, layer.mlp.beside and layer.mlp.beside[0]) if mlp is not None]
        elif not model.experts_in(i):
            found.append(layer.mlp)
    return found


def workspace_bytes(model: Model, context: int, itemsize: int, kv: str = "bf16", grouped: bool = False) -> int:
    """What one prefill pass holds at its widest: per token the fp32 residual, the normed states, the [K, H]
    fp32 rows of expert outputs with their sum and one addend; for a chunk of tokens one expert's operand, inner
    activations and result, or for a block queries, keys and values in fp32 and in the compute dtype, the
    attention mask and the scores of its heads; two rows of logits. With an int8 KV cache also the keys and values
    of one head in the compute dtype, and in fp32 a piece of them or the new ones three times over.

    The native kernels have fp32 inner activations and packed ones, at most 4 bytes a number, instead of torch's
    four inner tensors of a chunk. grouped: a GPU computes many experts at a time instead, see prompt_tiles."""
    tokens = min(context, pass_tokens(model))
    hidden, k = model.hidden, model.top_k
    inner = max(model.expert_inner, *(mlp.inner for mlp in dense_mlps(model)), 0)
    mixers = [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]
    heads = max((a.heads * (1 + a.output_gate) + 2 * a.kv_heads) * a.head_dim for a in mixers)
    per_token = (4 + itemsize) * hidden + (k + 2) * hidden * 4
    block = min(tokens, ATTENTION_BLOCK) * (heads * (4 + itemsize) + context * (1 + itemsize) + hidden * itemsize)
    chunk = min(tokens, EXPERT_CHUNK) * (4 * inner * itemsize + hidden * (2 * itemsize + 4))
    for delta in {layer.mixer for layer in model.layers if isinstance(layer.mixer, DeltaNet)}:
        block = max(block, delta_bytes(delta, min(tokens, ATTENTION_BLOCK), itemsize))
    if kv == "int8":
        new = min(tokens, ATTENTION_BLOCK) * max(a.kv_heads for a in mixers)
        block += max(a.head_dim for a in mixers) * (2 * context * itemsize + 4 * 3 * max(min(context, KV_PIECE), new))
    if grouped:
        chunk = max(chunk, prompt_tiles.workspace(tokens * k, model.num_experts, model.expert_inner, itemsize))
    if model.mtp_head is not None:  # hidden states of a pass, before and behind the last norm, and those that wait
        per_token += 3 * 4 * hidden
        block += 4 * (3 * hidden * min(tokens, ATTENTION_BLOCK) + hidden * MTP_PENDING)
    return tokens * per_token + max(block, chunk) + model.vocab * 8


def delta_bytes(d: DeltaNet, tokens: int, itemsize: int) -> int:
    """What a gated delta net takes for a block of a prompt: q, k and v as projected, side by side, with the past,
    summed and activated; queries and keys once for each value head, and a product with them; z, the values read, their
    norm and gate; and three states on their way."""
    keys, values = d.value_heads * d.key_dim, d.value_heads * d.value_dim
    row = channels(d) * (itemsize + 4 * 4) + 3 * 4 * keys + values * (itemsize + 5 * 4)
    return tokens * row + 3 * recurrent_bytes(d)


def scoring_bytes(model: Model, context: int) -> int:
    """What logits after every token of a context take: the residuals of all, and of one piece the normed rows and the
    logits, as the head gives them and in fp32. Whoever scores them has a few rows in fp64 besides."""
    rows = min(context, SCORED_PIECE)
    looked_at = SCORED_ROWS * SCORED_COPIES * 8
    return (context * 4 + rows * 8) * model.hidden + (rows * 8 + looked_at) * model.vocab


def plan(needs: Needs, ram: int, base: int, vram: int | None = None, vram_base: int = CUDA_CONTEXT,
         pin: int | None = None, vram_beside: int | None = None) -> Plan:
    """Place a model within `ram` bytes for the whole process, `base` of them taken already, and, where there is a
    GPU, `vram` bytes of it, vram_base of them taken. pin: bytes of RAM that may be page-locked, None for all.
    vram_beside: what is known of memory that torch does not count there, as it was measured or UNMEASURED; half of the
    reserve is for it, or this where it is more. DoesNotFit (exit 3) says how much is missing, and where."""
    all_of_them = [count for count, _ in needs.by_kind]
    if vram is None:
        return Plan(needs, (_tier("RAM", needs, ram, base, needs.least, all_of_them),))
    half = max(RESERVE, vram // 50) // 2
    fast = _tier("VRAM", needs.on_device, vram, vram_base, needs.least, all_of_them, beside=max(half, vram_beside or 0))
    return Plan(needs, (fast, _below(needs, fast, ram, base, pin)))


def _below(needs: Needs, fast: TierPlan, ram: int, base: int, pin: int | None) -> TierPlan:
    """RAM below VRAM: slots for all records of each kind of which VRAM does not have all, where that fits and can be
    page-locked; else for those that VRAM lacks. Copies from memory that is not page-locked take several times as long,
    so a small RAM tier that is page-locked beats a large one that is not."""
    kinds = list(zip(needs.by_kind, fast.kinds, strict=True))
    whole = [count if slots < count else STAGING for (count, _), (slots, _) in kinds]
    rest = [count - slots + STAGING for (count, _), (slots, _) in kinds]
    taken = sum(slots * nbytes for slots, ((_, nbytes), _) in zip(whole, kinds, strict=True))
    least = [STAGING] * len(kinds)
    found = _tier("RAM", needs, ram, base, least, whole, dense=False)
    if found.experts == taken and (pin is None or taken <= pin):
        return found
    return _tier("RAM", needs, ram, base, least, rest, dense=False)


def _tier(name: str, needs: Needs, budget: int, base: int, least: Sequence[int], most: Sequence[int],
          dense: bool = True, beside: int = 0) -> TierPlan:
    reserve = max(RESERVE, budget // 50)
    if beside:
        reserve += beside - reserve // 2
    fixed = (needs.dense, needs.kv, needs.workspace) if dense else (0, 0, 0)
    room = budget - base - reserve - sum(fixed)
    sizes = [nbytes for _, nbytes in needs.by_kind]
    short = sum(count * nbytes for count, nbytes in zip(least, sizes, strict=True)) - room
    if short > 0:
        raise DoesNotFit(
            f"needs {format_bytes(budget + short)} of {name}, has {format_bytes(budget)}: short of "
            f"{format_bytes(short)} (program {format_bytes(base)}, dense {format_bytes(fixed[0])}, KV cache "
            f"{format_bytes(fixed[1])} for {needs.context} tokens, workspace {format_bytes(fixed[2])}, reserve "
            f"{format_bytes(reserve)}, and {sum(least)} expert slots of {_sizes(sizes)} at least)",
            f"give it more --{name.lower()}, choose a smaller -c/--ctx-size, close other programs, or quantize "
            "to fewer bits")
    slots = _share_out(room, sizes, least, most)
    return TierPlan(name, budget, base, *fixed, reserve, tuple(zip(slots, sizes, strict=True)), beside)


def _share_out(room: int, sizes: Sequence[int], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Slots of each kind within `room` bytes: of each the same share of what it may have, as far as that goes."""
    if len(sizes) == 1:
        return [min(most[0], room // sizes[0])]
    slots = list(least)
    left = room - sum(count * nbytes for count, nbytes in zip(slots, sizes, strict=True))
    while open_kinds := [i for i, nbytes in enumerate(sizes) if slots[i] < most[i] and nbytes <= left]:
        kind = min(open_kinds, key=lambda i: slots[i] / most[i])
        slots[kind] += 1
        left -= sizes[kind]
    return slots


def _sizes(sizes: Sequence[int]) -> str:
    return " or ".join(map(format_bytes, sorted(set(sizes))))

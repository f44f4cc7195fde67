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

from collections.abc import Sequence
from dataclasses import dataclass

from qmix.errors import DoesNotFit
from qmix.offload.needs import Needs
from qmix.sizes import GIB, MIB, format_bytes

MARGIN = GIB  # what `auto` leaves to other programs
UNMEASURED = 384 * MIB  # of a GPU's memory, for code, graphs and libraries, until measured: an H200 had 306 MiB there
RESERVE = 256 * MIB  # kept free within the budget, or 2 % of it where that is more
PROGRAM = 260 * MIB  # interpreter and libraries, where they are not there to be measured
CUDA_CONTEXT = 600 * MIB  # what a CUDA context with its libraries takes, before it is measured
STAGING = 2  # RAM slots through which records pass on their way from the disk to VRAM


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

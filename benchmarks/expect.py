"""README's table of what to expect on which PC: `qmix plan` for Mixtral 8x7B in int4, on described machines.

    python benchmarks/expect.py [--write README.md]

These are forecasts from bandwidths and sizes, at uniform routing, the worst case for a cache; not measurements. The
machines' bandwidths are assumptions that stand in the table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmix.commands.plan import report as planning
from qmix.config import QuantConfig
from qmix.kernels.trials import MIXTRAL_8X7B
from qmix.models import read_model
from qmix.sizes import GIB

MIXTRAL = read_model(MIXTRAL_8X7B)
NOTE = ("With a GPU, the experts that VRAM lacks are divided between the bus and the CPU: at worst the two share the",
        "bandwidth of the RAM. The forecast counts bytes, not the launches and waits of each layer.")
BEGIN, END = "<!-- expect -->\n", "<!-- end of expect -->\n"


@dataclass(frozen=True, slots=True)
class Card:
    """vram: GiB that qmix may use; bandwidths of its memory and of the bus, as copies reach it, in GB/s."""

    vram: int
    vram_speed: float
    pcie: float


@dataclass(frozen=True, slots=True)
class Pc:
    """ram: GiB that qmix may use; bandwidths of RAM and disk in GB/s; card: None for a PC without a GPU."""

    name: str
    ram: int
    ram_speed: float
    disk: float
    card: Card | None = None


GPU_12, GPU_24 = Card(11, 360, 25), Card(23, 936, 25)
PCS = (
    Pc("laptop with 16 GB of RAM", 13, 40, 3),
    Pc("PC with 24 GB", 20, 40, 3),
    Pc("PC with 32 GB", 28, 40, 3),
    Pc("PC with 64 GB of DDR5", 56, 75, 5),
    Pc("PC with 24 GB, GPU with 12 GB", 20, 40, 3, GPU_12),
    Pc("PC with 32 GB, GPU with 12 GB", 28, 40, 3, GPU_12),
    Pc("PC with 32 GB, GPU with 24 GB", 28, 40, 3, GPU_24),
    Pc("PC with 64 GB of DDR5, GPU with 24 GB", 56, 75, 5, GPU_24),
)


def forecast(pc: Pc, planned: planning.Planned | None = None) -> dict[str, Any]:
    """All that `qmix plan` says there, of Mixtral where no model is given."""
    machine = planning.Machine(ram=pc.ram * GIB, ram_speed=pc.ram_speed, disk=pc.disk)
    if pc.card is not None:
        machine = replace(machine, vram=pc.card.vram * GIB, vram_speed=pc.card.vram_speed, pcie=pc.card.pcie)
    planned = planned or planning.Planned("Mixtral 8x7B", MIXTRAL, QuantConfig(), {})
    return planning.describe(planned, 0, machine, None, lambda line: None)


def table() -> str:
    """Markdown, with what has to be known of it."""
    rows = ["| PC | RAM, VRAM for qmix | assumed RAM, disk (PCIe, VRAM) | experts in memory | forecast | limited by |",
            "|---|---|---|---|---|---|"]
    for pc in PCS:
        found, card = forecast(pc), pc.card
        least, most = found["tokens_per_second"]
        speed = f"{least:.2g} to {most:.2g}" if f"{least:.2g}" != f"{most:.2g}" else f"{most:.2g}"
        memory = f"{pc.ram} GiB" + (f", {card.vram} GiB" if card else "")
        bandwidths = f"{pc.ram_speed:g}, {pc.disk:g}" + (f" ({card.pcie:g}, {card.vram_speed:g})" if card else "")
        rows.append(f"| {pc.name} | {memory} | {bandwidths} GB/s | {found['in_memory']} of "
                    f"{found['records']} | {speed} tok/s | {found['limited_by']} |")
    return "\n".join([*rows, "", *NOTE]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table in that file")
    args = parser.parse_args()
    if args.write is None:
        print(table(), end="")
        return
    before, _, rest = args.write.read_text(encoding="utf-8").partition(BEGIN)
    args.write.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()

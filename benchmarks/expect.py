"""README's table of what to expect on which PC: `qmix plan` for Mixtral 8x7B in int4, on described machines.

    python benchmarks/expect.py [--write README.md]

These are forecasts from bandwidths and sizes, at uniform routing, the worst case for a cache; not measurements. The
machines' bandwidths are assumptions that stand in the table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from qmix import planning
from qmix.config import ModelConfig, QuantConfig
from qmix.sizes import GIB

MIXTRAL = ModelConfig(32000, 4096, 14336, 32, 32, 8, 128, 8, 2, 1e6, 1e-5, 32768)
BEGIN, END = "<!-- expect -->\n", "<!-- end of expect -->\n"


@dataclass(frozen=True, slots=True)
class Pc:
    """ram: GiB that qmix may use; bandwidths of RAM and disk in GB/s."""

    name: str
    ram: int
    ram_speed: float
    disk: float


PCS = (
    Pc("laptop with 16 GB of RAM", 13, 40, 3),
    Pc("PC with 24 GB", 20, 40, 3),
    Pc("PC with 32 GB", 28, 40, 3),
    Pc("PC with 64 GB of DDR5", 56, 75, 5),
)


def table() -> str:
    """Markdown."""
    model = planning.Model("Mixtral 8x7B", MIXTRAL, QuantConfig(), {})
    rows = ["| PC, without a GPU | memory for qmix | assumed RAM, disk | experts in memory | forecast | limited by |",
            "|---|---|---|---|---|---|"]
    for pc in PCS:
        machine = planning.Machine(ram=pc.ram * GIB, ram_speed=pc.ram_speed, disk=pc.disk)
        found = planning.describe(model, 0, machine, None, lambda line: None)
        least, most = found["tokens_per_second"]
        speed = f"{least:.2g} to {most:.2g}" if f"{least:.2g}" != f"{most:.2g}" else f"{most:.2g}"
        rows.append(f"| {pc.name} | {pc.ram} GiB | {pc.ram_speed:g}, {pc.disk:g} GB/s | {found['in_memory']} of "
                    f"{found['records']} | {speed} tok/s | {found['limited_by']} |")
    return "\n".join(rows) + "\n"


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

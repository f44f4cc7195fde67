"""docs/models.md: each model that qmix knows, whether it runs, its memory, and what `qmix plan` forecasts.

    python benchmarks/models_table.py [--write docs/models.md]

Nothing here is measured: parameters and memory follow from config.json, speeds from them and from bandwidths.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import expect
from published import PUBLISHED

from qmix.commands.plan import report as planning
from qmix.config import QuantConfig
from qmix.errors import DoesNotFit
from qmix.forward.lower_device import not_on_device
from qmix.models import published_experts, read_model
from qmix.offload.needs import Needs
from qmix.sizes import format_bytes

PCS = {pc.name: pc for pc in expect.PCS if pc.name in (
    "PC with 32 GB", "PC with 64 GB of DDR5", "PC with 32 GB, GPU with 12 GB")}
HEAD = """# Models

Written by `benchmarks/models_table.py`; the tests compare. An architecture that runs has, in the tests, the numbers
of transformers in fp32 on random small models, and the same bits however few of its experts are in memory; `make
test-models` adds every format. None of these models' published weights has been run by these tests: they are too
large for them.

**Memory** is that of all weights, experts with 4.5 bits a weight (int4, groups of 64, as `qmix quantize` does by
default; gpt-oss's as they are published, MXFP4 with 4.25) and the rest in int8; the KV cache comes on top. **Speeds**
are `qmix plan`'s forecasts of decoding at uniform routing, the worst case for a cache: from bytes and the bandwidths
below, without the launches and waits of a GPU, which count for much where experts are small. A model that runs on the
CPU only has the CPU's speed everywhere. `qmix plan CONFIG.JSON` makes these forecasts for your machine.
"""


def quant_of(raw: dict[str, Any]) -> QuantConfig:
    """As `qmix quantize` chooses by default, with MXFP4 kept where the model is published in it."""
    if raw["model_type"] == "gpt_oss":
        raw = {**raw, "quantization_config": {"quant_method": "mxfp4"}}
    kept = published_experts(raw)
    return QuantConfig() if kept is None else QuantConfig(kept, method="", group_size=0, block=0)


def speed(name: str, raw: dict[str, Any], pc: expect.Pc) -> str:
    model = read_model(raw)
    try:
        found = expect.forecast(replace(pc, card=None) if not_on_device(model) else pc,
                                planning.Planned(name, model, quant_of(raw), {}))
    except DoesNotFit:
        return "does not fit"
    least, most = (f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}" for rate in found["tokens_per_second"])
    return least if least == most else f"{least} to {most}"


def rows() -> list[str]:
    found = []
    for name, (raw, count) in PUBLISHED.items():
        model = read_model(raw)
        needs = Needs.of(model, quant_of(raw), 1)
        where = "CPU and GPU" if not not_on_device(model) else "CPU"
        found.append(f"| {name} | `{raw['model_type']}` | {count / 1e9:.1f} | {where} | "
                     f"{format_bytes(needs.dense + needs.expert_bytes)} | "
                     + " | ".join(speed(name, raw, pc) for pc in PCS.values()) + " |")
    return found


def page() -> str:
    machines = [f"- {name}: {pc.ram} GiB of RAM for qmix at {pc.ram_speed:g} GB/s, disk {pc.disk:g} GB/s" + (
        f", {pc.card.vram} GiB of VRAM at {pc.card.vram_speed:g} GB/s, PCIe {pc.card.pcie:g} GB/s" if pc.card else "")
        for name, pc in PCS.items()]
    names = " | ".join(f"{name}, tok/s" for name in PCS)
    head = f"| model | model_type | 10^9 parameters | runs on | memory | {names} |"
    return "\n".join([HEAD, *machines, "", head, "|---" * (5 + len(PCS)) + "|", *rows(), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="instead of printing it")
    args = parser.parse_args()
    if args.write is None:
        print(page(), end="")
    else:
        args.write.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

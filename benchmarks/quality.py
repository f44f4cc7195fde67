"""docs/quality.md's tables: every format and method on one model, against the model unquantized.

    python benchmarks/quality.py CHECKPOINT TEXT CALIBRATION --work FOLDER [--write docs/quality.md]

Each row is two commands, `qmix quantize` and `qmix eval --against`, printed as they run. TEXT is held out: it must not
be what CALIBRATION holds. Everything is made from an fp32 copy of the checkpoint, so that the reference computes in
fp32 and has no rounding of its own. Stores and results stay in the work folder, and a second run takes over what is
there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from safetensors.torch import load_file, save_file

ACTIVATIONS = "bf16"  # so that the figures are those of the weights; the last table has what int8 activations add


@dataclass(frozen=True)
class Row:
    """A store and how it is called. flags: of qmix quantize; text: whether these want the calibration's."""

    table: str
    name: str
    flags: tuple[str, ...]
    text: bool = False
    activations: str = ACTIVATIONS


def rows() -> list[Row]:
    found = [Row("experts", "unquantized", ("--format", "keep", "--dense", "keep")),
             Row("experts", "int8", ("--format", "int8", "--dense", "keep"))]
    for bits, groups in ((4, (32, 64, 128)), (3, (32, 64)), (2, (32, 64))):
        for group in groups:
            for method in ("rtn", "hqq", "gptq") if bits == 4 or group == 64 else ("hqq", "gptq"):
                flags = ("--format", f"int{bits}", "--group-size", str(group), "--method", method, "--dense", "keep")
                found.append(Row("experts", f"int{bits} g{group} {method}", flags, method == "gptq"))
    for name in ("nf4", "fp4"):
        found.append(Row("experts", name, ("--format", name, "--dense", "keep")))
    found.append(Row("experts", "nf4 double", ("--format", "nf4", "--double-quant", "--dense", "keep")))
    for method, sizes in (("hqq", ("4.0", "3.5")), ("gptq", ("4.5", "4.0", "3.7", "3.5", "3.3"))):
        for bits in sizes:
            flags = ("--bpw", bits, "--method", method, "--sensitivity", "full", "--dense", "keep")
            found.append(Row("mixed", f"mixed {bits} {method}", flags, True))
    found += [Row("measured", f"measured {how}, {bits}", ("--bpw", bits, "--method", "hqq", "--sensitivity", how,
                                                          "--dense", "keep"), True)
              for bits in ("3.0", "3.5", "4.0") for how in ("full", "sampled")]
    for dense in ("keep", "bf16", "int8", "int4"):
        found.append(Row("dense", f"dense {dense}", ("--format", "int4", "--method", "gptq", "--dense", dense), True))
    found += [Row("activations", f"int4 g64 gptq, {name} activations",
                  ("--format", "int4", "--method", "gptq", "--dense", "keep"), True, name)
              for name in ("bf16", "auto")]  # auto: int8 where the native kernels run
    return found


def run(*command: object) -> str:
    print("$ " + shlex.join(map(str, command)), file=sys.stderr, flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *map(str, command)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"exit {done.returncode}")
    print(f"  {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return done.stdout


def widen(source: Path, out: Path) -> None:
    """The checkpoint with the same weights in fp32."""
    if out.exists():
        return
    draft = out.with_suffix(".partial")
    draft.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            save_file({name: t.float() for name, t in load_file(path).items()}, draft / path.name, {"format": "pt"})
        elif path.is_file():
            shutil.copy(path, draft)
    config = json.loads((draft / "config.json").read_text())
    config.pop("dtype", None)
    (draft / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    draft.rename(out)


def measure(row: Row, args: argparse.Namespace, text: Path) -> dict:
    """What qmix eval and qmix show say of the row's store, which is made where it is not there."""
    store = args.work / "-".join(flag.lstrip("-") for flag in row.flags if flag != "--format").replace(" ", "-")
    if not store.exists():
        calibration = ("--calibration", args.calibration) if row.text else ()
        run("qmix", "quantize", args.work / "fp32", store, *row.flags, *calibration)
    reference = args.work / "keep-dense-keep"
    against = () if store == reference else ("--against", reference)
    result = json.loads(run("qmix", "eval", store, "-f", text, "-c", args.window, "--activations", row.activations,
                            "-t", args.threads, "--json", *against))
    about = json.loads(run("qmix", "show", store, "--json"))
    experts = about["classes"][0]
    return {"table": row.table, "name": row.name, "bits": experts["bits_per_weight"], "bytes": about["bytes"],
            "perplexity": result["perplexity"], "kl_mean": result.get("kl_mean"), "kl_p99": result.get("kl_p99"),
            "top1": result.get("top1"), "tokens": result["tokens"]}


def cells(found: dict) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [found["name"], number(found["bits"], ".2f"), f"{found['bytes'] / 2**20:.1f}",
            number(found["perplexity"], ".3f"), number(found["kl_mean"], ".5f"), number(found["kl_p99"], ".4f"),
            number(found["top1"] and 100 * found["top1"], ".2f")]


def table(found: list[dict]) -> str:
    head = ["store", "bits a weight, experts", "MiB", "perplexity", "KL, mean", "KL, 99 %", "top-1 %"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells(one)) + " |" for one in found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the stores")
    parser.add_argument("--chars", type=int, default=300_000, help="of the text, from its start")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="of qmix eval")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--write", type=Path, help="a document whose tables are replaced, between its markers")
    args = parser.parse_args()
    if args.only and args.write:
        parser.error("--only with --write would leave tables with holes")
    args.work.mkdir(parents=True, exist_ok=True)
    widen(args.checkpoint, args.work / "fp32")
    text = args.work / "text.txt"
    text.write_text(args.text.read_text(encoding="utf-8")[:args.chars], encoding="utf-8")
    found = [measure(row, args, text) for row in rows() if args.only in row.name or row.name == "unquantized"]
    (args.work / "results.json").write_text(json.dumps(found, indent=1))
    tables = {name: table([one for one in found if one["table"] == name])
              for name in dict.fromkeys(one["table"] for one in found)}
    for name, text_of in tables.items():
        print(f"\n{name}\n\n{text_of}")
    if args.write:
        document = args.write.read_text(encoding="utf-8")
        for name, text_of in tables.items():
            begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            before, found_begin, rest = document.partition(begin)
            _, found_end, after = rest.partition(end)
            if not found_begin or not found_end:
                sys.exit(f"{args.write}: no {begin} ... {end}")
            measured = f"Measured {date.today()} on {found[0]['tokens']} tokens."
            document = f"{before}{begin}\n\n{measured}\n\n{text_of}\n\n{end}{after}"
        args.write.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()

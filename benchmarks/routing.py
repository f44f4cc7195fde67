"""The tables of docs/routing.md, from `qmix stats -f` itself; with --write, put between its markers.

    python benchmarks/routing.py STORE -f c4.txt -f wikitext2-test.txt -f pride_and_prejudice.txt -f sherlock.txt \\
        -f shakespeare.txt --write docs/routing.md

STORE is a small trained Mixtral of 29 M parameters, quantized by `qmix quantize` as it comes. --plots FOLDER also
draws the two pictures of the document there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

from qmix.analysis import plots, report
from qmix.render import table

Document = dict[str, Any]

# Jiang et al. 2024, table 5, in %: first choice, then first or second choice, at layers 0, 15 and 31.
PAPER = (("ArXiv", 14.0, 27.9, 22.7, 46.5, 62.3, 52.9), ("DM Mathematics", 14.1, 28.4, 19.7, 44.9, 67.0, 44.5),
         ("Github", 14.9, 28.1, 19.7, 49.9, 66.9, 49.2), ("Gutenberg", 13.9, 26.1, 26.3, 49.5, 63.1, 52.2),
         ("PhilPapers", 13.6, 25.3, 22.1, 46.9, 61.9, 51.3), ("PubMed Abstracts", 14.2, 24.6, 22.0, 48.6, 61.6, 51.8),
         ("StackExchange", 13.6, 27.2, 23.6, 48.2, 64.6, 53.6), ("Wikipedia (en)", 14.4, 23.6, 25.3, 49.8, 62.1, 51.8))


def shown(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def by_layer(found: Document, value: Callable[[Document], str]) -> str:
    """A row for each text, a column for each layer."""
    return table([{"text": text["text"], **{f"layer {row['layer']}": value(row) for row in text["by_layer"]}}
                  for text in found["texts"]], "md")


def paper(found: Document) -> str:
    """Table 5: the range over the paper's eight texts, and over ours at our first, middle and last layer."""
    rows = []
    for name, at, metric, chance in (("first choice", 1, "repeat_first", "repeat_first"),
                                     ("first or second choice", 4, "repeat_any", "repeat_any")):
        layers = (0, found["layers"] // 2, found["layers"] - 1)
        row: Document = {"repeats, %": name, "chance": shown(found["chance"][chance])}
        for position, (theirs, ours) in enumerate(zip((0, 15, 31), layers, strict=True)):
            known = [line[at + position] for line in PAPER]
            here = [100 * text["by_layer"][ours][metric] for text in found["texts"]]
            row |= {f"8x7B layer {theirs}": f"{min(known):.1f} to {max(known):.1f}",
                    f"ours layer {ours}": f"{min(here):.1f} to {max(here):.1f}"}
        rows.append(row)
    return table(rows, "md")


def balance(found: Document) -> str:
    """A row for each layer: the largest share, imbalance, variation, entropy and pairing, lowest to highest text."""
    rows = []
    for layer in range(found["layers"]):
        at = [text["by_layer"][layer] for text in found["texts"]]
        row: Document = {"layer": layer}
        for name, values, digits in (("largest share, %", [100 * max(r["share"]) for r in at], 1),
                                     ("max/mean", [r["imbalance"] for r in at], 2),
                                     ("cv", [r["variation"] for r in at], 2),
                                     ("entropy, bits", [r["entropy"] for r in at], 2),
                                     ("pairing, %", [100 * r["pairing"] for r in at], 0)):
            row[name] = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        row["text to text, %"] = f"{100 * fmean(distances(at)):.0f}"
        rows.append(row)
    return table(rows, "md")


def distances(at: Sequence[Document]) -> list[float]:
    """Between the shares of every two texts: half the sum of differences, 0 where they are alike, 1 where disjoint."""
    found = [sum(abs(x - y) for x, y in zip(a["share"], b["share"], strict=True)) / 2
             for i, a in enumerate(at) for b in at[:i]]
    assert len(found) == comb(len(at), 2)
    return found


def lookahead(found: Document) -> str:
    """A row for each source, the mean over the texts by layer."""
    return table([{"guessed by": name, **{f"layer {layer}": shown(fmean(
        text["by_layer"][layer]["recall"][source] for text in found["texts"])) for layer in range(1, found["layers"])}}
        for source, name in (("ahead", "the layer's router asked early"), ("transitions", "transitions so far"),
                             ("popular", "the most used so far"))], "md")


def caches(found: Document) -> str:
    rows = report.slot_rows(found, found["texts"])
    return table([{name: f"{value:.2f}" if "MB/" in name or "misses" in name else f"{value:.0f}" if name == "slots"
                   else f"{value:.1f}" for name, value in row.items()} for row in rows], "md")


def commands(texts: Sequence[Path], tokens: int, window: int) -> str:
    files = " ".join(f"-f {path.name}" for path in texts)
    return f"    qmix stats STORE {files} -c {window} -n {tokens} --plot routing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("-f", "--file", type=Path, action="append", required=True, dest="texts")
    parser.add_argument("-n", "--tokens", type=int, default=20224)
    parser.add_argument("-c", "--window", type=int, default=256)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace what stands between this file's markers")
    parser.add_argument("--plots", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if len(args.texts) < 2:
        parser.error("want two texts or more, to compare")
    files = [part for path in args.texts for part in ("-f", str(path))]
    done = subprocess.run([sys.executable, "-m", "qmix", "stats", str(args.store), *files, "-c", str(args.window), "-n",
                           str(args.tokens), "-t", "1", "--json"], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    if found["chosen"] != 2:
        parser.error(f"{args.store}: chooses {found['chosen']} experts a token; the document is about 2")
    parts = {"command": commands(args.texts, args.tokens, args.window), "paper": paper(found),
             "first": by_layer(found, lambda row: shown(row["repeat_first"])),
             "any": by_layer(found, lambda row: shown(row["repeat_any"])), "balance": balance(found),
             "lookahead": lookahead(found), "caches": caches(found)}
    if args.plots:
        layers = sorted({0, found["layers"] // 2, found["layers"] - 1})
        (args.plots / "routing-shares.svg").write_text(plots.shares(found, layers), encoding="utf-8")
        (args.plots / "routing-hits.svg").write_text(plots.hits(found), encoding="utf-8")
    if not args.write:
        print("\n\n".join(f"{name}:\n\n{part}" for name, part in parts.items()))
        return
    text = args.write.read_text(encoding="utf-8")
    for name, part in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(mark.findall(text)) != 1:
            parser.error(f"{args.write}: want one <!-- {name} --> with its <!-- end -->")
        text = mark.sub(lambda match, part=part: f"{match[1]}\n{part}\n\n{match[2]}", text)
    args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

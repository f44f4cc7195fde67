"""What rounding activations to 8 bits costs, beside what quantizing the weights cost: KL divergence per token.

    python benchmarks/activations.py KEEP STORE [STORE ...] -f TEXT --tokens 8192

KEEP is the same model with `--format keep --dense keep`. Each store runs over the same windows of TEXT, every token
given, with bf16 and with int8 activations; the figures are over all positions. KL in nats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qmix.config import Cancel, Step
from qmix.engine import load


def log_probabilities(store: Path, activations: str, windows: list[list[int]]) -> Iterator[Tensor]:
    """log softmax [T, V] of each window, each from an empty context."""
    with load(store, activations=activations, context=len(windows[0]), say=lambda line: None) as engine:
        model = engine._model  # all logits of a prompt: the engine itself gives only the last
        for ids in windows:
            logits = model.forward(torch.tensor(ids), torch.arange(len(ids)), [model.new_cache(len(ids))],
                                   Step("prefill", (0,) * len(ids), Cancel()), all_logits=True)
            yield logits.double().log_softmax(-1)


def compare(reference: list[Tensor], found: Iterator[Tensor]) -> tuple[float, float, float]:
    """(mean KL, its 99th percentile, share of positions where the likeliest token is the same)."""
    kl, same = [], 0
    for p, q in zip(reference, found, strict=True):
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return statistics.fmean(kl), sorted(kl)[int(0.99 * len(kl))], same / len(kl)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keep", type=Path)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("-f", "--file", type=Path, required=True, help="text, best none the model was trained on")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=256)
    args = parser.parse_args()
    with load(args.keep, context=args.window, say=lambda line: None) as engine:
        ids = engine.tokenizer.encode(args.file.read_text(encoding="utf-8"))[:args.tokens]
    windows = [ids[i:i + args.window] for i in range(0, len(ids) - args.window + 1, args.window)]
    if not windows:
        parser.error(f"{args.file}: {len(ids)} tokens, want at least {args.window}")
    print(f"{len(windows)} windows of {args.window} tokens", file=sys.stderr)
    exact = list(log_probabilities(args.keep, "auto", windows))
    print("| store | compared | mean KL | p99 | same top token |\n| --- | --- | --- | --- | --- |")
    for store in args.stores:
        bf16 = list(log_probabilities(store, "bf16", windows))
        rows = [("weights: bf16 activations against keep", compare(exact, iter(bf16))),
                ("weights and activations: int8 against keep",
                 compare(exact, log_probabilities(store, "int8", windows))),
                ("activations: int8 against bf16", compare(bf16, log_probabilities(store, "int8", windows)))]
        for what, (mean, tail, top) in rows:
            print(f"| {store.name} | {what} | {mean:.6f} | {tail:.5f} | {100 * top:.2f} % |")


if __name__ == "__main__":
    main()

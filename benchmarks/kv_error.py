"""What an int8 KV cache does to the model's predictions: the KL divergence of each next-token distribution from the one
with a bf16 cache, and how often the likeliest token is the same.

    python benchmarks/kv_error.py STORE TEXT [--tokens 4096] [--window 1024] [--reference STORE] [--floor]

Teacher-forced: the text's own tokens go in whatever the model would have said, in windows that each start from an
empty context, 8 tokens a pass as decoding has them, so that every logit comes from attention over the cache as it is
kept. --reference, the same model in another store (such as one quantized with --format keep --dense keep), is compared
likewise: the error of the weights, to hold the cache's error against. --floor does so with torch's attention over the
bf16 cache, which computes the same but for the rounding of its sums: what any change of the last bits does to this
model, whose routers turn some of them into other experts.

The log-probabilities of the bf16 run stay in memory: tokens x vocabulary x 4 bytes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qmix.engine import load
from qmix.forward.kv_cache import SessionCache

PASS = 8  # tokens of one pass, the most that are computed one by one


def log_probabilities(store: Path, kv: str, text: str, args: argparse.Namespace,
                      torchs: bool = False) -> tuple[Tensor, Tensor]:
    """(fp32 [T, V] after each token, the ids [T] that follow), T the last of a window left out. torchs: torch attends
    where the native kernel would, over a cache in the compute dtype."""
    found, following = [], []
    with load(store, threads=args.threads, context=args.window, activations=args.activations, kv=kv,
              say=print) as engine:
        if torchs:
            engine._model._eager._make_cache = SessionCache
        ids = engine.tokenizer.encode(text)
        if len(ids) < args.tokens:
            raise SystemExit(f"the text has {len(ids)} tokens: want --tokens {len(ids)} or fewer")
        for start in range(0, args.tokens, args.window):
            window = ids[start:min(args.tokens, start + args.window)]
            session = engine.session()
            for first in range(0, len(window), PASS):
                logits = session.verify(window[first:first + PASS])
                session.trim(session.length)  # all of them stay
                found.append(logits[:len(window) - 1 - first].log_softmax(-1))
            following.append(torch.tensor(window[1:]))
            del session  # its cache, before the next one
    return torch.cat(found), torch.cat(following)


def divergences(want: Tensor, got: Tensor) -> Tensor:
    """KL(want || got) of each row, fp64 [T], in nats."""
    parts: Iterator[Tensor] = (
        (p.double().exp() * (p.double() - q.double())).sum(-1)
        for p, q in zip(want.split(256), got.split(256), strict=True))
    return torch.cat(list(parts))


def compare(name: str, want: Tensor, got: Tensor, following: Tensor) -> None:
    kl = divergences(want, got)
    same = (want.argmax(-1) == got.argmax(-1)).double().mean()
    print(f"{name:<34} KL mean {kl.mean():.2e}, median {kl.median():.2e}, p99 {kl.quantile(0.99):.2e}, "
          f"max {kl.max():.2e}; top-1 the same {100 * same:.2f} %; perplexity {perplexity(got, following):.3f} "
          f"against {perplexity(want, following):.3f}")


def perplexity(logs: Tensor, following: Tensor) -> float:
    return math.exp(-logs.gather(1, following[:, None]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--activations", default="auto")
    args = parser.parse_args()
    text = args.text.read_text()
    want, following = log_probabilities(args.store, "bf16", text, args)
    print(f"{len(following)} predictions, windows of {args.window} tokens, {args.tokens} tokens of {args.text.name}")
    compare("int8 KV against bf16 KV", want, log_probabilities(args.store, "int8", text, args)[0], following)
    if args.floor:
        compare("torch's attention against native", want, log_probabilities(args.store, "bf16", text, args, True)[0],
                following)
    if args.reference is not None:
        exact = log_probabilities(args.reference, "bf16", text, args)[0]
        compare(f"the store against {args.reference.name}", exact, want, following)


if __name__ == "__main__":
    main()

"""Record routing traces for `qmix replay`: prompts out of texts, each answered from the text itself or by sampling.

    python benchmarks/record_traces.py STORE OUT --train c4.txt --test wikitext2-test.txt --test prose.txt
    qmix replay OUT/test-*.trace --train OUT/train-c4.trace --slots 16,24,32,48 --cache-policy lru,lfu:32,static

A prompt of --prompt tokens is prefilled, then --decode tokens are decoded one at a time: those that follow in the
text, and for test texts in a second trace also sampled ones, since an answer is the model's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from qmix.engine import Engine, load


def record(engine: Engine, ids: list[int], args: argparse.Namespace, prompts: int, sampled: bool) -> None:
    """`prompts` prompts from evenly spaced places of `ids`, one after the other in a session."""
    session, random = engine.session(), torch.Generator().manual_seed(0)
    length = args.prompt + args.decode
    for number in range(prompts):
        start = (len(ids) - length) * number // max(1, prompts)
        session.trim(0)
        logits = session.prefill(ids[start:start + args.prompt])
        for step in range(args.decode):
            token = ids[start + args.prompt + step]
            if sampled:
                token = int(torch.multinomial((logits / args.temp).softmax(-1), 1, generator=random))
            logits = session.decode(token)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, action="append", default=[])
    parser.add_argument("--test", type=Path, action="append", default=[])
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--decode", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=5, help="of a test text; a train text gives four times as many")
    parser.add_argument("--temp", type=float, default=0.8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(f"train-{path.stem}", path, 4 * args.prompts, False) for path in args.train]
    jobs += [(f"test-{path.stem}{kind}", path, args.prompts, bool(kind))
             for path in args.test for kind in ("", "-sampled")]
    for name, path, prompts, sampled in jobs:
        trace = args.out / f"{name}.trace"
        with load(args.store, threads=1, context=args.prompt + args.decode, trace=trace) as engine:
            record(engine, engine.tokenizer.encode(path.read_text()), args, prompts, sampled)
        print(trace)


if __name__ == "__main__":
    main()

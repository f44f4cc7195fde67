"""Tokens per second with drafts and without, in turn in the same process, on a text that repeats itself and on one
that does not; and the ratio of a pass of t tokens to one of a single token.

    python benchmarks/drafts.py STORE [--ram 300M] [--threads 1] [--rounds 3] [--tokens 250]

Each round answers every prompt without and with drafts, in changing order, the same seed for both, and
checks that the ids are equal.
Printed per prompt: the median of the rounds' ratios, and of the tokens per second; sampling and text included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from qmix.config import SamplingParams
from qmix.engine import Engine, load
from qmix.generate import Summary, generate
from qmix.sizes import parse_bytes
from qmix.speculation import Pace

PROMPTS = {
    "repeats": "The fox lives in the wood, and the owl lives in the tower. " * 6,
    "ordinary": "The history of the town begins in the early years of the century, when",
}


def answer(engine: Engine, prompt: str, params: SamplingParams, pace: Pace | None) -> tuple[float, Summary]:
    """(tokens per second after the first, what the last record knows)."""
    ids = engine.tokenizer.encode(prompt)
    tokens = generate(engine.session(), ids, params, engine.tokenizer, continuing=True, pace=pace)
    found = [next(tokens)]
    start = time.perf_counter()
    found += tokens
    summary = found[-1].summary
    assert summary is not None
    return (len(summary.ids) - 1) / (time.perf_counter() - start), summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--ram")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=250)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    ram = parse_bytes(args.ram) if args.ram else None
    with load(args.store, threads=args.threads, ram=ram, context=args.context, say=print) as engine:
        ratios(engine)
        for name, prompt in PROMPTS.items():
            pace, plain, drafted, saved = engine.pace(7, print), [], [], []
            for number in range(args.rounds):
                params = SamplingParams(args.temp, 0.95, seed=number, max_tokens=args.tokens)
                found = {}
                for drafts in (False, True) if number % 2 else (True, False):
                    found[drafts] = answer(engine, prompt, params, pace if drafts else None)
                plain.append(found[False][0])
                drafted.append(found[True][0])
                got = found[True][1]
                assert got.ids == found[False][1].ids
                t = got.timings
                saved.append(f"{len(got.ids)} tok, {t.decode_passes} passes, {t.accepted}/{t.drafted}")
            ratio = statistics.median(b / a for a, b in zip(plain, drafted, strict=True))
            print(f"{name:<9} without {statistics.median(plain):.1f} tok/s, with {statistics.median(drafted):.1f}, "
                  f"ratio {ratio:.3f} ({', '.join(f'{b / a:.2f}' for a, b in zip(plain, drafted, strict=True))}); "
                  + "; ".join(saved))


def ratios(engine: Engine) -> None:
    """Median seconds of a pass of 1 to 8 tokens of ordinary text."""
    ids = engine.tokenizer.encode(PROMPTS["ordinary"] * 12)
    session = engine.session()
    session.prefill(ids[:16])
    seconds: dict[int, list[float]] = {t: [] for t in (1, 2, 3, 4, 8)}
    at = 16
    for _ in range(6):
        for t in seconds:
            start = time.perf_counter()
            if t > 1:
                session.verify(ids[at:at + t])
                session.trim(session.length)
            else:
                session.decode(ids[at])
            seconds[t].append(time.perf_counter() - start)
            at += t
            if session.length > engine.plan.context - 10:
                session.trim(16)
            if at > len(ids) - 8:
                at = 16
    one = statistics.median(seconds[1])
    print(f"a pass of 1 token {1000 * one:.2f} ms; of " + ", ".join(
        f"{t}: x {statistics.median(s) / one:.2f}" for t, s in seconds.items() if t > 1))


if __name__ == "__main__":
    main()

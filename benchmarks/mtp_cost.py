"""What a draft of a multi-token-prediction head costs, beside a pass of one token, and what acceptance it needs to win.

    python benchmarks/synthetic.py OUT --model qwen35-mtp --layers 8
    python benchmarks/mtp_cost.py OUT --tokens 48

For each number of ids, CPU time of the process and wall time: drafting them (and the entry of the token before), and
the pass that checks them. They take turns with passes of one token, so that a machine that others use too disturbs all
alike; medians are printed. A head whose ids are right with probability p each wins with d of them where

    1 + p + p^2 + ... + p^d  >  (check + draft) / single

Shallow models are scaled: `--whole N` says what N layers would take, from what the store's layers and its output head
take, which is measured by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qmix.engine import load

Times = dict[str, list[tuple[float, float]]]  # what: (CPU seconds, wall seconds) of each repetition


def timed(found: Times, name: str, work: Callable[[], Any]) -> Any:
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    found.setdefault(name, []).append((time.process_time() - cpu, time.perf_counter() - wall))
    return result


def median(found: Times, name: str, which: int) -> float:
    return statistics.median(pair[which] for pair in found[name])


def break_even(drafts: int, cost: float) -> float | None:
    """The p from which 1 + p + ... + p^drafts is above `cost`; None where no p is."""
    if 1 + drafts <= cost:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(drafts + 1)) < cost else (low, middle)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=32, help="repetitions of each")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--ids", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--whole", type=int, help="layers of the model that this store is a shallow one of")
    args = parser.parse_args()
    with load(args.store, threads=args.threads, context=args.prompt + 64 + 10 * args.tokens * len(args.ids), mtp=True,
              say=print) as engine:
        assert engine.pace(7) is not None
        session, vocab = engine.session(), engine.model.vocab
        if session.mtp is None:
            raise SystemExit(f"{args.store}: no multi-token-prediction head")
        random = torch.Generator().manual_seed(0)

        def token() -> int:
            return int(torch.randint(3, vocab, (1,), generator=random))

        session.prefill([token() for _ in range(args.prompt)])
        found: Times = {}
        for _ in range(args.tokens):
            for ids in args.ids:
                timed(found, "single", lambda: session.decode(token()))
                first = token()
                drafts = timed(found, f"draft {ids}", lambda n=ids, t=first: session.draft(t, n))
                timed(found, f"check {ids}", lambda d=drafts, t=first: session.verify([t, *d]))
                session.trim(session.length - len(drafts))
            for rows in {1, *(1 + ids for ids in args.ids)}:
                timed(found, f"head {rows}", lambda n=rows: engine._model.logits(torch.ones(n, engine.model.hidden)))
        layers = engine.model.num_layers
        head = [t for t in engine.model.trunk.tensors() if t.role == "head"]
        print(f"{args.store.name}: {layers} layers, vocabulary {vocab}, {engine.threads} threads, head of "
              f"{sum(engine.store.layout.dense[t.name].nbytes for t in head) / 1e6:.0f} MB; medians of {args.tokens}")
        for which, name in enumerate(("CPU", "wall")):
            single = median(found, "single", which)
            print(f"{name} time: a token {1e3 * single:.2f} ms")
            for ids in args.ids:
                draft, check = median(found, f"draft {ids}", which), median(found, f"check {ids}", which)
                print(f"  {ids} ids: draft {1e3 * draft:.2f} ms ({draft / single:.2f} of a token), check "
                      f"{1e3 * check:.2f} ms ({check / single:.2f}){need(ids, (draft + check) / single)}")
            if args.whole:
                def scaled(what: str, rows: int, which: int = which) -> float:
                    """The layers grow in number, the output head does not."""
                    head = median(found, f"head {rows}", which)
                    return (median(found, what, which) - head) * args.whole / layers + head

                whole = scaled("single", 1)
                print(f"  {args.whole} layers, by these figures: a token {1e3 * whole:.1f} ms, of which output head "
                      f"{1e3 * median(found, 'head 1', which):.1f} ms")
                for ids in args.ids:
                    draft, check = median(found, f"draft {ids}", which), scaled(f"check {ids}", 1 + ids)
                    print(f"    {ids} ids: draft {draft / whole:.2f} of a token, check {check / whole:.2f}"
                          f"{need(ids, (draft + check) / whole)}")


def need(ids: int, cost: float) -> str:
    p = break_even(ids, cost)
    return f"; wins where ids are right more than {100 * p:.0f} % of the time" if p is not None else \
        "; cannot win, were all ids right"


if __name__ == "__main__":
    main()

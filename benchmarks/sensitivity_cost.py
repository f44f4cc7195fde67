"""How long measuring sensitivities takes beside hqq: on a sample, and with --full also in full; in turns, with medians.

    python benchmarks/sensitivity_cost.py CHECKPOINT [TEXT] --runs 5 --threads 2

TEXT is read in the checkpoint's own tokens; without one (synthetic_checkpoint.py writes no tokenizer) tokens are drawn
at random. Each row has seconds of wall time and of CPU time; on a busy machine the second is the one to compare.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.quantize import TOKENS, Calibration, quantize_checkpoint
from qmix.quantize.fit import sensitivity_text
from qmix.quantize.onethread import one_torch_thread
from qmix.quantize.sampled import measure_sampled
from qmix.quantize.sensitivity import measure
from qmix.tokenizer import load


def read(checkpoint: Checkpoint, file: Path | None) -> Calibration:
    model = checkpoint.model
    if file is None:
        return Calibration(torch.randint(0, model.vocab, (128, 512), generator=torch.Generator().manual_seed(0)))
    tokenizer = load(checkpoint.folder, model.vocab)
    ids = tokenizer.encode(file.read_text(encoding="utf-8")[:2_000_000], bos=False)
    return Calibration.of_text(tokenizer.encode("", bos=True), ids, TOKENS, model.max_positions)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process)."""
    def cpu() -> float:
        now = os.times()
        return now.user + now.system

    wall, used = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - wall, cpu() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="measure in full too, once")
    args = parser.parse_args()
    with Checkpoint.open(args.checkpoint) as checkpoint, tempfile.TemporaryDirectory(dir=".") as folder:
        text = read(checkpoint, args.text)

        def hqq() -> None:
            quantize_checkpoint(checkpoint, Path(folder) / "store", QuantConfig(), threads=args.threads, force=True)

        def sampled() -> None:
            with one_torch_thread(), ThreadPoolExecutor(args.threads) as pool:
                measure_sampled(checkpoint, text, "hqq", 64, pool)

        def full() -> None:
            with one_torch_thread(), ThreadPoolExecutor(args.threads) as pool:
                measure(checkpoint, sensitivity_text(checkpoint.model, text, True), "hqq", 64, pool)

        rows = []
        for _ in range(args.runs):
            rows.append((*timed(hqq), *timed(sampled)))
            print("hqq {:.2f} s, CPU {:.2f}; sample {:.2f} s, CPU {:.2f}".format(*rows[-1]), flush=True)
        print("medians: hqq {:.2f} s, CPU {:.2f}; sample {:.2f} s, CPU {:.2f}".format(
            *map(statistics.median, zip(*rows, strict=True))))
        print(f"sample / hqq: {statistics.median(row[2] / row[0] for row in rows):.2f}, "
              f"CPU {statistics.median(row[3] / row[1] for row in rows):.2f}")
        if args.full:
            print("full: {:.2f} s, CPU {:.2f}".format(*timed(full)))


if __name__ == "__main__":
    main()

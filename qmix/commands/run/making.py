"""A source becomes a store in the models folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qmix import render
from qmix.commands.quantization import Flags, choose
from qmix.commands.quantize.checks import check_tokenizer, say_notes
from qmix.commands.quantize.source import Source
from qmix.commands.run.proposal import save_rate

Say = Callable[[str], None]


def make_store(source: Source, out: Path, flags: Flags, threads: int | None, say: Say) -> None:
    """Quantize `source` into `out`, going on where an earlier run stopped, in place of an older store. Raises what
    quantize_checkpoint raises."""
    from qmix.checkpoint import Checkpoint
    from qmix.quantize import quantize_checkpoint

    with Checkpoint.open(source.path) as checkpoint:
        discard = source.discard(checkpoint)  # first of all: what an earlier run discarded is refused from here on
        say_notes(checkpoint, say=say)
        quant, _ = choose(checkpoint, flags, None, say)
        check_tokenizer(checkpoint)
        with render.byte_bar("quantize") as progress:
            report = quantize_checkpoint(checkpoint, out, quant, threads=threads, force=True, progress=progress,
                                         discard=discard)
    source.done()
    for line in report.lines():
        render.say(line)
    save_rate(quant, report.mb_per_s, report.source_bytes)

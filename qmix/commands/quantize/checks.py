"""What is said and checked of a checkpoint before it is quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qmix import render
from qmix.commands.skipped import skipped_lines
from qmix.errors import ModelFileError

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint


def say_notes(checkpoint: Checkpoint, without_head: bool = False, say: Callable[[str], None] = render.say) -> None:
    """What is skipped, and what is read otherwise than it stands there. without_head: a prediction head is to be left
    out."""
    for line in skipped_lines(checkpoint, asked=without_head):
        say(f"skipped: {line}")
    for note in checkpoint.notes:
        say(f"note: {note}")


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Damaged tokenizer, template or generation files are an error now, not after hours of quantizing."""
    from qmix.tokenizer import load

    if not any((checkpoint.folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        render.say(f"warning: {checkpoint.path} holds neither tokenizer.model nor tokenizer.json: chat and "
                   "generate will refuse the store until the original model's is copied into it")
        return
    try:
        load(checkpoint.folder, checkpoint.model.vocab)
    except ModelFileError as e:  # of a GGUF file, the folder is one that nobody knows
        raise ModelFileError(e.message.replace(str(checkpoint.folder), str(checkpoint.path)), e.cure) from None

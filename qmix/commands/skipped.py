"""What is said of the tensors and files of a checkpoint that the model does not need."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint

ONE_BY_ONE = 3  # tensors of a part of the checkpoint that are named, and not counted
LAYER = re.compile(r"(?:model\.layers|blk)\.(\d+)\.")
PART = re.compile(r"model\.\w+\.|mtp\.")


def skipped_lines(checkpoint: Checkpoint, asked: bool = False) -> list[str]:
    """Each tensor or file, or where there are many of one part, that part: a prediction head has hundreds. asked: such
    a head is to be left out."""
    verb = "is left out" if asked and checkpoint.has_mtp_head else "qmix does not use"
    parts: dict[str, list[str]] = {}
    for name in checkpoint.skipped:
        found = LAYER.match(name) or PART.match(name)
        parts.setdefault(found[0] if found else name, []).append(name)
    lines = []
    for part, names in parts.items():
        layer = LAYER.fullmatch(part)
        head = part == "mtp." or (layer is not None and int(layer[1]) >= checkpoint.model.num_layers)
        lines += [f"{name} (the model does not need it)" for name in names] if len(names) <= ONE_BY_ONE else [
            f"{part}* ({len(names)} tensors " + (f"of a multi-token-prediction head, which {verb})" if head
                                                 else "that the model does not need)")]
    return lines

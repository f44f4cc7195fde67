"""The architectures that qmix reads: one file each, which turns a config.json into the records of qmix/spec and names
the tensors of its checkpoints. No torch."""

from qmix.models.keys import Keys
from qmix.models.registry import (
    ARCHITECTURES,
    choose_layout,
    layouts,
    mtp_layouts,
    mxfp4_layout,
    published_experts,
    read_model,
    skipped,
    with_mtp_head_of,
)
from qmix.models.source import Layout, Misfit, Source, Step

__all__ = ["ARCHITECTURES", "Keys", "Layout", "Misfit", "Source", "Step", "choose_layout", "layouts",
           "mtp_layouts", "mxfp4_layout", "published_experts", "read_model", "skipped", "with_mtp_head_of"]

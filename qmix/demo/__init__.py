"""The bundled demo: a very small Mixtral inside the package, quantized on first use.

checkpoint/ holds the model and its README; training/ in the repository rebuilds it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"


def demo_store(out: Path, say: Callable[[str], None]) -> Path:
    """The demo's store at `out`, quantized now unless one from this very checkpoint is there."""
    from qmix.checkpoint import Checkpoint
    from qmix.config import QuantConfig
    from qmix.errors import QmixError
    from qmix.kernels.table import native_block
    from qmix.quantize import quantize_checkpoint
    from qmix.store import Store

    with Checkpoint.open(CHECKPOINT) as checkpoint:
        if out.exists():
            try:
                with Store.open(out) as store:
                    if store.manifest.fingerprint == checkpoint.fingerprint():
                        return out
                say(f"{out}: made from another version of the demo; quantizing again")
            except QmixError as error:
                say(f"{out}: {error.message}; quantizing again")
        else:
            say(f"quantizing the bundled demo model into {out}")
        out.parent.mkdir(parents=True, exist_ok=True)
        quantize_checkpoint(checkpoint, out, QuantConfig(block=native_block()), force=True)
    return out

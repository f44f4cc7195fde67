"""A mixed store of a wanted size: sensitivities, measured once for a checkpoint and a text, and the choice of formats.

Measuring takes one walk through the checkpoint with every format tried on every expert, longer than quantizing. What
it gives is kept in the cache folder, for another size, or for the same command run again after a break.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qmix.checkpoint import Checkpoint
from qmix.config import CALIBRATED, ModelConfig, QuantConfig
from qmix.errors import DoesNotFit, Interrupted
from qmix.quantize.calibration import TOKENS, Calibration
from qmix.quantize.mix import FORMATS, Choice, choose
from qmix.quantize.onethread import one_torch_thread
from qmix.quantize.sensitivity import PROBE, Sensitivity, measure
from qmix.render import Progress
from qmix.sizes import format_bytes, record_layouts
from qmix.store import StoreLayout

VERSION = 1  # of what is measured
TRIES = 4  # until headers and pads of the store's files are what they were taken for


@dataclass(frozen=True, slots=True)
class Wanted:
    """How large: nbytes, of all weight files of the store, or bits, per weight of the experts."""

    nbytes: int = 0
    bits: float = 0.0

    @property
    def flag(self) -> str:
        return f"--fit {format_bytes(self.nbytes)}" if self.nbytes else f"--bpw {self.bits:g}"


def sensitivity_tokens(config: ModelConfig) -> int:
    """How long a text can be of which a copy for every layer goes along."""
    return max(1, TOKENS // (config.num_layers + 1))


def sensitivity(source: Checkpoint, calibration: Calibration, quant: QuantConfig, threads: int, cache: Path | None,
                say: Callable[[str], None], progress: Progress) -> Sensitivity:
    """That of the text, from the cache folder or measured now. quant: of which method and block count."""
    method = "hqq" if quant.method in CALIBRATED else quant.method
    name = repr((VERSION, source.fingerprint(), calibration.digest, method, quant.block, FORMATS, PROBE))
    file = None if cache is None else cache / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.json"
    if file is not None and file.is_file():
        try:
            found = Sensitivity.from_json(json.loads(file.read_bytes()))
            if set(found.damages) == set(source.config.expert_keys):
                say(f"sensitivities: as measured before on {calibration.tokens} tokens ({file})")
                return found
            raise ValueError("of another model")
        except (OSError, ValueError, KeyError, TypeError) as e:
            say(f"{file}: ignored ({type(e).__name__}: {e}); sensitivities are measured again")
    say(f"measuring on {calibration.tokens} tokens what each of {len(FORMATS)} formats does to every expert")
    try:
        with one_torch_thread(), ThreadPoolExecutor(threads, "qmix-measure") as pool:
            found = measure(source, calibration, method, quant.block, pool, progress)
    except KeyboardInterrupt:
        raise Interrupted("stopped while the experts' sensitivities were measured",
                          "run the same command again; measuring starts over") from None
    if file is not None:
        _save(file, found, say)
    return found


def mixed(config: ModelConfig, quant: QuantConfig, found: Sensitivity, wanted: Wanted) -> tuple[QuantConfig, Choice]:
    """`quant` with the kinds and the mix that suit `wanted` best. DoesNotFit, with the numbers, where nothing does."""
    pairs = tuple((a, b) for a in FORMATS for b in FORMATS)
    sizes = {pair: record_layouts(config, _with(quant, (pair,), ("0" * config.num_experts,) * config.num_layers)
                                  )[0].nbytes for pair in pairs}
    smallest = min(pairs, key=lambda pair: (sizes[pair], pair))
    least = _with(quant, (smallest,), ("0" * config.num_experts,) * config.num_layers)
    keys, experts = len(config.expert_keys), 3 * config.hidden_size * config.intermediate_size
    other = 0 if wanted.bits else StoreLayout.of(config, least).nbytes - keys * sizes[smallest]
    room = int(wanted.bits * experts * keys / 8) if wanted.bits else wanted.nbytes - other
    for _ in range(TRIES):
        choice = choose(found.damages, sizes, room)
        if choice is None:
            break
        chosen = _with(quant, choice.kinds, choice.lines(config))
        over = StoreLayout.of(config, chosen).nbytes - wanted.nbytes
        if wanted.bits or over <= 0:
            return chosen, choice
        room -= over
    low = keys * sizes[smallest]
    raise DoesNotFit(
        f"{wanted.flag}: the smallest mix, {smallest[0]}, takes {format_bytes(low)} for the experts "
        f"({8 * low / experts / keys:.2f} bits a weight)" + ("" if wanted.bits else f" and {format_bytes(other)} for "
                                                             "the rest"),
        "ask for more" + ("" if wanted.bits else ", or choose a smaller --dense"))


def lines(config: ModelConfig, quant: QuantConfig, found: Sensitivity, choice: Choice) -> list[str]:
    """What a user should know of a choice: its expected divergence, beside the largest plain format that is no
    larger."""
    weights = 3 * config.hidden_size * config.intermediate_size * len(config.expert_keys)

    def bits(kinds: tuple[tuple[str, str], ...], mix: tuple[str, ...]) -> float:
        layout = StoreLayout.of(config, _with(quant, kinds, mix))
        return 8 * sum(layout.record(key).nbytes for key in config.expert_keys) / weights

    alike = ("0" * config.num_experts,) * config.num_layers
    plain = [(bits(((name, name),), alike), name, sum(d[m][name] for d in found.damages.values() for m in d))
             for name in FORMATS]
    mine = bits(choice.kinds, choice.lines(config))
    said = [f"mixed: {mine:.2f} bits a weight of the experts; expected divergence {choice.damage:.5f} nats a token"]
    if beside := max((row for row in plain if row[0] <= mine + 0.005), default=None):
        said[0] += f" ({beside[1]} alone: {beside[2]:.5f} at {beside[0]:.2f} bits)"
    return said


def _with(quant: QuantConfig, kinds: tuple[tuple[str, str], ...], mix: tuple[str, ...]) -> QuantConfig:
    return QuantConfig("mixed", quant.dense, quant.method, quant.group_size, quant.block, kinds=kinds, mix=mix)


def _save(file: Path, found: Sensitivity, say: Callable[[str], None]) -> None:
    draft = file.with_suffix(".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(found.to_json()))
        draft.replace(file)
    except OSError as e:
        say(f"{file}: sensitivities could not be kept: {e.strerror}")

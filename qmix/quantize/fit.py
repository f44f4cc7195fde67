"""A mixed store of a given size: sensitivities, measured once for a checkpoint and a text, and the choice of formats.

Measuring takes one walk through the checkpoint with every format tried on every expert, which takes longer than
quantizing. The result is kept in the cache folder, for another size, or for the same command after an interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qmix import json_cache
from qmix.checkpoint import Checkpoint
from qmix.config import CALIBRATED, QuantConfig
from qmix.errors import DoesNotFit, Interrupted
from qmix.quantize.calibration import TOKENS, Calibration
from qmix.quantize.mix import FORMATS, Choice, Kind, choose, one_kind
from qmix.quantize.onethread import one_torch_thread
from qmix.quantize.sensitivity import PROBE, Sensitivity, measure
from qmix.render import Progress
from qmix.sizes import format_bytes, record_layouts
from qmix.spec import Model
from qmix.store import StoreLayout

VERSION = 1  # of what is measured


@dataclass(frozen=True, slots=True)
class Wanted:
    """How large: nbytes, of all weight files of the store, or bits, per weight of the experts."""

    nbytes: int = 0
    bits: float = 0.0

    @property
    def flag(self) -> str:
        return f"--fit {format_bytes(self.nbytes)}" if self.nbytes else f"--bpw {self.bits:g}"


def copies(model: Model) -> int:
    """How many times the text goes through the model at once: as it is, and perturbed in each layer with records."""
    return len(model.record_layers) + 1


def sensitivity_tokens(model: Model) -> int:
    """How long a text can be of which so many copies go along."""
    return max(1, TOKENS // copies(model))


def sensitivity(source: Checkpoint, calibration: Calibration, quant: QuantConfig, threads: int, cache: Path | None,
                say: Callable[[str], None], progress: Progress) -> Sensitivity:
    """That of the text, from the cache folder or measured now. quant: of which method and block count."""
    method = "hqq" if quant.method in CALIBRATED else quant.method
    name = repr((VERSION, source.fingerprint(), calibration.digest, method, quant.block, FORMATS, PROBE))
    file = None if cache is None else cache / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.json"
    if file is not None and file.is_file():
        try:
            found = Sensitivity.from_json(json.loads(file.read_bytes()))
            if set(found.damages) == set(source.model.expert_keys):
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


@dataclass(frozen=True, slots=True)
class Sizes:
    """of: bytes of a record of each kind; other: of the store's weight files beside the records; room: for these."""

    of: Mapping[Kind, int]
    other: int
    room: int

    @classmethod
    def of_model(cls, model: Model, quant: QuantConfig, wanted: Wanted) -> Sizes:
        """DoesNotFit, with the numbers, where not even the smallest mix is as small as `wanted`."""
        alike = one_kind(model)
        sizes = {(a, b): record_layouts(model, _with(quant, ((a, b),), alike))[0].nbytes
                 for a in FORMATS for b in FORMATS}
        smallest = min(sizes, key=lambda kind: (sizes[kind], kind))
        least = StoreLayout.of(model, _with(quant, (smallest,), alike)).nbytes
        keys, weights = len(model.expert_keys), expert_weights(model)
        low = keys * sizes[smallest]
        room = int(wanted.bits * weights / 8) if wanted.bits else wanted.nbytes - (least - low)
        if room < low:
            raise DoesNotFit(
                f"{wanted.flag}: the smallest mix, {smallest[0]}, takes {format_bytes(low)} for the experts "
                f"({8 * low / weights:.2f} bits a weight)" + (
                    "" if wanted.bits else f" and {format_bytes(least - low)} for the rest"),
                "ask for more" + ("" if wanted.bits else ", or choose a smaller --dense"))
        return cls(sizes, least - low, room)


def mixed(model: Model, quant: QuantConfig, found: Sensitivity, wanted: Wanted) -> tuple[QuantConfig, Choice]:
    """`quant` with the kinds and the mix that suit `wanted` best. DoesNotFit as Sizes.of_model says."""
    sizes = Sizes.of_model(model, quant, wanted)
    room = sizes.room
    while True:
        choice = choose(found.damages, sizes.of, room)
        assert choice is not None, room
        chosen = _with(quant, choice.kinds, choice.lines(model))
        over = 0 if wanted.bits else StoreLayout.of(model, chosen).nbytes - wanted.nbytes
        if over <= 0:
            return chosen, choice
        # The headers of the store's files are longer than those of the smallest mix.
        if room - over < len(model.expert_keys) * min(sizes.of.values()):
            raise DoesNotFit(f"{wanted.flag}: too small by {format_bytes(over)}", "ask for a little more")
        room -= over


def expert_weights(model: Model) -> int:
    """Of all experts."""
    return model.expert_numbers * len(model.expert_keys)


def lines(model: Model, quant: QuantConfig, found: Sensitivity, choice: Choice, tokens: int) -> list[str]:
    """What a user should know of a choice: its expected divergence, beside the largest plain format that is no
    larger, and whether more was asked for than there is. tokens: that it was measured on."""
    weights = expert_weights(model)

    def bits(kinds: tuple[tuple[str, str], ...], mix: tuple[str, ...]) -> float:
        layout = StoreLayout.of(model, _with(quant, kinds, mix))
        return 8 * sum(layout.record(key).nbytes for key in model.expert_keys) / weights

    alike = one_kind(model)
    plain = [(bits(((name, name),), alike), name, sum(d[m][name] for d in found.damages.values() for m in d))
             for name in FORMATS]
    mine = bits(choice.kinds, choice.lines(model))
    by = ", chosen by hqq; gptq should do better" if quant.method in CALIBRATED else ""
    said = [f"mixed: {mine:.2f} bits a weight of the experts; expected divergence {choice.damage:.5f} nats a token"]
    if beside := max((row for row in plain if row[0] <= mine + 0.005), default=None):
        said[0] += f" ({beside[1]} alone: {beside[2]:.5f} at {beside[0]:.2f} bits)"
    said[0] += f", on {tokens} tokens of the text{by}"
    if choice.kinds == ((FORMATS[-1], FORMATS[-1]),):
        said.append(f"that is all {FORMATS[-1]}: a mix is never larger; --format int8 is the next")
    return said


def _with(quant: QuantConfig, kinds: tuple[tuple[str, str], ...], mix: tuple[str, ...]) -> QuantConfig:
    return QuantConfig("mixed", quant.dense, quant.method, quant.group_size, quant.block, kinds=kinds, mix=mix)


def _save(file: Path, found: Sensitivity, say: Callable[[str], None]) -> None:
    try:
        json_cache.write_whole(file, json.dumps(found.to_json()))
    except OSError as e:
        say(f"{file}: sensitivities could not be kept: {e.strerror}")

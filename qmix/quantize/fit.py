"""A mixed store of a given size: sensitivities, measured once for a checkpoint and a text, and the choice of formats.

Measuring takes one walk through the checkpoint, on a sample (sampled.py) about as long as hqq takes to quantize it, in
full (sensitivity.py) some twenty times as long. The result is kept in the cache folder, for another size, or for the
same command after an interruption; so is how far a sampled measurement got.
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
from qmix.config import CALIBRATED, GROUPED_BITS, QuantConfig, parse_kind
from qmix.errors import DoesNotFit, Interrupted
from qmix.kernels.op import WIDE
from qmix.quantize.calibration import TOKENS, Calibration
from qmix.quantize.extent import Extent
from qmix.quantize.mix import FORMATS, Choice, Kind, choose, one_kind
from qmix.quantize.onethread import one_torch_thread
from qmix.quantize.progress_file import ProgressFile
from qmix.quantize.sampled import GATHERED, measure_sampled
from qmix.quantize.sensitivity import HEAD_ROWS, PROBE, Sensitivity, measure
from qmix.render import Progress
from qmix.sizes import format_bytes, record_layouts
from qmix.spec import Model
from qmix.store import StoreLayout

VERSION = 2  # of what is measured


@dataclass(frozen=True, slots=True)
class Wanted:
    """How large: nbytes, of all weight files of the store; or bits, per weight of the experts; or records, the bytes of
    all experts' records, as `--fit auto` finds them."""

    nbytes: int = 0
    bits: float = 0.0
    records: int = 0

    @property
    def flag(self) -> str:
        if self.records:
            return f"--fit auto ({format_bytes(self.records)} for the experts)"
        return f"--fit {format_bytes(self.nbytes)}" if self.nbytes else f"--bpw {self.bits:g}"


def rows_of(model: Model, text: Calibration, full: bool) -> int:
    """How many rows go through the model at once: the text's, and those of its copies that are perturbed."""
    if full:
        return sensitivity_text(model, text, full).tokens * (len(model.record_layers) + 1)
    return Extent.of(model, text).rows


def sensitivity_text(model: Model, text: Calibration, full: bool) -> Calibration:
    """The part of it that is measured on: in full what leaves room for the copies, else what a sample takes."""
    return text.part(max(1, TOKENS // (len(model.record_layers) + 1))) if full else Extent.of(model, text).text


def sensitivity(source: Checkpoint, text: Calibration, quant: QuantConfig, threads: int, cache: Path | None,
                say: Callable[[str], None], progress: Progress, full: bool = False) -> Sensitivity:
    """That of a part of the text, from the cache folder or measured now, on a sample or in `full`. quant: of which
    method and block count."""
    method = "hqq" if quant.method in CALIBRATED else quant.method
    part = sensitivity_text(source.model, text, full)
    how = PROBE if full else (Extent.of(source.model, text).layers, Extent.of(source.model, text).copied)
    name = repr((VERSION, source.fingerprint(), part.digest, method, quant.block, FORMATS, how))
    file = None if cache is None else cache / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.json"
    if file is not None and file.is_file():
        try:
            found = Sensitivity.from_json(json.loads(file.read_bytes()))
            if set(found.damages) == set(source.model.expert_keys):
                say(f"sensitivities: as measured before on {part.tokens} tokens ({file})")
                return found
            raise ValueError("of another model")
        except (OSError, ValueError, KeyError, TypeError) as e:
            say(f"{file}: ignored ({type(e).__name__}: {e}); sensitivities are measured again")
    say(f"measuring on {part.tokens} tokens what each of {len(FORMATS)} formats does to every expert"
        + (", in full" if full else ", on a sample of its rows"))
    progress_file = None if file is None or full else ProgressFile(file.with_suffix(".partial"), say)
    try:
        with one_torch_thread(), ThreadPoolExecutor(threads, "qmix-measure") as pool:
            if full:
                found = measure(source, part, method, quant.block, pool, progress)
            else:
                found = measure_sampled(source, text, method, quant.block, pool, progress, progress_file)
    except KeyboardInterrupt:
        raise Interrupted("stopped while the experts' sensitivities were measured", "run the same command again; " + (
            "measuring starts over" if progress_file is None else "measuring goes on")) from None
    if file is not None:
        _save(file, found, say)
    if progress_file is not None:
        progress_file.remove()
    return found


def beside_bytes(model: Model, threads: int) -> int:
    """What measuring takes beside a forward pass: the logits of some rows, and what is quantized together."""
    return threads * (4 * HEAD_ROWS * model.vocab * WIDE + 6 * GATHERED * WIDE) + 2 * GATHERED * WIDE


def even(model: Model, quant: QuantConfig, wanted: Wanted) -> QuantConfig:
    """A mix of that size that knows nothing of the experts, each bit worth a quarter of the error: for plans, which ask
    how large records are and not which. DoesNotFit as Sizes.of_model says."""
    worth = {m: {name: share * 4.0 ** -bits_of(name) for name in FORMATS} for m, share in (("w13", 1.0), ("w2", 2.0))}
    alike = Sensitivity(dict.fromkeys(model.expert_keys, worth), {}, ())
    return mixed(model, quant, alike, wanted)[0]


def bits_of(name: str) -> float:
    """Bits a weight of a grouped format: int3g64 -> 3.5."""
    kind, group = parse_kind(name)
    return GROUPED_BITS[kind] + 32 / group


@dataclass(frozen=True, slots=True)
class Sizes:
    """of: bytes of a record of each kind; other: of the store's weight files beside the records; room: for these."""

    of: Mapping[Kind, int]
    other: int
    room: int

    @classmethod
    def of_model(cls, model: Model, quant: QuantConfig, wanted: Wanted) -> Sizes:
        """DoesNotFit, with the numbers, where not even the smallest mix is as small as `wanted`."""
        sizes = _record_bytes(model, quant)
        smallest = min(sizes, key=lambda kind: (sizes[kind], kind))
        least = StoreLayout.of(model, _with(quant, (smallest,), one_kind(model))).nbytes
        keys, weights = len(model.expert_keys), expert_weights(model)
        low = keys * sizes[smallest]
        room = wanted.records or (
            int(wanted.bits * weights / 8) if wanted.bits else wanted.nbytes - (least - low))
        if room < low:
            raise DoesNotFit(
                f"{wanted.flag}: the smallest mix, {smallest[0]}, takes {format_bytes(low)} for the experts "
                f"({8 * low / weights:.2f} bits a weight)" + (
                    f" and {format_bytes(least - low)} for the rest" if wanted.nbytes else ""),
                "ask for more" + (", or choose a smaller --dense" if wanted.nbytes else ""))
        return cls(sizes, least - low, room)


def smallest(model: Model, quant: QuantConfig) -> QuantConfig:
    """The mix whose records are smallest, all of one kind."""
    sizes = _record_bytes(model, quant)
    return _with(quant, (min(sizes, key=lambda kind: (sizes[kind], kind)),), one_kind(model))


def _record_bytes(model: Model, quant: QuantConfig) -> dict[Kind, int]:
    alike = one_kind(model)
    return {(a, b): record_layouts(model, _with(quant, ((a, b),), alike))[0].nbytes for a in FORMATS for b in FORMATS}


def mixed(model: Model, quant: QuantConfig, found: Sensitivity, wanted: Wanted) -> tuple[QuantConfig, Choice]:
    """`quant` with the kinds and the mix that suit `wanted` best. DoesNotFit as Sizes.of_model says."""
    sizes = Sizes.of_model(model, quant, wanted)
    room = sizes.room
    while True:
        choice = choose(found.damages, sizes.of, room)
        assert choice is not None, room
        chosen = _with(quant, choice.kinds, choice.lines(model))
        over = StoreLayout.of(model, chosen).nbytes - wanted.nbytes if wanted.nbytes else 0
        if over <= 0:
            return chosen, choice
        # The headers of the store's files are longer than those of the smallest mix.
        if room - over < len(model.expert_keys) * min(sizes.of.values()):
            raise DoesNotFit(f"{wanted.flag}: too small by {format_bytes(over)}", "ask for a little more")
        room -= over


def expert_weights(model: Model) -> int:
    """Of all experts."""
    return model.expert_numbers * len(model.expert_keys)


def lines(model: Model, quant: QuantConfig, found: Sensitivity, choice: Choice, tokens: int,
          text: str = "the text") -> list[str]:
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
    said[0] += f", predicted from {tokens} tokens of {text}{by}"
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

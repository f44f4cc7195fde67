"""A folder in Hugging Face layout: config.json and safetensors files, opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from qmix.checkpoint.account import BYTES, DTYPE_NAMES, Locations, account
from qmix.errors import CheckpointError, ConfigError
from qmix.gguf_checkpoint import Opened
from qmix.lowbit import Matrix, join
from qmix.models import Layout, published_experts, read_model, skipped, with_mtp_head_of
from qmix.schemes import MODELOPT, Fp4, Quantization, modelopt_config, read_quantization
from qmix.shards import INDEX, REFETCH, SINGLE, Location, locate, read_json
from qmix.spec import Model

STORE_MANIFEST = "qmix.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FOLDER = "give the folder that holds config.json and model*.safetensors"


def open_folder(path: Path, opened: ExitStack, mtp: bool) -> Opened:
    """CheckpointError names file, key or tensor, and the cure."""
    try:
        _check_folder(path)
        raw = read_json(path / "config.json")
        quantization = _quantization(path, raw)
        _check_weights(path)
        found, unused, notes = locate(path, opened)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}", "check the path and its permissions") from None
    locations: Mapping[str, Location | Matrix] = found
    scales: list[str] = []
    if quantization is not None:
        locations, scales = join(quantization, found)
    model = _read_config(path / "config.json", raw, locations, mtp)
    used, table, left_out = account(path, model, locations)
    notes += ignored_keys(path / "config.json", raw) + _quantized_notes(path, model, quantization, used)
    if published_experts(raw) and not any(source.scales for source in table.values()):
        notes.append(f"{path / 'config.json'}: quantization_config: says that the experts are MXFP4, but the "
                     f"files have them in {model.dtype}: read so")
    carried = "mxfp4" if any(source.scales for source in table.values()) or _all_mxfp4(model, table, used) else None
    return Opened(raw, model, used, table, (*left_out, *scales, *unused), tuple(notes), path, carried, {},
                  with_mtp_head_of(model, locations).mtp_head is not None)


def _all_mxfp4(model: Model, table: Layout, used: Locations) -> bool:
    """Whether all matrices of experts are in MXFP4 whole, so that they can stay so."""
    sources = [table[t.name] for key in model.expert_keys for t in model.expert_tensors(key)[:3]]
    return all(not source.steps and isinstance(found := used[source.name], Matrix) and isinstance(found.scheme, Fp4)
               and found.scheme.kind == "mxfp4" for source in sources)


def _quantization(path: Path, raw: Mapping[str, Any]) -> Quantization | None:
    """How config.json says that the weights are quantized already; None where they are not, or where the layouts of the
    model have a place for it (gpt_oss in MXFP4). CheckpointError where qmix does not know it. Headers are read after
    this: those of a quantized checkpoint may have dtypes that qmix does not know."""
    where, found = path / "config.json", raw.get("quantization_config")
    try:
        if found is None and (path / MODELOPT).is_file():
            where = path / MODELOPT
            found = modelopt_config(read_json(where))
        if found is None or published_experts(raw) is not None:
            return None
        return read_quantization(found)
    except ConfigError as e:
        raise CheckpointError(f"{where}: {e.message}", e.cure) from None


def _quantized_notes(path: Path, model: Model, quantization: Quantization | None, used: Locations) -> list[str]:
    """What was read as what."""
    if quantization is None:
        return []
    count = Counter(found.scheme.title for found in used.values() if isinstance(found, Matrix))
    if not count:
        return [f"{path / 'config.json'}: quantization_config: says {quantization.title}, but the files have all "
                f"weights in {model.dtype}: read so"]
    listed = "; ".join(f"{number} tensors in {title}" for title, number in sorted(count.items()))
    return [f"{path}: quantized already, {quantization.title.partition(':')[0]}: {listed}: decoded in fp32, then "
            f"rounded to {model.dtype}; the other {len(used) - sum(count.values())} are not quantized"]


def _check_folder(path: Path) -> None:
    """Refuse, each with its own cure, what is not a folder with safetensors weights and a config."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder", FOLDER)
    if not path.is_dir():
        raise CheckpointError(f"{path}: a file, not a folder", f"{FOLDER}, or a GGUF file")
    if (found := sorted(path.glob("*.gguf"))) and not (path / "config.json").exists():
        raise CheckpointError(f"{path}: no config.json, but {len(found)} GGUF file{'s' if len(found) > 1 else ''}",
                              f"name the file: {found[0]}")
    if (path / STORE_MANIFEST).exists():
        raise CheckpointError(f"{path}: a qmix store, quantized already",
                              f"talk to it with `qmix chat {path}`, or give the original checkpoint")
    if not (path / "config.json").exists():
        _refuse_pickles(path)
        native = " (params.json of Mistral's own layout, without consolidated.safetensors)" \
            if (path / "params.json").exists() else ""
        raise CheckpointError(f"{path / 'config.json'}: missing{native}", f"{FOLDER}, Hugging Face layout, or "
                              "params.json and consolidated*.safetensors")


def _check_weights(path: Path) -> None:
    """CheckpointError where the folder has none that can be read. Asked when config.json has been: the weights of a
    quantized checkpoint of the hub are not fetched."""
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return
    others = sorted(p.name for p in path.glob("*.safetensors"))
    if others:
        raise CheckpointError(f"{path}: {others[0]}, but neither {SINGLE} nor {INDEX}",
                              f"fetch {INDEX} too, or name a single file {SINGLE}")
    _refuse_pickles(path)
    cached = path.parent.name == "snapshots"  # of the hub: then it was fetched as the repository has it
    raise CheckpointError(f"{path / SINGLE}: missing", "the repository has no safetensors weights (neither "
                          f"{SINGLE} nor {INDEX}): choose one that has" if cached else REFETCH)


def _refuse_pickles(path: Path) -> None:
    """CheckpointError where there are weights that can run code when they are loaded."""
    pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
    if pickles:
        raise CheckpointError(f"{path}: only pickled weights ({pickles[0]}), which can run code when loaded",
                              "fetch the safetensors version, or convert it with transformers")


def ignored_keys(path: Path, raw: Mapping[str, Any]) -> list[str]:
    """Lines on values of config.json that qmix reads otherwise than they stand there."""
    found = []
    if raw.get("auto_map"):
        found.append("auto_map names code that comes with the model (trust_remote_code): qmix never runs such code and "
                     "computes the model as transformers' own does")
    if "sliding_window" in raw and raw["sliding_window"] is not None and raw["sliding_window"] <= 0:
        found.append(f"sliding_window {raw['sliding_window']}: read as no window, full attention")
    eos = raw.get("eos_token_id")
    if any(i < 0 for i in (eos if isinstance(eos, list) else [] if eos is None else [eos])):
        found.append(f"eos_token_id {eos}: a negative id is not a token: ignored")
    return [f"{path}: {line}" for line in found]


def _read_config(path: Path, raw: Mapping[str, Any], locations: Locations, mtp: bool) -> Model:
    """The model of config.json, with the dtype that most tensors have, and the prediction head that they have."""
    try:
        model = read_model({**raw, "dtype": "bfloat16"})
        model = with_mtp_head_of(model, locations) if mtp else model.trunk
        unused = skipped(model, locations)
        found = Counter(p.entry.dtype for name, p in locations.items()
                        if name not in unused and p.entry.dtype != BYTES and not isinstance(p, Matrix))
        model = replace(model, dtype=DTYPE_NAMES.get(found.most_common(1)[0][0], "bfloat16") if found else model.dtype)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e.message}", e.cure or "correct config.json, or fetch it again") from None
    return model



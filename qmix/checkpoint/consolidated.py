"""A folder in Mistral's own layout, opened: params.json, consolidated*.safetensors, tokenizer.model or
tokenizer.model.v3. It becomes what a folder in Hugging Face layout is, config.json and tokenizer.model in a temporary
folder."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from qmix import modelfiles
from qmix.bounded import read_file
from qmix.checkpoint.account import DTYPE_NAMES, account
from qmix.errors import CheckpointError, ConfigError
from qmix.gguf_checkpoint import Opened
from qmix.models import read_model
from qmix.models.consolidated import PARAMS, WEIGHTS, consolidated_config, consolidated_layouts
from qmix.shards import MAX_JSON, read_json, read_shards

TOKENIZERS = ("tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1")  # where there is no tokenizer.model
TEKKEN = "tekken.json"


def open_consolidated(path: Path, opened: ExitStack) -> Opened:
    """CheckpointError names file, key or tensor, and the cure."""
    try:
        raw, notes = consolidated_config(read_json(path / PARAMS))
        model = read_model({**raw, "dtype": "bfloat16"})
    except ConfigError as e:
        raise CheckpointError(f"{path / PARAMS}: {e.message}", e.cure or "fetch it again, or give the model in Hugging "
                              "Face layout") from None
    locations, index_notes = read_shards(path, sorted(p.name for p in path.glob(WEIGHTS)), opened)
    kinds = Counter(location.entry.dtype for location in locations.values() if location.entry.dtype in DTYPE_NAMES)
    model = replace(model, dtype=DTYPE_NAMES[kinds.most_common(1)[0][0]] if kinds else model.dtype)
    used, table, skipped = account(path, model, locations, consolidated_layouts(model))
    folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="qmix-mistral-")))
    raw = {**raw, "torch_dtype": model.dtype, "_name_or_path": path.resolve().name}  # which tells an Instruct model
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    for name in modelfiles.present(path):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(read_file(path / name, MAX_JSON, CheckpointError))
    found = [f"{path / PARAMS}: {note}" for note in notes] + index_notes + _tokenizer(path, folder)
    found.append(f"{path}: Mistral's own layout: the rows of q and k are put in Hugging Face's order")
    return Opened(raw, model, used, table, tuple(skipped), tuple(found), folder, None, {})


def _tokenizer(path: Path, folder: Path) -> list[str]:
    """Copy the tokenizer under the name that it has elsewhere; what to say of that."""
    if (folder / modelfiles.SENTENCEPIECE).exists() or (folder / modelfiles.TOKENIZER_JSON).exists():
        return []
    for name in TOKENIZERS:
        if (path / name).is_file():
            (folder / modelfiles.SENTENCEPIECE).write_bytes(read_file(path / name, MAX_JSON, CheckpointError))
            return [f"{path / name}: read as {modelfiles.SENTENCEPIECE}"]
    if (path / TEKKEN).is_file():
        return [f"{path / TEKKEN}: a tokenizer in Mistral's Tekken format, which qmix does not read: put the "
                "tokenizer.json of the model in Hugging Face layout beside it"]
    return []

"""A Mixtral checkpoint in Hugging Face layout, read one tensor at a time.

Opening reads config.json and the headers only, and accounts for every tensor: each one is used, or
named in `skipped`, or the checkpoint is refused by that tensor's name. Tensors are then read with
pread into fresh memory, never mapped and never unpickled, and their pages are given back to the
system at once: streaming 94 GB neither grows the process nor empties the page cache.

A file that changes or disappears while it is read is an error, not a wrong model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from qmix import modelfiles, names
from qmix.config import ExpertKey, ModelConfig
from qmix.errors import CheckpointError, ConfigError
from qmix.formats import TORCH_DTYPES, memory
from qmix.tensorfile import Entry, TensorFile, read_exact, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORE_MANIFEST = "qmix.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPE_NAMES = MappingProxyType({"BF16": "bfloat16", "F16": "float16", "F32": "float32"})
SAMPLE = 4096  # bytes of each tensor that go into the fingerprint
MAX_TENSORS = 10**6  # far above any real model; keeps a hostile config.json from costing memory

FOLDER = "give the folder that holds config.json and model*.safetensors"
REFETCH = "the checkpoint is incomplete or damaged: fetch it again"
WRONG_CONFIG = "config.json and the weights do not belong together: fetch both again, or mend config.json"


class _Shard:
    """One open safetensors file; reads are safe from several threads."""

    def __init__(self, path: Path):
        if not path.is_file():  # before opening: a pipe would block
            raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'missing'}", REFETCH)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise CheckpointError(f"{path}: {e.strerror}", "check its permissions") from None
        try:
            self._state = self._stat()
            self.file: TensorFile = read_header(path, CheckpointError)
        except BaseException:
            self.close()
            raise

    def read(self, entry: Entry, begin: int = 0, nbytes: int | None = None, out: Tensor | None = None) -> Tensor:
        """Bytes [begin, begin + nbytes) of a tensor, by default all, in `out`, by default a fresh uint8 tensor."""
        nbytes = entry.nbytes - begin if nbytes is None else nbytes
        buffer = torch.empty(nbytes, dtype=torch.uint8) if out is None else out
        assert buffer.nbytes == nbytes
        offset = entry.offset + begin
        try:
            read_exact(self._fd, memory(buffer), offset)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
            changed = self._stat() != self._state
        except EOFError:
            changed = True
        except OSError as e:
            raise CheckpointError(f"{self.file.path}: {entry.name}: {e.strerror}", REFETCH) from None
        if changed:
            raise CheckpointError(f"{self.file.path}: changed while it was being read ({entry.name})",
                                  "let the download finish, then start again")
        return buffer

    def _stat(self) -> tuple[int, int]:
        state = os.fstat(self._fd)
        return state.st_size, state.st_mtime_ns

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies."""

    shard: _Shard
    entry: Entry


class Checkpoint:
    """An open checkpoint. Use as a context manager, or close it.

    path: the folder. config: its shape, `dtype` as the files have it whatever config.json says.
    raw_config: config.json as it stands. nbytes: bytes of all used weights.
    skipped: names of tensors and weight files that the model does not need.
    """

    def __init__(self, path: Path, raw_config: Mapping[str, Any], config: ModelConfig,
                 places: Mapping[str, _Place], skipped: tuple[str, ...], opened: ExitStack):
        self.path = path
        self.raw_config = raw_config
        self.config = config
        self.skipped = skipped
        self.nbytes = sum(place.entry.nbytes for place in places.values())
        self._places = places
        self._opened = opened

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Open and account for every tensor; CheckpointError names file, tensor or key, and the cure."""
        path = Path(path)
        with ExitStack() as opened:
            try:
                _check_folder(path)
                raw = _read_json(path / "config.json")
                places, unused = _locate(path, opened)
            except OSError as e:
                raise CheckpointError(f"{path}: {e.strerror}", "check the path and its permissions") from None
            config = _read_config(path / "config.json", raw, places)
            used, skipped = _account(path, config, places)
            return cls(path, raw, config, used, (*skipped, *unused), opened.pop_all())

    def dense(self, name: str) -> Tensor:
        """A tensor of names.dense_tensors, in the file's dtype and fresh memory."""
        return self._tensor(name)

    def expert(self, key: ExpertKey) -> tuple[Tensor, Tensor, Tensor]:
        """w1 (gate) [F, H], w2 (down) [H, F], w3 (up) [F, H], in the file's dtype and fresh memory."""
        tensors = names.expert_tensors(self.config, key)
        w1, w2, w3 = (self._tensor(tensors[part][0]) for part in ("w1", "w2", "w3"))
        return w1, w2, w3

    def stacked_expert(self, key: ExpertKey, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """An expert as a record has it: w13 [2F, H], the gate above w3, and w2 [H, F], in the file's dtype; read
        into `buffer`, uint8 of an expert's bytes, and views into it."""
        tensors = names.expert_tensors(self.config, key)
        part = buffer.nbytes // 3
        w1, _, w2 = (self._tensor(tensors[name][0], buffer[i * part:(i + 1) * part])
                     for i, name in enumerate(("w1", "w3", "w2")))
        return buffer[:2 * part].view(w1.dtype).view(2 * w1.shape[0], w1.shape[1]), w2

    def _tensor(self, name: str, out: Tensor | None = None) -> Tensor:
        place = self._places[name]
        data = place.shard.read(place.entry, out=out)
        return data.view(TORCH_DTYPES[place.entry.dtype]).view(place.entry.shape)

    @property
    def extra_files(self) -> list[str]:
        """Names of tokenizer, chat template and generation defaults in the folder, as far as they are there."""
        return list(modelfiles.present(self.path))

    def fingerprint(self) -> str:
        """Hex digest of the content: config, every tensor's name, shape and place, and a sample of its
        bytes. Independent of path and time; reads 4 KiB a tensor."""
        digest = hashlib.blake2b(json.dumps(self.raw_config, sort_keys=True).encode(), digest_size=16)
        for name, place in sorted(self._places.items()):
            entry, size = place.entry, place.shard.file.size
            digest.update(repr((name, entry.dtype, entry.shape, entry.offset, entry.nbytes, size)).encode())
            nbytes = min(SAMPLE, entry.nbytes)
            digest.update(bytes(place.shard.read(entry, (entry.nbytes - nbytes) // 2, nbytes).tolist()))
        return digest.hexdigest()

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _check_folder(path: Path) -> None:
    """Refuse, each with its own cure, what is not a folder with safetensors weights and a config."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder", FOLDER)
    if not path.is_dir():
        raise CheckpointError(f"{path}: a file, not a folder", FOLDER)
    if (path / STORE_MANIFEST).exists():
        raise CheckpointError(f"{path}: a qmix store, quantized already",
                              f"talk to it with `qmix chat {path}`, or give the original checkpoint")
    if not (path / "config.json").exists():
        native = " (Mistral's own layout)" if (path / "params.json").exists() else ""
        raise CheckpointError(f"{path / 'config.json'}: missing{native}", f"{FOLDER}, Hugging Face layout")
    if (path / SINGLE).exists() and (path / INDEX).exists():
        raise CheckpointError(f"{path}: both {SINGLE} and {INDEX}", "remove the one that does not belong")
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return
    others = sorted(p.name for p in path.glob("*.safetensors"))
    if others:
        raise CheckpointError(f"{path}: {others[0]}, but neither {SINGLE} nor {INDEX}",
                              f"fetch {INDEX} too, or name a single file {SINGLE}")
    pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
    if pickles:
        raise CheckpointError(f"{path}: only pickled weights ({pickles[0]}), which can run code when loaded",
                              "fetch the safetensors version, or convert it with transformers")
    raise CheckpointError(f"{path / SINGLE}: missing", REFETCH)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}", REFETCH) from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON ({str(e).splitlines()[0]})", REFETCH) from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object", REFETCH)
    return raw


def _read_config(path: Path, raw: Mapping[str, Any], places: Mapping[str, _Place]) -> ModelConfig:
    """config.json as a ModelConfig, with the dtype that most tensors have."""
    if "quantization_config" in raw:
        raise CheckpointError(f"{path}: quantization_config: the weights are quantized already",
                              "give the original bf16, fp16 or fp32 checkpoint")
    found = Counter(p.entry.dtype for name, p in places.items() if not names.SKIPPED.fullmatch(name))
    dtype = found.most_common(1)[0][0] if found else "BF16"
    try:
        return ModelConfig.from_hf({**raw, "dtype": DTYPE_NAMES.get(dtype, "bfloat16")})
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e.message}", "if this is a Mixtral, mend its config.json") from None


def _locate(path: Path, opened: ExitStack) -> tuple[dict[str, _Place], list[str]]:
    """Open the weight files and find every tensor: ({name: place}, names of weight files not used)."""
    weight_map = _read_index(path / INDEX) if (path / INDEX).exists() else None
    files = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    absent = [name for name in files if not (path / name).exists()]
    if absent:
        raise CheckpointError(f"{path / absent[0]}: missing ({len(absent)} of {len(files)} files)", REFETCH)
    places: dict[str, _Place] = {}
    for name in files:
        shard = _Shard(path / name)
        opened.callback(shard.close)
        for tensor, entry in shard.file.entries.items():
            listed = name if weight_map is None else weight_map.get(tensor)
            if listed != name:
                where = f"{INDEX} places it in {listed}" if listed else f"{INDEX} does not name it"
                raise CheckpointError(f"{path / name}: {tensor}: {where}", REFETCH)
            places[tensor] = _Place(shard, entry)
    for tensor, name in (weight_map or {}).items():
        if tensor not in places:
            raise CheckpointError(f"{path / name}: {tensor}: not in it, though {INDEX} says so", REFETCH)
    return places, sorted(p.name for p in path.glob("*.safetensors") if p.name not in files)


def _read_index(path: Path) -> dict[str, str]:
    """The weight map {tensor name: file name}; file names must be plain names of safetensors files."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: got {weight_map!r:.80}, want {{tensor: file}}", REFETCH)
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and "/" not in name and "\\" not in name and "\0" not in name
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: weight_map.{tensor}: got {name!r:.80}, want a .safetensors file in the same folder",
                "do not use this checkpoint unless you trust its source")
    return weight_map


def _account(path: Path, config: ModelConfig,
             places: Mapping[str, _Place]) -> tuple[dict[str, _Place], list[str]]:
    """({name: place} of all that the model uses, names skipped); CheckpointError for whatever is missing,
    left over, misshapen or of another dtype."""
    count = config.num_layers * (7 + 3 * config.num_experts)
    if count > MAX_TENSORS:
        raise CheckpointError(
            f"{path / 'config.json'}: num_hidden_layers {config.num_layers}, num_local_experts "
            f"{config.num_experts}: {count} tensors, want at most {MAX_TENSORS}", WRONG_CONFIG)
    wanted = _wanted_shapes(config)
    missing = [name for name in wanted if name not in places]
    if missing:
        cure = "if the model ties its embeddings, config.json must say tie_word_embeddings: true"
        raise CheckpointError(f"{path}: {missing[0]}: missing ({len(missing)} of {len(wanted)} tensors are)",
                              cure if missing == [names.HEAD] else WRONG_CONFIG)
    for name, shape in wanted.items():
        _check_tensor(places[name], shape, config.dtype)
    skipped = [name for name in places if names.SKIPPED.fullmatch(name)]
    if config.tie_embeddings and names.HEAD in places:
        _check_tied(places[names.EMBEDDING], places[names.HEAD])
        skipped.append(names.HEAD)
    left = [name for name in places if name not in wanted and name not in skipped]
    if left:
        raise CheckpointError(f"{places[left[0]].shard.file.path}: {left[0]}: not a tensor of this model "
                              f"({len(left)} such tensors)", WRONG_CONFIG)
    return {name: places[name] for name in wanted}, skipped


def _wanted_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every tensor of the model."""
    wanted: dict[str, tuple[int, ...]] = {t.name: t.shape for t in names.dense_tensors(config)}
    for key in config.expert_keys:
        wanted.update(names.expert_tensors(config, key).values())
    return wanted


def _check_tensor(place: _Place, shape: tuple[int, ...], dtype: str) -> None:
    entry, where = place.entry, f"{place.shard.file.path}: {place.entry.name}"
    if entry.shape != shape:
        raise CheckpointError(f"{where}: got shape {list(entry.shape)}, want {list(shape)} by config.json",
                              WRONG_CONFIG)
    if entry.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{where}: got dtype {entry.dtype}, want BF16, F16 or F32",
                              "give the original, unquantized checkpoint")
    if DTYPE_NAMES[entry.dtype] != dtype:
        raise CheckpointError(f"{where}: got {DTYPE_NAMES[entry.dtype]}, want {dtype} like the other tensors",
                              "save the checkpoint again with one dtype")


def _check_tied(embedding: _Place, head: _Place, step: int = 2**24) -> None:
    """The head of a model with tied embeddings may be there, but must be the embedding."""
    same = (embedding.entry.dtype, embedding.entry.shape) == (head.entry.dtype, head.entry.shape)
    for begin in range(0, embedding.entry.nbytes if same else 0, step):
        nbytes = min(step, embedding.entry.nbytes - begin)
        same = same and torch.equal(*(p.shard.read(p.entry, begin, nbytes) for p in (embedding, head)))
    if not same:
        raise CheckpointError(f"{head.shard.file.path}: {names.HEAD}: differs from {names.EMBEDDING}, though "
                              "config.json says tie_word_embeddings: true",
                              "set tie_word_embeddings to false in config.json to use both")

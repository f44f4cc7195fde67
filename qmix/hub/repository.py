"""What a repository holds, what of it a model needs, and how it comes here."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, Literal

from qmix import modelfiles
from qmix.errors import CheckpointError, DoesNotFit, QmixError, UsageError
from qmix.hub import blobs
from qmix.hub.contents import (
    OWN_FILES,
    PARAMS,
    check_params,
    is_quantized,
    named_files,
    own_layout,
    shards,
    store_files,
)
from qmix.hub.errors import hub_error, reason, status_of
from qmix.hub.fetching import CONNECTIONS, Bar, File, fetch_files, quiet
from qmix.hub.limits import check_small_files
from qmix.hub.names import GgufModel, HubName, choose_gguf, gguf_models
from qmix.hub.private import drop_unused, folder_of, link_cached, private_folder
from qmix.sizes import format_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "qmix.json"
CONFIG = "config.json"
# All that a store copies from a checkpoint, what tells a layout that qmix does not read, and what names the weights.
FILES = (CONFIG, PARAMS, "hf_quant_config.json", INDEX, MANIFEST, *modelfiles.FILES)
TEMPLATES = f"{modelfiles.TEMPLATES}/*.jinja"
QUICK = 5.0  # seconds that a hub has to say whether a model has changed

Wanted = Literal["config", "checkpoint", "store", "either"]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Access:
    """How the hub is asked. revision: of --revision; offline: from the cache alone; bar: makes what shows a download's
    progress, given its title; cache: the folder of the cache, None = the user's."""

    revision: str | None = None
    offline: bool = False
    bar: Bar | None = None
    cache: Path | None = None


@dataclass(slots=True)
class Found:
    """What is needed of a repository, and how much of it is not here yet.

    folder: the snapshot, with the small files; names: of the weights; missing: those that are not here, as far as the
    hub says how large they are; unknown: those of which it does not; gguf: the model in GGUF files, None for any other.
    """

    name: HubName
    folder: Path
    commit: str | None
    access: Access
    names: tuple[str, ...] = ()
    missing: tuple[File, ...] = ()
    unknown: tuple[str, ...] = ()
    gguf: GgufModel | None = None
    is_store: bool = False
    fallback: tuple[str, ...] = field(default=())

    @property
    def path(self) -> Path:
        """What is opened: the folder, or the (first) GGUF file."""
        return self.folder if self.gguf is None else self.folder / self.gguf.files[0]

    @property
    def to_fetch(self) -> int:
        """Bytes that are still to come."""
        return sum(file.left for file in self.missing)

    @property
    def nbytes(self) -> int:
        """Of all weights, where that is known."""
        here = sum((self.folder / name).stat().st_size for name in self.names if (self.folder / name).exists())
        return here + sum(file.size for file in self.missing)

    @property
    def storage(self) -> Path:
        """The repository's folder in the cache."""
        return self.folder.parent.parent

    def preview(self) -> Path:
        """What a plan needs, before anything is fetched: the folder with config.json, or a GGUF file with its header
        alone. CheckpointError for Mistral's own layout, which is read with its weights only."""
        if self.missing and (self.folder / PARAMS).is_file() and not (self.folder / CONFIG).is_file():
            raise CheckpointError(f"{self.name}: in Mistral's own layout, which is planned when its weights are here",
                                  f"quantize it: qmix quantize {self.name} {self.name.repo.partition('/')[2]}-int4")
        if self.gguf is None or not self.missing:
            return self.path
        from huggingface_hub import hf_hub_url

        from qmix.hub.preview import headers_of

        sizes = {file.name: file.size for file in self.missing}
        if {*self.gguf.files} - {*sizes}:  # some are here: then all are looked at as they will be
            sizes |= {name: (self.folder / name).stat().st_size for name in {*self.gguf.files} - {*sizes}
                      if (self.folder / name).exists()}
        try:
            with quiet(None):
                return headers_of([(name, hf_hub_url(self.name.repo, name, revision=self.commit), sizes[name])
                                   for name in self.gguf.files])
        except QmixError:
            raise
        except Exception as e:
            raise hub_error(str(self.name), e) from None

    def check_room(self, say: Say) -> None:
        """Say what is to be fetched and what is free; DoesNotFit where that cannot be."""
        if not self.missing:
            return
        needed, free = self.to_fetch, shutil.disk_usage(_existing(self.folder)).free
        count = len(self.missing)
        begun = sum(file.begun for file in self.missing)
        say(f"{self.name}: {count} file{'s' if count > 1 else ''} to fetch, {format_bytes(needed)}"
            + (f" ({format_bytes(begun)} of them are here from an earlier try)" if begun else "")
            + f", into {self.storage}: {format_bytes(free)} free")
        if needed > free:
            raise DoesNotFit(f"{self.name}: its weights need {format_bytes(needed)} in {self.storage}: "
                             f"{format_bytes(free)} free, short of {format_bytes(needed - free)}",
                             "make room, or set HF_HOME to a folder on another disk")

    def fetch(self, say: Say) -> None:
        """All that is missing. CheckpointError, DoesNotFit or Interrupted where that fails; what came stays, and the
        next call goes on there."""
        if self.missing:
            fetch_files(self.name.repo, str(self.name), self.commit, self.storage, self.missing, say, self.access.bar)
        if self.missing or self.unknown:
            _snapshot(self.name.repo, self.commit, (*(f.name for f in self.missing), *self.unknown), (), self.access,
                      tries=3)
        self.missing = self.unknown = ()
        if self.fallback and not all((self.folder / name).exists() for name in self.names):
            self.names, self.fallback = self.fallback, ()
            _look_up(self, say)
            self.check_room(say)
            self.fetch(say)


def download(name: HubName, wanted: Wanted, say: Say, access: Access | None = None) -> Path:
    """The folder in the hub's cache, or the GGUF file there, with what a `wanted` model needs; "config" is config.json
    alone. CheckpointError where the hub does not give it, DoesNotFit where the disk is too small, UsageError where a
    store is wanted and the repository holds a checkpoint."""
    found = find(name, wanted, say, access)
    if wanted == "config":
        return found.preview()
    found.check_room(say)
    found.fetch(say)
    return found.path


def find(name: HubName, wanted: Wanted, say: Say, access: Access | None = None) -> Found:
    """What `download` would fetch; the small files are fetched by that. Raises what it raises."""
    access = access or Access()
    name = name.at(access.revision)
    offline = is_offline(access)
    say(f"{name}: not a local folder; " + ("looking in the hub's cache alone" if offline else
                                           "asking the Hugging Face hub"))
    if access.cache is None and wanted == "checkpoint" and (left := private_folder(name.repo)) is not None:
        say(f"{name}: {left} has what an earlier run with --discard-source fetched: "
            "with that flag it would go on there")
    if name.file is not None:
        if wanted == "store":
            raise UsageError(f"{name}: a GGUF file that is no store yet", _quantize_first(name))
        return _find_gguf(name, say, access)
    folder = _snapshot(name.repo, name.revision, [CONFIG] if wanted == "config" else FILES,
                       [] if wanted == "config" else [TEMPLATES], access)
    # The commit of the small files, so that an upload in between cannot mix two versions.
    commit = folder.name if folder.parent.name == "snapshots" else name.revision
    found = Found(name, folder, commit, access)
    if wanted == "config" and (folder / CONFIG).is_file():
        return found
    if wanted == "config":  # a model in GGUF files may have none, and the others are refused as always
        return find(name, "checkpoint", say, access)
    found.is_store = (folder / MANIFEST).is_file()
    if wanted == "store" and not found.is_store and (folder / CONFIG).is_file():
        raise UsageError(f"{name}: a checkpoint that is not quantized yet", _quantize_first(name))
    if (found.is_store and wanted == "checkpoint") or (not found.is_store and is_quantized(folder / CONFIG)):
        return found  # opening it as a checkpoint is refused, by its name or by its config.json
    if not found.is_store and not (folder / INDEX).exists() and folder.parent.name == "snapshots":
        files = _listing(name, commit, folder, access)
        if own := own_layout(files):
            if wanted == "store":
                raise UsageError(f"{name}: a checkpoint that is not quantized yet", _quantize_first(name))
            check_params(str(name), folder / PARAMS)
            _snapshot(name.repo, commit, [], OWN_FILES, access)
            found.names = own
            _look_up(found, say)
            return found
        if SINGLE not in files and gguf_models(files):
            return _of_gguf(name, folder, commit, files, say, access)
    if found.is_store:
        found.names = tuple(named_files(folder / MANIFEST, store_files))
    else:
        listed = named_files(folder / INDEX, shards)
        if not all(name.endswith(".safetensors") for name in listed):
            return found  # opening it names the file: pickled weights are not fetched
        found.names = tuple(listed or [SINGLE])
        found.fallback = (SINGLE,) if listed else ()  # where the index is stale
    _look_up(found, say)
    return found


def is_commit(revision: str | None) -> bool:
    """Whether it cannot come to mean something else."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def newest_commit(name: HubName) -> str:
    """The commit that a name means now, as the hub says. Raises as `find`."""
    from huggingface_hub import HfApi

    try:
        with quiet(None):
            return str(HfApi().model_info(name.repo, revision=name.revision, timeout=QUICK).sha)
    except Exception as e:
        raise hub_error(str(name), e) from None


def free_source(repo: str) -> int:
    """Delete what qmix fetched of a repository, into the hub's cache and into its own: the bytes that this frees.
    QmixError, and nothing is deleted, where another process quantizes what is in its own."""
    from huggingface_hub import constants

    return drop_unused(repo) + blobs.free(folder_of(Path(constants.HF_HUB_CACHE), repo))


def _quantize_first(name: HubName) -> str:
    return f"quantize it first: qmix quantize {name} {name.repo.partition('/')[2]}-int4, or try qmix run {name}"


def _find_gguf(name: HubName, say: Say, access: Access) -> Found:
    folder = _snapshot(name.repo, name.revision, [], [], access)
    commit = folder.name if folder.parent.name == "snapshots" else name.revision
    return _of_gguf(name, folder, commit, _listing(name, commit, folder, access), say, access)


def _of_gguf(name: HubName, folder: Path, commit: str | None, files: Iterable[str], say: Say, access: Access) -> Found:
    model = choose_gguf(name, files)
    if name.file != model.files[0]:
        say(f"{name}: the GGUF model {', '.join(model.files)}")
    found = Found(name, folder, commit, access, model.files, gguf=model)
    _look_up(found, say)
    return found


def _listing(name: HubName, commit: str | None, folder: Path, access: Access) -> list[str]:
    """The names of all files of the repository; offline of those that are here."""
    if not is_offline(access):
        from huggingface_hub import HfApi

        try:
            with quiet(None):
                return HfApi().list_repo_files(name.repo, revision=commit)
        except Exception as e:
            here = _here(folder)
            if not any(file.endswith((".gguf", ".safetensors")) for file in here):
                raise hub_error(str(name), e) from None
            return here
    return _here(folder)


def _existing(folder: Path) -> Path:
    """The folder, or what is there of the way to it."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _here(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def is_offline(access: Access) -> bool:
    """Whether the hub must not be asked."""
    from huggingface_hub import constants

    return access.offline or bool(constants.HF_HUB_OFFLINE)


def _snapshot(repo: str, revision: str | None, names: Iterable[str], patterns: Iterable[str], access: Access,
              tries: int = 1) -> Path:
    """The folder, with those of the files that the repository has. tries: of connections that are lost."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    names, patterns = [*names], [*patterns]
    wanted, where = [*map(escape, names), *patterns], f"{repo}@{revision}" if revision else repo
    how: dict[str, Any] = {"local_files_only": True} if access.offline else {}
    if access.cache is not None:
        how["cache_dir"] = access.cache
    unsaid: Exception | None = None  # why the hub does not say how large they are
    try:
        with quiet(None):
            if not is_offline(access):
                try:
                    check_small_files(where, repo, revision, wanted)
                except QmixError:
                    raise
                except Exception as e:
                    how["local_files_only"], unsaid = True, e
            return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, **how))
    except QmixError:
        raise
    except Exception as e:  # its own, and those of whichever HTTP library its version uses
        if unsaid is not None and isinstance(e, LocalEntryNotFoundError):  # which alone says nothing of the reason
            e = unsaid
        if tries > 1 and (status_of(e) or status_of(e.__cause__ or e)) is None:
            time.sleep(1)
            return _snapshot(repo, revision, names, patterns, access, tries - 1)
        raise hub_error(where, e, access.offline) from None


def _look_up(found: Found, say: Say) -> None:
    """Fill in what of found.names is missing, and how large it is."""
    absent = [name for name in found.names if not (found.folder / name).exists()]
    if found.access.cache is not None:
        absent = [name for name in absent
                  if not link_cached(found.name.repo, found.commit, found.folder, name)]
    if not absent:
        return
    if is_offline(found.access):
        raise CheckpointError(f"{found.name}: {absent[0]}: not in the hub's cache ({len(absent)} of {len(found.names)} "
                              "files are missing), and the hub must not be asked (--offline, HF_HUB_OFFLINE)",
                              "fetch it once without --offline")
    with quiet(None), ThreadPoolExecutor(CONNECTIONS, "qmix-hub") as pool:
        asked = [pool.submit(_ask, found, name) for name in absent]
        missing, unknown, lines = [], [], []
        for name, answer in zip(absent, asked, strict=True):
            one = answer.result()
            if isinstance(one, File):
                missing.append(one)
            elif one is not None:  # an index may name what is not there
                unknown.append(name)
                lines.append(f"{found.name}: the hub does not say how large {name} is ({one}): free space is not "
                             "checked")
    for line in lines[:1]:
        say(line)
    found.missing, found.unknown = tuple(missing), tuple(unknown)


def _ask(found: Found, name: str) -> File | str | None:
    """The file, None where there is no such file, or why the hub does not tell."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    try:
        meta = get_hf_file_metadata(hf_hub_url(found.name.repo, name, revision=found.commit))
    except EntryNotFoundError:
        return None
    except (GatedRepoError, RepositoryNotFoundError) as e:
        raise hub_error(str(found.name), e) from None
    except Exception as e:
        return reason(e)
    if not meta.size or not meta.etag or not blobs.ETAG.fullmatch(meta.etag):
        return "neither size nor checksum"
    return File(name, meta.size, meta.etag, blobs.begun(found.storage, meta.etag))

"""The journal of an unfinished store: which regions are written, so that an interrupted run can continue.

journal.jsonl in OUT.partial: a first line with the arguments that decide the store's bytes, then one line per finished
region with its checksum and errors. The file appears whole (renamed into place), and each line is appended with one
write. A line says that the bytes were handed to the system, not that they survived a crash, so a resumed run compares
checksums. A torn last line is dropped.

    {"journal": 2, "arguments": {"qmix": "0.2.0", "source": "9f...", "method": "hqq", ...}}
    {"region": "layers.0.experts.0", "xxh3_128": "5e...", "error": {"w13": 0.08, "w2": 0.08, "all": 0.08}}

A calibrated region's line has "calibrated" too, as in the manifest.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qmix import __version__
from qmix.config import QuantConfig
from qmix.errors import StoreError
from qmix.store import JOURNAL, MANIFEST, Calibrated, CalibrationEntry, Manifest, record_name

VERSION = 2  # 1 named dense tensors as checkpoints do


@dataclass(frozen=True, slots=True)
class Finished:
    """A region that was written: its checksum, relative rms error by matrix (empty for plain tensors), and what
    calibration did for it, if any."""

    xxh3: str
    error: Mapping[str, float]
    calibrated: Calibrated | None = None


Arguments = dict[str, Any]


def arguments(fingerprint: str, quant: QuantConfig, calibration: CalibrationEntry | None = None) -> Arguments:
    """What must be the same for a run to go on with another's work. No bit depends on threads."""
    found = {"qmix": __version__, "source": fingerprint, **quant.to_json()}
    return found if calibration is None else {**found, "calibration": asdict(calibration)}


def differences(then: Arguments, now: Arguments) -> list[str]:
    """["method hqq, now rtn"]; empty where both runs would write the same bytes."""
    found = []
    for key in now.keys() | then.keys():
        if then.get(key) != now.get(key):
            found.append("another source checkpoint" if key == "source" else
                         "another calibration" if key == "calibration" and None not in (then.get(key), now.get(key))
                         else f"{key} {then.get(key)!r:.40}, now {now.get(key)!r:.40}")
    return sorted(found)


class Journal:
    """Open for appending. `done` holds what the journal knew when it was opened."""

    def __init__(self, fd: int, path: Path, done: dict[str, Finished]):
        self._fd = fd
        self._path = path
        self.done = done

    @classmethod
    def create(cls, folder: Path, args: Arguments, done: Mapping[str, Finished]) -> Journal:
        """A new journal in place of any old one, with what is `done` already."""
        path, draft = folder / JOURNAL, folder / (JOURNAL + ".tmp")
        lines = [json.dumps({"journal": VERSION, "arguments": args})]
        lines += [_line(name, finished) for name, finished in done.items()]
        with open(draft, "w", encoding="ascii") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        return cls(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC), path, dict(done))

    def append(self, name: str, finished: Finished) -> None:
        line = (_line(name, finished) + "\n").encode("ascii")
        try:
            written = os.write(self._fd, line)
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self._path)) from None
        if written != len(line):  # a full disk takes part of a line; the rest of this run must not follow it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def recall(folder: Path) -> tuple[Arguments, dict[str, Finished]] | None:
    """(arguments, finished regions) of the run that left `folder`, or None where there was none.

    Reads the journal; or the manifest, where a run broke off after its last write, between
    removing its journal and renaming the folder. StoreError where neither makes sense.
    """
    if (folder / JOURNAL).exists():
        return _read(folder / JOURNAL)
    if (folder / MANIFEST).exists():
        return _from_manifest(Manifest.read(folder / MANIFEST))
    return None


def _read(path: Path) -> tuple[Arguments, dict[str, Finished]]:
    head, *rest = path.read_bytes().split(b"\n")[:-1] or [b""]  # what follows the last newline is torn
    try:
        first = json.loads(head)
        args = first["arguments"]
        if first["journal"] != VERSION or not isinstance(args, dict):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise StoreError(f"{path}: its first line is not a journal's") from None
    done = {}
    for line in rest:
        try:
            value = json.loads(line)
            error = {str(k): float(v) for k, v in value["error"].items()}
            done[str(value["region"])] = Finished(str(value["xxh3_128"]), error, _calibrated(value.get("calibrated")))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            break  # what was written after a broken line cannot be trusted
    return args, done


def _from_manifest(manifest: Manifest) -> tuple[Arguments, dict[str, Finished]]:
    done = {name: Finished(d.xxh3, {} if d.error is None else {"all": d.error}, d.calibrated)
            for name, d in manifest.dense.items()}
    done.update((record_name(key), Finished(r.xxh3, dict(r.error), r.calibrated))
                for key, r in manifest.records.items())
    return arguments(manifest.fingerprint, manifest.quant, manifest.calibration), done


def _calibrated(value: Any) -> Calibrated | None:
    if value is None:
        return None
    errors = {str(k): float(v) for k, v in value["output_error"].items()}
    return Calibrated(str(value["method"]), int(value["tokens"]), errors)


def _line(name: str, finished: Finished) -> str:
    line: dict[str, Any] = {"region": name, "xxh3_128": finished.xxh3, "error": dict(finished.error)}
    if finished.calibrated is not None:
        line["calibrated"] = finished.calibrated.to_json()
    return json.dumps(line)

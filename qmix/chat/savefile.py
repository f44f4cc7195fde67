"""Conversations as files: JSON, versioned, written whole or not at all, readable by their owner only.

    {"format": "qmix-conversation", "version": 1, "model": "mixtral-int4", "system": null,
     "parameters": {"temperature": 0.7, ..., "seed": null, "stop": []},
     "messages": [{"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "Hello", "ids": [22557]}]}

seed null: random. ids null: not known, the text is encoded. Errors name the file and the field.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from qmix.chat.conversation import Conversation, Exchange
from qmix.config import SamplingParams
from qmix.errors import QmixError

FORMAT, VERSION = "qmix-conversation", 1
LARGEST = 64 << 20  # bytes; a conversation of a million tokens is a tenth of it


def save(path: Path, conversation: Conversation, params: SamplingParams) -> None:
    """Write or replace `path`. QmixError where that fails; then an older file is as it was."""
    document = {"format": FORMAT, "version": VERSION, "model": conversation.model,
                "system": conversation.system, "parameters": asdict(params),
                "messages": _messages(conversation)}
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    temporary = None
    try:
        # A private name in the same folder: mkstemp gives mode 0600, and replace needs one file system.
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except (OSError, ValueError) as e:  # ValueError: a name with a NUL byte
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        reason = e.strerror if isinstance(e, OSError) else e
        raise QmixError(f"{path}: cannot save: {reason}", "choose another file") from None


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for e in conversation.exchanges:
        found.append({"role": "user", "content": e.question})
        found.append({"role": "assistant", "content": e.answer, "ids": e.ids})
    return found


def exists(path: Path) -> bool:
    """Whether something stands under this name, a broken link included."""
    try:
        path.lstat()
    except (OSError, ValueError):  # save() says what is wrong with the name
        return False
    return True


def load(path: Path) -> tuple[Conversation, SamplingParams]:
    """Read what `save` wrote; QmixError names the file and what is wrong with it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _foreign(path, "not a regular file")
        if status.st_size > LARGEST:
            raise _foreign(path, f"{status.st_size} bytes, want at most {LARGEST}")
        raw = json.loads(path.read_bytes())
    except OSError as e:
        raise QmixError(f"{path}: cannot read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _foreign(path, f"no JSON: {e}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise _foreign(path, "no qmix conversation")
    if raw.get("version") != VERSION:
        raise _foreign(path, f"version: got {raw.get('version')!r}, this qmix reads {VERSION}")
    system = raw.get("system")
    conversation = Conversation(_text(path, raw.get("model"), "model"),
                                None if system is None else _text(path, system, "system"),
                                _exchanges(path, raw.get("messages")))
    return conversation, _params(path, raw.get("parameters"))


def _exchanges(path: Path, raw: Any) -> tuple[Exchange, ...]:
    if not isinstance(raw, list) or not all(isinstance(m, dict) for m in raw):
        raise _foreign(path, "messages: want a list of objects")
    roles = [m.get("role") for m in raw]
    if roles != ["user", "assistant"] * (len(raw) // 2):
        raise _foreign(path, "messages: want user and assistant in turn")
    found = []
    for n in range(0, len(raw), 2):
        ids = raw[n + 1].get("ids")
        if ids is not None and not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
            raise _foreign(path, f"messages[{n + 1}].ids: want token ids or null")
        found.append(Exchange(_text(path, raw[n].get("content"), f"messages[{n}].content"),
                              _text(path, raw[n + 1].get("content"), f"messages[{n + 1}].content"),
                              None if ids is None else tuple(ids)))
    return tuple(found)


def _text(path: Path, value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _foreign(path, f"{field}: want a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # "\\ud800" is JSON but no Unicode text
        raise _foreign(path, f"{field}: half a surrogate pair") from None
    return value


def _params(path: Path, raw: Any) -> SamplingParams:
    kinds: dict[str, tuple[type, ...]] = {f.name: (int, float) if "float" in str(f.type) else (int,)
                                          for f in fields(SamplingParams)}
    kinds |= {"seed": (int, type(None)), "stop": (list,)}
    if not isinstance(raw, dict):
        raise _foreign(path, "parameters: want an object")
    for name, value in raw.items():
        if name not in kinds:
            raise _foreign(path, f"parameters.{name}: no such parameter")
        if isinstance(value, bool) or not isinstance(value, kinds[name]):
            raise _foreign(path, f"parameters.{name}: got {value!r}")
    stop = tuple(_text(path, text, "parameters.stop") for text in raw.get("stop", ()))
    try:
        return SamplingParams(**{**raw, "stop": stop})
    except QmixError as e:
        raise _foreign(path, f"parameters.{e.message}") from None


def _foreign(path: Path, what: str) -> QmixError:
    return QmixError(f"{path}: {what}")


class Autosave:
    """The last conversation with a model, in the state folder, so that --continue finds it.

    A new conversation does not overwrite the one before it: that stays beside it as *.previous.json.
    """

    def __init__(self, state_dir: Path, model: str):
        readable = re.sub(r"[^\w.-]+", "_", model)[-60:].lstrip(".")
        name = f"{readable}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
        self.path = state_dir / "chats" / f"{name}.json"
        self.previous = self.path.with_name(f"{name}.previous.json")
        self._fresh = True

    def start_new(self) -> None:
        """What is saved from now on is another conversation."""
        self._fresh = True

    def save(self, conversation: Conversation, params: SamplingParams) -> None:
        """QmixError where the folder cannot be written."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._fresh and self.path.exists():
                self.path.replace(self.previous)
        except OSError as e:
            raise QmixError(f"{self.path}: cannot save: {e.strerror or e}") from None
        save(self.path, conversation, params)
        self._fresh = False

    def load(self) -> tuple[Conversation, SamplingParams] | None:
        """The last conversation, to be gone on with; None where there is none."""
        if not self.path.exists():
            return None
        found = load(self.path)
        self._fresh = False
        return found

"""Conversations as JSON documents, versioned.

    {"format": "qmix-conversation", "version": 1, "model": "mixtral-int4", "system": null,
     "parameters": {"temperature": 0.7, ..., "seed": null, "stop": []},
     "messages": [{"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "Hello", "ids": [22557]}]}

seed null: random. ids null: not known, the text is encoded. A model that thinks before it answers has its thoughts in
"reasoning" beside the answer, and an answer that calls tools has "calls": [{"name": "f", "arguments": "{}"}], the
arguments as the model wrote them. Errors name the file and the field.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from qmix.chat.conversation import Conversation, Exchange
from qmix.chat.parameters import FIELDS
from qmix.config import SamplingParams
from qmix.errors import QmixError
from qmix.tokenizer import Call

FORMAT, VERSION = "qmix-conversation", 1
KEPT = tuple(field for field, _ in FIELDS.values())  # of SamplingParams: what a chat can set


def written(conversation: Conversation, params: SamplingParams) -> str:
    """The document of a conversation."""
    document = {"format": FORMAT, "version": VERSION, "model": conversation.model,
                "system": conversation.system, "parameters": {name: getattr(params, name) for name in KEPT},
                "messages": _messages(conversation)}
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for e in conversation.exchanges:
        found.append({"role": "user", "content": e.question})
        more: dict[str, Any] = {} if e.reasoning is None else {"reasoning": e.reasoning}
        if e.calls:
            more["calls"] = [call._asdict() for call in e.calls]
        found.append({"role": "assistant", "content": e.answer, "ids": e.ids, **more})
    return found


def parsed(path: Path, data: bytes) -> tuple[Conversation, SamplingParams]:
    """What `written` gave. path: what errors name."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise foreign(path, f"no JSON: {e}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise foreign(path, "no qmix conversation")
    if raw.get("version") != VERSION:
        raise foreign(path, f"version: got {raw.get('version')!r}, this qmix reads {VERSION}")
    system = raw.get("system")
    conversation = Conversation(_text(path, raw.get("model"), "model"),
                                None if system is None else _text(path, system, "system"),
                                _exchanges(path, raw.get("messages")))
    return conversation, _params(path, raw.get("parameters"))


def _exchanges(path: Path, raw: Any) -> tuple[Exchange, ...]:
    if not isinstance(raw, list) or not all(isinstance(m, dict) for m in raw):
        raise foreign(path, "messages: want a list of objects")
    roles = [m.get("role") for m in raw]
    if roles != ["user", "assistant"] * (len(raw) // 2):
        raise foreign(path, "messages: want user and assistant in turn")
    found = []
    for n in range(0, len(raw), 2):
        ids = raw[n + 1].get("ids")
        if ids is not None and not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
            raise foreign(path, f"messages[{n + 1}].ids: want token ids or null")
        thought = raw[n + 1].get("reasoning")
        found.append(Exchange(_text(path, raw[n].get("content"), f"messages[{n}].content"),
                              _text(path, raw[n + 1].get("content"), f"messages[{n + 1}].content"),
                              None if ids is None else tuple(ids),
                              None if thought is None else _text(path, thought, f"messages[{n + 1}].reasoning"),
                              _calls(path, raw[n + 1].get("calls", []), f"messages[{n + 1}].calls")))
    return tuple(found)


def _calls(path: Path, raw: Any, field: str) -> tuple[Call, ...]:
    if not isinstance(raw, list) or not all(isinstance(call, dict) and call.get("name") for call in raw):
        raise foreign(path, f"{field}: want a list of objects with a name")
    return tuple(Call(_text(path, call["name"], f"{field}.name"),
                      _text(path, call.get("arguments"), f"{field}.arguments")) for call in raw)


def _text(path: Path, value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise foreign(path, f"{field}: want a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # "\\ud800" is JSON but no Unicode text
        raise foreign(path, f"{field}: half a surrogate pair") from None
    return value


def _params(path: Path, raw: Any) -> SamplingParams:
    kinds: dict[str, tuple[type, ...]] = {f.name: (int, float) if "float" in str(f.type) else (int,)
                                          for f in fields(SamplingParams) if f.name in KEPT}
    kinds |= {"seed": (int, type(None)), "stop": (list,)}
    if not isinstance(raw, dict):
        raise foreign(path, "parameters: want an object")
    for name, value in raw.items():
        if name not in kinds:
            raise foreign(path, f"parameters.{name}: no such parameter")
        if isinstance(value, bool) or not isinstance(value, kinds[name]):
            raise foreign(path, f"parameters.{name}: got {value!r}")
    stop = tuple(_text(path, text, "parameters.stop") for text in raw.get("stop", ()))
    try:
        return SamplingParams(**{**raw, "stop": stop})
    except QmixError as e:
        raise foreign(path, f"parameters.{e.message}") from None


def foreign(path: Path, what: str) -> QmixError:
    return QmixError(f"{path}: {what}")

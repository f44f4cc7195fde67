"""The arguments of a call as an object, whatever a model or a client wrote."""

from __future__ import annotations

import json
from typing import Any

from qmix.serve.body import DEEPEST, depth, refuse_constant


def arguments_object(text: str) -> dict[str, Any]:
    """The object that `text` spells in JSON. What is none, or none that every client can read (NaN, infinities, half a
    character, more than DEEPEST levels), stands as it is under one key, so that nobody loses it."""
    try:
        found = json.loads(text or "{}", parse_constant=refuse_constant)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # 1e999, "\\ud800"
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) and depth(found) <= DEEPEST else {"arguments": text}

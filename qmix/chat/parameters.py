"""/set: sampling parameters under the names of the command line's flags.

    temp top-p top-k min-p repeat-penalty seed max-tokens stop

A seed of None means random: the chat then draws one, shows it, and draws another for /regen.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from qmix.config import SamplingParams
from qmix.errors import ConfigError, UsageError

FIELDS: dict[str, tuple[str, type]] = {
    "temp": ("temperature", float),
    "top-p": ("top_p", float),
    "top-k": ("top_k", int),
    "min-p": ("min_p", float),
    "repeat-penalty": ("repeat_penalty", float),
    "seed": ("seed", int),
    "max-tokens": ("max_tokens", int),
    "stop": ("stop", tuple),
}


def changed(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """params with one value set from what was typed; UsageError names the key and the value."""
    known(name)
    field, kind = FIELDS[name]
    try:
        return replace(params, **{field: _value(name, kind, text)})
    except ConfigError as e:
        wrong = e.message.removeprefix(f"{field}: ")
        raise UsageError(f"{name}: {wrong}; {shown(params, name)} is kept") from None


def known(name: str) -> None:
    """UsageError where there is no parameter of that name."""
    if name not in FIELDS:
        raise UsageError(f"/set {name}: no such parameter", f"one of: {', '.join(FIELDS)}")


def _value(name: str, kind: type, text: str) -> Any:
    if kind is tuple:
        return () if text == "none" else _stops(text)
    if name == "seed" and text == "random":
        return None
    try:
        return kind(text)
    except ValueError:
        want = "a number" if kind is float else "an integer"
        raise ConfigError(f"got {text!r}, want {want}{' or random' if name == 'seed' else ''}") from None


def _stops(text: str) -> tuple[str, ...]:
    """Words as a shell splits them, "\\n" and "\\t" inside double quotes as newline and tab."""
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise ConfigError(f"got {text!r}: {str(e).lower()}") from None
    return tuple(word.replace("\\n", "\n").replace("\\t", "\t") for word in words)


def shown(params: SamplingParams, name: str) -> str:
    """`temp 0.7`, `seed random`, `stop "\\n\\n"`, `stop none`"""
    value = getattr(params, FIELDS[name][0])
    if name == "seed" and value is None:
        return "seed random"
    if name == "stop":
        texts = " ".join('"' + s.replace("\n", "\\n").replace("\t", "\\t") + '"' for s in value)
        return f"stop {texts or 'none'}"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def listed(params: SamplingParams) -> str:
    """All of them on one line."""
    return " · ".join(shown(params, name) for name in FIELDS)

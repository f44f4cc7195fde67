"""Names of modules as a quantization_config lists them.

A text may be a module's name, the end of one ("lm_head", "mlp.gate"), the beginning of one ("model.visual"), or such
with `*`; compressed-tensors has regular expressions, "re:.*self_attn.*". A stranger's regular expression can take
hours, so only those are taken that cannot: no group is repeated, nothing looks ahead or back, and at most six parts are
repeated, on names of at most 256 characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from qmix.errors import ConfigError

LONGEST = 256  # characters of a name or pattern
REPEATED = 6
MOST = 65536  # names in a list; Qwen's FP8 checkpoints have some hundred
# Letters, classes, escapes, alternatives in plain groups; a quantifier only behind a single character or class.
SAFE = re.compile(r"(?:\((?:\?:)?|\)(?![*+?{])|[|^$]|(?:[\w.:/ -]|\\[.dwDWsS_-]|\[\^?[\w.-]+\])"
                  r"(?:[*+?]|\{\d{1,2}\})?)*", re.ASCII)


@cache
def expression(text: str) -> re.Pattern[str]:
    """Of a regular expression out of a file; ConfigError where it is none, or one that could take hours."""
    if len(text) > LONGEST or not SAFE.fullmatch(text) or len(re.findall(r"[*+]", text)) > REPEATED:
        raise ConfigError(f"got the pattern {text!r:.80}, want one without repeated groups and look-arounds, of at "
                          f"most {LONGEST} characters and {REPEATED} repeats", "list the modules by name")
    try:
        return re.compile(text)
    except re.error as e:
        raise ConfigError(f"got {text!r:.80}, which is no regular expression ({e})") from None


def names_module(text: str, module: str) -> bool:
    """Whether `text`, of a list of modules that are left as they are, is about `module`."""
    if text.startswith("re:"):
        return len(module) <= LONGEST and expression(text[3:]).match(module) is not None
    if "*" in text:
        return len(module) <= LONGEST and _wildcard(text).match(module) is not None
    return module == text or module.endswith("." + text) or module.startswith(text + ".")


@cache
def _wildcard(text: str) -> re.Pattern[str]:
    """Up to the end of a part of the name: "model.layers.*.self_attn" is about ...self_attn.q_proj too."""
    if len(text) > LONGEST or text.count("*") > REPEATED:
        raise ConfigError(f"got {text!r:.80}, want at most {LONGEST} characters and {REPEATED} times *",
                          "list the modules by name")
    return re.compile(".*".join(map(re.escape, re.split(r"\.?\*", text))) + r"(?=\.|$)")


def check_patterns(texts: Iterable[str], where: str) -> tuple[str, ...]:
    """`texts`, all of them usable; ConfigError names the key `where`."""
    found = tuple(texts)
    if len(found) > MOST:
        raise ConfigError(f"{where}: got {len(found)} names, want at most {MOST}")
    for text in found:
        try:
            names_module(text, "")
        except ConfigError as e:
            raise ConfigError(f"{where}: {e.message}", e.cure) from None
    return found

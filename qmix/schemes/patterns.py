"""Names of modules as a quantization_config lists them.

A text may be a module's name, the end of one ("lm_head", "mlp.gate"), the beginning of one ("model.visual"), or such
with `*`; compressed-tensors has regular expressions, "re:.*self_attn.*". A stranger's regular expression can take
hours, so only those are taken that cannot: no group is repeated, nothing looks ahead or back, at most four parts are
repeated or optional, and alternatives make few ways in all, on names of at most 100 characters (no real one is as
long).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from qmix.errors import ConfigError

LONGEST_NAME, LONGEST = 100, 256  # characters of a module's name, and of a pattern
REPEATED = 4
WAYS = (64, 64, 64, 64, 4)  # through the alternatives of a pattern, by its repeats: each is tried at all their lengths
MOST, MOST_PATTERNS = 65536, 512  # in a list; Qwen's FP8 checkpoints name some hundred modules
# Letters, classes, escapes, alternatives in plain groups; a quantifier only behind a single character or class.
SAFE = re.compile(r"(?:\((?:\?:)?|\)(?![*+?{])|[|^$]|(?:[\w.:/ -]|\\[.dwDWsS_-]|\[\^?[\w.-]+\])"
                  r"(?:[*+?]|\{\d{1,2}\})?)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Names:
    """A list of modules. plain: those that are names, or ends or beginnings of them; patterns: the others."""

    plain: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()

    @classmethod
    def of(cls, texts: Iterable[str], where: str) -> Names:
        """ConfigError, which names the key `where`, for too many of them or a pattern that is not taken."""
        found = dict.fromkeys(texts)
        patterns = tuple(text for text in found if text.startswith("re:") or "*" in text)
        if len(found) > MOST or len(patterns) > MOST_PATTERNS:
            raise ConfigError(f"{where}: got {len(found)} names, {len(patterns)} of them patterns, want at most {MOST} "
                              f"and {MOST_PATTERNS}", "list fewer")
        for text in patterns:
            try:
                _compiled(text)
            except ConfigError as e:
                raise ConfigError(f"{where}: {e.message}", e.cure) from None
        return cls(frozenset(found).difference(patterns), patterns)

    def __bool__(self) -> bool:
        return bool(self.plain or self.patterns)

    def which(self, module: str) -> str | None:
        """The text that is about `module`, or None."""
        if self.plain:
            parts = module.split(".", 64)
            for i in range(len(parts)):
                for text in (".".join(parts[i:]), ".".join(parts[:i + 1])):
                    if text in self.plain:
                        return text
        if len(module) > LONGEST_NAME:
            return None
        return next((text for text in self.patterns if _compiled(text).match(module)), None)


@cache
def _compiled(text: str) -> re.Pattern[str]:
    """Of "re:..." or a name with `*`. The latter is about what lies below it too: "model.layers.*.self_attn" about
    model.layers.3.self_attn.q_proj."""
    if not text.startswith("re:"):
        if len(text) > LONGEST or text.count("*") > REPEATED:
            raise ConfigError(f"got {text!r:.80}, want at most {LONGEST} characters and {REPEATED} times *",
                              "list the modules by name")
        return re.compile(".*".join(map(re.escape, re.split(r"\.?\*", text))) + r"(?=\.|$)")
    pattern = text[3:]
    repeats = len(re.findall(r"[*+?]", pattern.replace("(?:", "(")))
    if len(pattern) > LONGEST or not SAFE.fullmatch(pattern) or repeats > REPEATED:
        raise ConfigError(f"got the pattern {pattern!r:.80}, want one without repeated groups and look-arounds, of at "
                          f"most {LONGEST} characters and {REPEATED} repeats", "list the modules by name")
    if (ways := _ways(pattern)) > WAYS[repeats]:
        raise ConfigError(f"got the pattern {pattern!r:.80}, whose alternatives make {ways} ways, want at most "
                          f"{WAYS[repeats]} beside {repeats} repeats", "list the modules by name")
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ConfigError(f"got {pattern!r:.80}, which is no regular expression ({e})") from None


def _ways(pattern: str) -> int:
    """Through the alternatives of a pattern that is SAFE.

    _ways("(q|k)_proj|x(a|b)(c|d)") == 6
    """
    groups = [(0, 1)]  # of each open one: ways of the alternatives that have ended, and of the one at hand
    for c in re.sub(r"\\.", "", pattern):
        done, last = groups[-1]
        if c == "|":
            groups[-1] = done + last, 1
        elif c == "(":
            groups.append((0, 1))
        elif c == ")" and len(groups) > 1:  # with another number of brackets it is no regular expression
            groups.pop()
            groups[-1] = groups[-1][0], groups[-1][1] * (done + last)
    return sum(groups[0])

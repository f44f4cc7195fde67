"""Mutations of bytes, of JSON and of texts, each decided by its seed alone."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 255, 2**15, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -2**63, 10**9,
           10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "x", "\0", "\x1b[2J", "../../x", "/etc/passwd", "a\nb", "\ud800", "é" * 9, "9" * 50, "x" * 5000, "true",
         "nan")
CONTAINERS = ([], {}, [[]], [None], {"": None}, [0] * 300, [[[[[[]]]]]], {"a": {"a": {"a": 1}}})
VALUES = (None, True, False, *NUMBERS, *TEXTS, *CONTAINERS)
BOUNDARIES = ("B", "<H", "<I", "<Q")


def mutate_bytes(raw: bytes, dice: random.Random, head: int | None = None) -> bytes:
    """Bits flipped, cut, doubled, or a length overwritten; mostly in the first `head` bytes."""
    data = bytearray(raw)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        room = min(head, len(data)) if head and dice.random() < 0.8 else len(data)
        at, kind = dice.randrange(max(1, room)), dice.randrange(7)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << dice.randrange(8)
        elif kind == 2:
            code = dice.choice(BOUNDARIES)
            size = struct.calcsize(code)
            number = dice.choice([n for n in NUMBERS if type(n) is int and 0 <= n < 256**size])
            data[at:at + size] = struct.pack(code, number)
        elif kind == 3:
            end = at + dice.randrange(1, 64)
            data[at:at] = data[at:end]
        elif kind == 4:
            del data[at:at + dice.randrange(1, 64)]
        elif kind == 5:
            data[at:at + dice.randrange(4)] = dice.choice((b"\xff\xfe", b"\0", b"{", b"}", b'"', b"[", b"\\u", b"-"))
        else:
            other = dice.randrange(max(1, room))
            data[at:at + 8], data[other:other + 8] = data[other:other + 8], data[at:at + 8]
    return bytes(data)


def mutate_json(value: Any, dice: random.Random) -> Any:
    """A copy in which one to three values or keys are others, gone, doubled or moved."""
    found = copy.deepcopy(value)
    for _ in range(dice.choice((1, 1, 2, 3))):
        places = list(_places(found))
        if not places:
            return dice.choice(VALUES)
        owner, key = dice.choice(places)
        kind = dice.randrange(8)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            other = dice.choice(TEXTS) if dice.random() < 0.5 else dice.choice(list(owner))
            owner[other] = owner.pop(key)
        elif kind == 2:
            owner[key] = copy.deepcopy(dice.choice([o[k] for o, k in places]))
        elif kind == 3:
            owner[key] = [copy.deepcopy(owner[key])]
        elif kind == 4 and isinstance(owner, list):
            owner.insert(dice.randrange(len(owner) + 1), copy.deepcopy(owner[key]))
        elif kind == 5 and type(owner[key]) in (int, float):
            owner[key] = dice.choice((-owner[key], owner[key] + 1, owner[key] - 1, owner[key] * 1000, str(owner[key])))
        elif kind == 6 and isinstance(owner[key], str):
            owner[key] = owner[key][:dice.randrange(len(owner[key]) + 1)] + dice.choice(TEXTS)
        else:
            owner[key] = copy.deepcopy(dice.choice(VALUES))
    return found


def _places(value: Any) -> Any:
    """(owner, key) of every value in a nested one; of long lists the first and last few."""
    if isinstance(value, dict):
        keys: Any = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    else:
        return
    for key in keys if len(keys) < 64 else [*keys[:24], *keys[-24:]]:
        yield value, key
        yield from _places(value[key])


def as_json(value: Any, dice: random.Random) -> bytes:
    """The bytes of a JSON text, now and then with a mark in front, a key twice, or broken."""
    raw = json.dumps(value).encode("utf-8", "surrogatepass")
    kind = dice.randrange(20)
    if kind == 0:
        return b"\xef\xbb\xbf" + raw
    if kind == 1 and raw.startswith(b"{") and len(raw) > 2:
        return raw[:-1] + b", " + raw[1:]
    return mutate_bytes(raw, dice) if kind < 5 else raw


def mutate_safetensors(raw: bytes, dice: random.Random) -> bytes:
    """The header's JSON mutated and its length set right, or the file's bytes."""
    length = struct.unpack("<Q", raw[:8])[0]
    if dice.random() < 0.4:
        return mutate_bytes(raw, dice, 8 + length)
    text = as_json(mutate_json(json.loads(raw[8:8 + length]), dice), dice)
    return struct.pack("<Q", len(text)) + text + raw[8 + length:]


# --- chat templates ---

ATOMS = ("messages", "messages[0].content", "'ab'", "x", "ns.x", "ns", "9", "9999999999", "2 ** 60", "0.5", "none",
         "true",
         "[1, [2]]", "{'a': [1]}", "(1, 2)", "range(9999)", "'%9s{0:>9}'", "bos_token", "namespace", "loop", "tools",
         "''",
         "'\\t\\n' * 999", "dict(a=1)", "raise_exception", "self", "cycler(1, 2)", "joiner('x')", "messages.__class__")
FILTERS = ("abs", "attr", "batch", "capitalize", "center", "default", "dictsort", "escape", "filesizeformat", "first",
           "float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map",
           "max",
           "min", "pprint", "reject", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort",
           "string", "striptags", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "urlencode",
           "urlize",
           "wordcount", "wordwrap", "xmlattr")
METHODS = ("center", "count", "encode", "endswith", "expandtabs", "find", "format", "format_map", "get", "index",
           "items",
           "join", "keys", "ljust", "lower", "lstrip", "maketrans", "partition", "replace", "rjust", "rsplit", "split",
           "splitlines", "strip", "swapcase", "title", "translate", "update", "upper", "values", "zfill", "append",
           "pop",
           "to_bytes", "bit_length", "hex", "copy", "next", "reset", "__class__", "casefold", "removeprefix")
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or", "if x else")


def expression(dice: random.Random, depth: int = 0) -> str:
    if depth > 4 or dice.random() < 0.25:
        return dice.choice(ATOMS)
    inner = expression(dice, depth + 1)
    kind = dice.randrange(6)
    if kind == 0:
        return f"({inner} {dice.choice(OPERATORS)} {expression(dice, depth + 1)})"
    given = ", ".join(expression(dice, depth + 2) for _ in range(dice.randrange(3)))
    if kind <= 2:
        return f"({inner} | {dice.choice(FILTERS)}{f'({given})' if given else ''})"
    if kind == 3:
        return f"({inner}).{dice.choice(METHODS)}({given})"
    if kind == 4:
        return f"({inner})[{dice.choice(('0', '1:', '::-1', repr('a'), inner))}]"
    return dice.choice((f"[{inner}, {inner}]", f"{{'a': {inner}}}", f"({inner},) * 99", f"({inner}) * 9999",
                        f"({inner} | map({dice.choice(FILTERS)!r}, {dice.choice(ATOMS)}) | list)"))


def template(dice: random.Random) -> str:
    """A program in the templates' language that a stranger might have written."""
    parts = ["{% set x = ", dice.choice(("'ab'", "'a' * 4000000", "messages[0].content * 20", "[0] * 99999",
    "3 ** 50")),
             " %}{% set ns = namespace(x=x) %}"]
    for _ in range(dice.randrange(1, 5)):
        one = expression(dice)
        parts.append(dice.choice((
            f"{{{{ {one} }}}}", f"{{{{ {one} }}}}", f"{{% set x = {one} %}}", f"{{% set ns.x = {one} %}}",
            f"{{% for m in {one} %}}{{% set ns.x = {expression(dice)} %}}{{{{ m }}}}{{% endfor %}}",
            f"{{% for i in range(9999) %}}{{% set ns.x = [ns.x, {expression(dice, 2)}] %}}{{% endfor %}}",
            f"{{% macro f(a) %}}{{{{ {one} }}}}{{{{ a }}}}{{% endmacro %}}{{{{ f({expression(dice, 3)}) }}}}",
            f"{{% set y %}}{{{{ {one} }}}}{{% endset %}}{{{{ y ~ y }}}}",
            f"{{% if {one} %}}a{{% else %}}b{{% endif %}}",
            f"{{% filter {dice.choice(FILTERS)} %}}{{{{ {one} }}}}{{% endfilter %}}")))
    source = "".join(parts)
    return mutate_bytes(source.encode(), dice).decode("utf-8", "replace") if dice.random() < 0.1 else source

"""Whether a regular expression of a tokenizer.json ends soon on every text.

The tokenizers library matches by trying: Oniguruma gives up a single match after ten million tries, but begins anew at
the next character, so that an expression like `.*.*.*x` takes hours for a page of text, during which nothing can be
interrupted. `why_slow` bounds the tries of one match from the expression alone:

    tries <= choices * n^degree      n: characters of the text

A repetition counts only where something that may fail comes behind it, for only then are its lengths tried one after
the other: `\\s+(?!\\S)` has degree 1, and ` ?\\p{L}+` has 0. Published expressions have degree 1 at most, and their
repeated characters are all letters or all white space, whose runs are short. One that repeats both runs through the
whole text.

What is counted is Oniguruma's syntax for Ruby (its doc/RE), as far as such expressions use it; the rest is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

MAX_LENGTH = 16_384  # characters of an expression
MAX_DEPTH = 20  # groups in groups
MAX_CHOICES = 64  # gpt-oss has 38
FEW = 16  # a repetition between two counts that are no farther apart counts as so many choices
QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")
OPTIONS = re.compile(r"\?([imx-]*)(:|\))")
GROUPS = {"?:": "group", "?=": "ahead", "?!": "ahead", "?<=": "behind", "?<!": "behind", "?>": "atomic"}
PROPERTY = re.compile(r"\\[pP]\{\^?[\w ]{1,40}\}|\\x\{[0-9a-fA-F]{1,8}\}|\\x[0-9a-fA-F]{1,2}|\\u[0-9a-fA-F]{4}")
OPTION = "(?)"
UNKNOWN = frozenset("kgKRXNOyYpPxuoCMc0123456789")  # escapes that are more than one character, or may be
PLACES = frozenset("bBAzZG")  # escapes that match no character


class _Unknown(ValueError):
    """Syntax that is not counted here."""


@dataclass(frozen=True, slots=True)
class _Cost:
    """Of what is in a group. empty: whether it may match nothing, and so cannot fail; fixed: whether it has one
    length; long: whether a repetition that is tried length by length may run through words and spaces."""

    choices: int = 1
    degree: int = 0
    empty: bool = False
    fixed: bool = True
    long: bool = False


@dataclass(frozen=True, slots=True)
class _Item:
    """An atom with how often it comes. body: the alternatives of a group, each a sequence."""

    kind: str  # "char", "place", "group", "ahead", "behind", "atomic"
    text: str = ""
    body: tuple[tuple[_Item, ...], ...] = ()
    least: int = 1
    most: int | None = 1
    possessive: bool = False


def why_slow(pattern: str, matches: Callable[[str, str], bool]) -> str | None:
    """Why an expression may take long on some text, None where it does not. matches(atom, character): whether an atom
    of an expression, such as \\p{L} or [^a], matches a character."""
    if len(pattern) > MAX_LENGTH:
        return f"has {len(pattern)} characters, want at most {MAX_LENGTH}"
    try:
        body, end = _alternatives(pattern, 0, 0)
        if end != len(pattern):
            raise _Unknown("a bracket without its other")
        cost = _of_group(body, False, matches)
    except _Unknown as e:
        return f"has {e}"
    if cost.degree > 1:
        return "repeats within a repetition, or tries more than one repetition length by length"
    if cost.long:
        return "tries a repetition that runs through whole texts length by length"
    if cost.choices > MAX_CHOICES:
        return f"has {cost.choices} ways to go on, want at most {MAX_CHOICES}"
    return None


# --- reading ---

def _alternatives(pattern: str, at: int, depth: int) -> tuple[tuple[tuple[_Item, ...], ...], int]:
    """(what stands between | up to a closing bracket or the end, where that is)."""
    if depth > MAX_DEPTH:
        raise _Unknown(f"more than {MAX_DEPTH} groups in groups")
    found: list[tuple[_Item, ...]] = []
    items: list[_Item] = []
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            found.append(tuple(items))
            items = []
            at += 1
            continue
        item, at = _atom(pattern, at, depth)
        if item.text == OPTION and items:  # it would take in all alternatives behind it
            raise _Unknown("an option in the middle")
        item, at = _repeated(item, pattern, at)
        items.append(item)
    return (*found, tuple(items)), at


def _atom(pattern: str, at: int, depth: int) -> tuple[_Item, int]:
    c = pattern[at]
    if c == "(":
        return _group(pattern, at + 1, depth)
    if c == "[":
        end = _class_end(pattern, at)
        return _Item("char", pattern[at:end]), end
    if c in "*+?":
        raise _Unknown(f"a {c} of nothing")
    if c in "^$":
        return _Item("place", c), at + 1
    if c != "\\":
        return _Item("char", c if c == "." else re.escape(c)), at + 1
    if found := PROPERTY.match(pattern, at):
        return _Item("char", found[0]), found.end()
    follows = pattern[at + 1:at + 2]
    if follows in PLACES and follows:
        return _Item("place", follows), at + 2
    if not follows or follows in UNKNOWN:
        raise _Unknown(f"\\{follows}, whose cost is not known")
    return _Item("char", "\\" + follows), at + 2


def _group(pattern: str, at: int, depth: int) -> tuple[_Item, int]:
    kind = "group"
    if pattern[at:at + 1] == "*":
        raise _Unknown("a callout")
    if pattern[at:at + 1] == "?":
        options = OPTIONS.match(pattern, at)
        start = next((start for start in GROUPS if pattern.startswith(start, at)), None)
        if start is not None:
            kind, at = GROUPS[start], at + len(start)
        elif options is not None and "x" not in options[1]:
            at = options.end()
            if options[2] == ")":
                return _Item("place", OPTION), at
        else:
            raise _Unknown(f"a group that begins with ({pattern[at:at + 3]}, whose cost is not known")
    body, end = _alternatives(pattern, at, depth + 1)
    if end >= len(pattern):
        raise _Unknown("a bracket without its other")
    return _Item(kind, body=body), end + 1


def _class_end(pattern: str, at: int) -> int:
    """Behind the bracket that closes a class of characters; classes may stand in classes."""
    depth, first = 0, at
    while at < len(pattern):
        c = pattern[at]
        if c == "\\":
            at += 1
        elif c == "[":
            depth, first = depth + 1, at
        elif c == "]" and not (at == first + 1 or (at == first + 2 and pattern[first + 1] == "^")):
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    raise _Unknown("a class of characters without an end")


def _repeated(item: _Item, pattern: str, at: int) -> tuple[_Item, int]:
    """The atom with the quantifier behind it, if there is one."""
    found = QUANTIFIER.match(pattern, at)
    if found is None or (found[0][0] == "{" and not (found[1] or found[3])):
        return item, at
    if item.kind != "char" and item.kind not in ("group", "atomic"):
        raise _Unknown("a repetition of a place in the text")
    if found[0][0] == "{":
        if max(len(found[1]), len(found[3])) > 6:
            raise _Unknown("a repetition of more than 999999 times")
        least = int(found[1] or 0)
        most = (int(found[3]) if found[3] else None) if found[2] else least
    else:
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[0]]
    at = found.end()
    possessive = False
    if at < len(pattern) and pattern[at] in "?+" and found[0][0] != "{":
        possessive, at = pattern[at] == "+", at + 1
    elif at < len(pattern) and pattern[at] == "?" and least != most:
        at += 1
    if QUANTIFIER.match(pattern, at):
        raise _Unknown("a repetition of a repetition")
    return _Item(item.kind, item.text, item.body, least, most, possessive), at


# --- counting ---

def _of_group(body: tuple[tuple[_Item, ...], ...], after: bool, matches: Callable[[str, str], bool]) -> _Cost:
    """after: whether something that may fail comes behind it."""
    costs = [_of_sequence(items, after, matches) for items in body]
    return _Cost(sum(cost.choices for cost in costs), max(cost.degree for cost in costs),
                 any(cost.empty for cost in costs), len(costs) == 1 and costs[0].fixed,
                 any(cost.long for cost in costs))


def _of_sequence(items: tuple[_Item, ...], after: bool, matches: Callable[[str, str], bool]) -> _Cost:
    choices, degree, empty, fixed, long = 1, 0, True, True, False
    for item in reversed(items):
        cost = _of_item(item, after, matches)
        choices, degree = min(choices * cost.choices, 10**9), degree + cost.degree
        empty, fixed, long = empty and cost.empty, fixed and cost.fixed, long or cost.long
        after = after or not cost.empty or item.kind in ("place", "ahead", "behind")
    return _Cost(choices, degree, empty, fixed, long)


def _of_item(item: _Item, after: bool, matches: Callable[[str, str], bool]) -> _Cost:
    if item.kind == "place":
        return _Cost(empty=True)
    if item.kind in ("ahead", "behind"):  # what is looked at is not tried again, but looked through each time
        inner = _of_group(item.body, True, matches)
        return _Cost(inner.choices, inner.degree, True, True, inner.long)
    if item.kind == "char":
        inner = _Cost()
    else:
        inner = _of_group(item.body, after and item.kind != "atomic" and not item.possessive, matches)
    once = item.least == item.most == 1
    if once:
        return inner
    tried = after and not item.possessive
    empty = inner.empty or item.least == 0
    if item.most == 1:  # optional
        return _Cost(inner.choices + (1 if tried else 0), inner.degree, True, False, inner.long)
    if inner.choices > 1 or inner.degree or not inner.fixed or inner.empty:
        raise _Unknown("a repetition of what has several lengths or ways to match")
    if item.most is not None and item.most - item.least <= FEW:
        return _Cost(item.most - item.least + 1 if tried else 1, 0, empty, item.most == item.least)
    return _Cost(1, 1 if tried else 0, empty, False, tried and _runs_on(item, matches))


def _runs_on(item: _Item, matches: Callable[[str, str], bool]) -> bool:
    """Whether what is repeated takes both letters and spaces."""
    atoms = _atoms(item)
    return all(any(matches(atom, c) for atom in atoms) for c in "e ")


def _atoms(item: _Item) -> list[str]:
    if item.kind == "char":
        return [item.text]
    return [atom for items in item.body for inner in items for atom in _atoms(inner)]

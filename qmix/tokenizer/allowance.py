"""What one rendering of a chat template may use: steps, work and memory, counted and not timed, so that a template is
refused or accepted alike on every machine.

    steps   lines of compiled template that are run
    work    characters that operations look at, and a fixed price for each call
    made    bytes of all texts and lists that operations make, freed or not
    value   characters of a single text, items of a single list

Most operations are charged for what they made. One that could make a huge value by itself ('x'.center(10**10)) is
refused before it runs: `check_method` and `check_filter` know how long the results of text methods and filters get.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from qmix.tokenizer.traced import Traced, plain

MAX_STEPS = 2_000_000  # 5 to 20 seconds
MAX_WORK = 2**30  # a few seconds, whatever the operations
MAX_MADE = 2**28
MAX_VALUE = 2**22
MAX_OUTPUT = 2**26  # characters of a rendered conversation, and of a list or object that is written out
MAX_BITS = 4096  # of a whole number: far more than any text needs, and too few to take time
MAX_SLOW = 2**16  # characters for filters that take more time than characters
MAX_DEPTH = 200  # of lists in lists
MAX_ITEMS = 2**19  # of a list and all lists in it
MAX_PIECES = 2**20  # of a text that is split or listed
CALL = 1000  # of work
PIECE = 160  # bytes of a piece of a text that is followed
SLOW = frozenset({"pprint", "striptags", "title", "urlize", "wordcount", "wordwrap", "xmlattr"})
LISTING = frozenset({"batch", "groupby", "join", "list", "map", "reject", "select", "slice", "sort", "unique"})
COMPARING = frozenset({"dictsort", "groupby", "max", "min", "sort", "unique"})
# What looks at a list or an object without looking at what is in its items.
FLAT_FILTERS = frozenset({"batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject",
                          "rejectattr", "select", "selectattr", "slice"})
FLAT_TESTS = frozenset({"boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none",
                        "number", "sameas", "sequence", "string", "true", "undefined"})
FLAT_METHODS = frozenset({"get", "items", "keys", "values"})
BYTES = frozenset({"encode", "to_bytes", "from_bytes", "fromhex"})
BACKWARD = frozenset({"rfind", "rindex", "rpartition", "rsplit"})
PADDING = frozenset({"center", "ljust", "rjust", "zfill"})


class TooMuch(Exception):
    """A bound was reached."""


class Allowance:
    """What is left of it."""

    def __init__(self) -> None:
        self.steps, self.work, self.made = MAX_STEPS, MAX_WORK, MAX_MADE

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TooMuch(f"ran more than {MAX_STEPS} steps")

    def look(self, *values: Any, times: int = 1) -> None:
        """Charge an operation on values."""
        self.charge(CALL + times * sum(map(weigh, values)))

    def charge(self, work: int) -> None:
        self.work -= work
        if self.work < 0:
            raise TooMuch("took too much work")

    def glance(self, *values: Any) -> None:
        """Charge an operation that looks at values, or at the items of a list, but not into these."""
        self.charge(CALL + sum(8 * len(v) for v in values if isinstance(v, str | list | tuple | dict)))

    def make(self, value: Any) -> Any:
        """Charge a value that an operation made, and give it back."""
        if isinstance(value, str):
            self.made -= len(value) * (1 if value.isascii() else 4) * (2 if isinstance(value, Traced) else 1)
        elif isinstance(value, list | tuple | set | frozenset | Mapping):
            self.made -= len(value) * (PIECE if value and isinstance(next(iter(value)), str) else 48)
        self.made -= 64
        if self.made < 0:
            raise TooMuch(f"made more than {MAX_MADE} bytes of texts and lists")
        return value


_current: ContextVar[Allowance | None] = ContextVar("allowance", default=None)


def allowance() -> Allowance:
    """That of the rendering in progress."""
    return _current.get() or Allowance()


@contextmanager
def granted() -> Iterator[Allowance]:
    """A whole allowance for what is run inside."""
    token = _current.set(found := Allowance())
    try:
        yield found
    finally:
        _current.reset(token)


def weigh(value: Any, indent: int = 0) -> int:
    """About the characters that str(value) has, or JSON with that many characters of indent for each level. A list that
    holds another many times over is counted as it is written. TooMuch where these are more than MAX_OUTPUT, or lists
    are nested so deeply that Python's own code might fail."""
    if isinstance(value, str):
        return len(value)
    total, level, nodes = 0, [value], 0
    for depth in range(MAX_DEPTH):
        inner: list[Any] = []
        total += depth * indent * len(level)
        for item in level:
            if isinstance(item, str):
                total += len(item) + 4
            elif isinstance(item, dict):
                total += 8 * len(item)
                inner += (*item.keys(), *item.values())
            elif isinstance(item, list | tuple | set | frozenset):
                total += 2 * len(item)
                inner += item
            else:
                total += 24
            if total > MAX_OUTPUT or len(inner) > MAX_ITEMS:
                raise TooMuch(f"made a value longer than {MAX_OUTPUT}")
        if not inner:
            return total
        nodes += len(inner)
        if nodes > MAX_ITEMS:
            raise TooMuch(f"made a list of more than {MAX_ITEMS} values")
        level = inner
    raise TooMuch(f"nests lists in lists more than {MAX_DEPTH} deep")


def check_length(length: int, most: int = MAX_VALUE) -> None:
    if length > most:
        raise TooMuch(f"made a value longer than {most}")


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result is too long."""
    sizes = [len(x) if isinstance(x, str | bytes | list | tuple) else None for x in (left, right)]
    if operator == "%" and isinstance(left, str):
        _check_percent(left, right)
    elif operator == "+" and None not in sizes:
        check_length(sum(sizes))  # type: ignore[arg-type]
    elif operator == "*" and sizes != [None, None]:
        times = next((x for x in (left, right) if isinstance(x, int)), 0)
        check_length(max(n for n in sizes if n is not None) * times)
    elif sizes == [None, None]:
        bits = [abs(x).bit_length() if isinstance(x, int) else 1 for x in (left, right)]
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and not all(isinstance(x, int | float) and abs(x) <= 2**16 for x in (left, right)):
            raise TooMuch("raised a number to a large power")
        if whole and (sum(bits) > MAX_BITS or (operator == "**" and bits[0] * abs(right) > MAX_BITS)):
            raise TooMuch("raised a number to a large power" if operator == "**" else "made a number too large")


def check_method(method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of a method of a text, a number or bytes whose result would be too long."""
    name = getattr(method, "__name__", "")
    owner = getattr(getattr(method, "__wrapped__", method), "__self__", None)
    if name in BYTES or isinstance(owner, bytes | bytearray):
        raise TooMuch("works on bytes")
    if not isinstance(owner, str):
        return
    text, values = plain(owner), [*args, *kwargs.values()]
    if name in BACKWARD:  # Python searches backward in the product of both lengths
        allowance().charge(len(text) * max((len(v) for v in values if isinstance(v, str)), default=0) // 4)
    if name in PADDING:
        check_length(max((v for v in values if isinstance(v, int)), default=0))
    elif name == "expandtabs":
        check_length(len(text) + text.count("\t") * max((v for v in values if isinstance(v, int)), default=8))
    elif name == "replace" and len(values) >= 2 and all(isinstance(v, str) for v in values[:2]):
        _check_replaced(text, *values[:2])
    elif name in ("format", "format_map"):
        _check_format(text, values)
    elif name == "translate":
        table = values[0] if values and isinstance(values[0], Mapping) else {}
        check_length(len(text) * max((len(v) for v in table.values() if isinstance(v, str)), default=1))
    elif name in ("split", "rsplit", "splitlines"):
        separator = next((plain(v) for v in values if isinstance(v, str) and v), None)
        pieces = text.count(separator) if separator else len(text) // 2 if name != "splitlines" else text.count("\n")
        if pieces > MAX_PIECES:
            raise TooMuch(f"split a text into more than {MAX_PIECES} pieces")


def check_filter(name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of a filter whose result would be too long, or that would take too long."""
    given = args[1] if hasattr(function, "jinja_pass_arg") and len(args) > 1 else args[0] if args else None
    length = len(given) if isinstance(given, str) else 0
    if name in SLOW and weigh(given) > MAX_SLOW:
        raise TooMuch(f"used the filter {name} on more than {MAX_SLOW} characters")
    if name in LISTING and length > MAX_PIECES:
        raise TooMuch(f"split a text into more than {MAX_PIECES} pieces")
    if name == "format":
        rest = args[args.index(given) + 1:] if given in args else ()
        _check_percent(str(given), rest or dict(kwargs))
    elif name in ("batch", "center", "indent", "replace", "round", "slice", "sum", "tojson", "wordwrap"):
        text = given if isinstance(given, str) else ""
        if name in ("center", "indent", "replace") and weigh(given) <= MAX_VALUE:
            text = str(given)
        _check_arguments(name, text, _bound(function, args, kwargs))


def _bound(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """{parameter: its argument}; TypeError where they do not fit."""
    signature = inspect.signature(function)
    first = next(iter(signature.parameters))
    # What jinja2 makes of filters that may be asynchronous takes a context that the signature does not show.
    hidden = hasattr(function, "jinja_pass_arg") and first not in ("context", "environment", "eval_ctx")
    bound = signature.bind(*args[hidden:], **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _check_arguments(name: str, text: str, values: Mapping[str, Any]) -> None:
    if name == "replace":
        if isinstance(values["old"], str) and isinstance(values["new"], str):
            _check_replaced(text, values["old"], values["new"])
    elif name == "indent":
        check_length(len(text) + (plain(text).count("\n") + 1) * _size(values["width"]))
    elif name == "wordwrap":
        check_length(len(text) * (1 + _size(values["wrapstring"])))
    elif name == "tojson":
        steps = (_size(values["indent"]), *map(len, values["separators"] or ()))
        if max(steps) > 16:
            raise TooMuch("wrote JSON with a great indent")
        check_length(weigh(values["value"], steps[0]), MAX_OUTPUT)
    elif name == "sum":
        if not isinstance(values["start"], int | float):
            raise TooMuch("used the filter sum on what is no number")
    elif name == "round":
        if not isinstance(values["precision"], int) or abs(values["precision"]) > 100:
            raise TooMuch("rounded to too many digits")
    else:
        check_length(_size(values[{"batch": "linecount", "slice": "slices", "center": "width"}[name]]))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str) else value if isinstance(value, int) else 0


def _check_replaced(text: str, old: str, new: str) -> None:
    count = plain(text).count(plain(old)) if old else len(text) + 1
    check_length(len(text) + count * len(new), MAX_OUTPUT if len(new) <= len(old) else MAX_VALUE)


def _check_percent(form: str, values: Any) -> None:
    """form % values."""
    if re.search(r"%[^a-zA-Z%]*\*", plain(form)):
        raise TooMuch("formatted text to a great width")
    items = [*values.values()] if isinstance(values, Mapping) else [*values] if isinstance(values, tuple | list) else [
        values]
    _check_fields(form, plain(form).count("%"), items, 0)


def _check_format(form: str, values: Sequence[Any]) -> None:
    """form.format(*values)."""
    items = [v for value in values for v in (value.values() if isinstance(value, Mapping) else (value,))]
    nested = re.search(r"\{[^{}]*\{", form) is not None
    widths = [v for v in items if isinstance(v, int)] + [len(v) for v in items if isinstance(v, str)] if nested else []
    digits = sum(_whole(v) for v in items if isinstance(v, str) and v.isdecimal()) if nested else 0
    _check_fields(form, form.count("{"), [*items, *values], max([0, digits, *widths]))


def _whole(digits: str) -> int:
    """Their number, or a large one where they are many."""
    return int(digits) if len(digits) < 10 else int(digits.lstrip("0")[:9] or 0)


def _check_fields(form: str, fields: int, values: Sequence[Any], width: int) -> None:
    """Refuse a text with that many fields, each as long as the longest value, the widths in the form and `width`."""
    widths = sum(_whole(digits) for digits in re.findall(r"\d+", plain(form)))
    if widths + fields * width > MAX_VALUE:
        raise TooMuch("formatted text to a great width")
    check_length(len(form) + fields * max(map(weigh, values), default=0), MAX_OUTPUT)

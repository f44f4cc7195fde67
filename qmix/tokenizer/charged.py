"""What a chat template does to texts, charged to the allowance of its rendering and traced: filters, tests, and the
joining of texts. Which characters come from where is followed as traced.py says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from qmix.tokenizer.allowance import (
    COMPARING,
    FLAT_FILTERS,
    FLAT_TESTS,
    MAX_OUTPUT,
    allowance,
    check_filter,
    check_length,
    granted,
    weigh,
)
from qmix.tokenizer.traced import Traced, as_text, concat, followed, interleave

# Filters that hand on what they are given, or parts of it, and make no text.
CHOOSING = frozenset({
    "attr", "batch", "d", "default", "dictsort", "first", "groupby", "items", "last", "list", "map", "max", "min",
    "random", "reject", "rejectattr", "select", "selectattr", "slice", "sort", "unique"})
# Filters that call one method of the text.
EXACT = frozenset({"capitalize", "lower", "replace", "reverse", "string", "trim", "upper"})


def charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose call is charged, and whose text is traced; jinja2's marks of what it is to be passed stay."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0
    times = 32 if name in COMPARING else 1

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        left = allowance()
        if name in FLAT_FILTERS:
            left.glance(*args[skip:], *kwargs.values())
        else:
            left.look(*args[skip:], *kwargs.values(), times=times)
        check_filter(name, function, args, kwargs)
        if name in CHOOSING or name in FLAT_FILTERS or name == "join":
            return left.make(function(*args, **kwargs))
        check_length(weigh(args[skip:skip + 1]), MAX_OUTPUT)  # it may write what it is given
        return left.make(followed(function, args, kwargs, exact=name in EXACT))

    return call


def charged_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        charge = allowance().glance if name in FLAT_TESTS else allowance().look
        charge(*args[skip:], *kwargs.values())
        return function(*args, **kwargs)

    return call


def written(value: Any) -> str:
    """As `as_text`, charged."""
    if isinstance(value, str):
        return value
    check_length(weigh(value), MAX_OUTPUT)
    text: str = allowance().make(as_text(value))
    return text


def joined(parts: Iterable[str]) -> str:
    parts = list(parts)
    check_length(sum(map(len, parts)), MAX_OUTPUT)
    text: str = allowance().make(concat(parts))
    return text


def interleaved(between: str, items: Iterable[str]) -> Traced:
    parts = list(items)
    check_length(sum(len(part) + len(between) for part in parts if isinstance(part, str)), MAX_OUTPUT)
    return interleave(between, parts)


@contextmanager
def counted() -> Iterator[None]:
    """An allowance, of which each line that compiled templates run takes a step. Counting, unlike a deadline, gives the
    same answer on every machine."""
    with granted() as left:

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            left.step()
            return line

        def call(frame: FrameType, event: str, arg: Any) -> Any:
            return line if frame.f_code.co_filename == "<template>" else None

        before = sys.gettrace()
        sys.settrace(call)
        try:
            yield
        finally:
            sys.settrace(before)

"""Checks of the records' fields. An error names the record and the field, and what is wanted."""

from __future__ import annotations

from qmix.errors import ConfigError

MOST = 2**31  # beyond any model: a hostile config must not keep us counting


def want(condition: bool, record: object, name: str, got: object, wanted: str) -> None:
    """ConfigError, "attention.heads: got 0, want 1 or more", unless `condition`."""
    if not condition:
        raise ConfigError(f"{type(record).__name__.lower()}.{name}: got {got!r:.200}, want {wanted}")


def counts(record: object, *names: str, least: int = 1, most: int = MOST) -> None:
    """Each field is a whole number from `least` to `most`."""
    for name in names:
        value = getattr(record, name)
        want(type(value) is int and least <= value <= most, record, name, value,
             f"{least} or more" if most == MOST else f"{least} to {most}")


def numbers(record: object, *names: str, positive: bool = True) -> None:
    """Each field is a finite number, above zero where `positive`."""
    for name in names:
        value = getattr(record, name)
        good = type(value) in (int, float) and -1e300 < value < 1e300 and (value > 0 or not positive)
        want(good, record, name, value, "a finite number" + (" above 0" if positive else ""))


def one_of(record: object, name: str, *allowed: str) -> None:
    value = getattr(record, name)
    want(value in allowed, record, name, value, " or ".join(map(repr, allowed)))

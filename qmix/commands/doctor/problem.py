"""A problem that the report found, with its cure; and a section of the report."""

from __future__ import annotations

from typing import Any, NamedTuple


class Problem(NamedTuple):
    """What is in the way, and what to do about it."""

    problem: str
    cure: str


Section = tuple[dict[str, Any], list[Problem]]

"""A request's body: JSON that fits a schema, or a BadRequest that names the key at fault."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

DEEPEST = 64  # levels of a body
Model = TypeVar("Model", bound=BaseModel)


class Schema(BaseModel):
    """What all schemas are: a key that is not named in one is an error, and values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BadRequest(Exception):
    """status: of HTTP. code: a word for programs. param: the key at fault, "messages.0.content"."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


async def read(request: Request, schema: type[Model]) -> Model:
    """The body as that schema; BadRequest for what is none."""
    try:
        value = json.loads(await request.body(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as e:
        raise BadRequest(f"the body is not JSON: {e!s:.200}", code="invalid_json") from None
    if depth(value) > DEEPEST:
        raise BadRequest(f"the body has more than {DEEPEST} levels", code="invalid_json")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadRequest("the body has half a character (a lone surrogate)", code="invalid_json") from None
    except ValueError:
        raise BadRequest("the body has a number that is too large", code="invalid_json") from None
    return check(value, schema)


def check(value: Any, schema: type[Model]) -> Model:
    """`value` as that schema; BadRequest that names the first key that is wrong."""
    if not isinstance(value, dict):
        raise BadRequest(f"the body is {type(value).__name__}, want an object", code="invalid_type")
    try:
        return schema.model_validate(value)
    except ValidationError as e:
        raise _told(e) from None


def _told(error: ValidationError) -> BadRequest:
    """The first thing that is wrong, by its place. Of the members of a union the one that got farthest is told."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    worst = max(found, key=lambda one: (one["type"] == "extra_forbidden", len(one["loc"])))
    param = _place(worst["loc"])
    if worst["type"] == "extra_forbidden":
        return BadRequest(f"{param}: unknown, or not supported here", param, "unknown_parameter")
    return BadRequest(f"{param}: {worst['msg']}", param, "invalid_value")


def _place(parts: Iterable[int | str]) -> str:
    """("messages", 0, "list[union]", "content") -> "messages.0.content": what is no key was put there by pydantic."""
    return ".".join(str(part) for part in parts if isinstance(part, int) or (part.replace("_", "").replace(
        "-", "").isalnum() and part not in ("str", "int", "float", "bool")))


def refuse_constant(word: str) -> Any:
    """For json.loads: ValueError for NaN and Infinity."""
    raise ValueError(f"{word} is no JSON")


def depth(value: Any) -> int:
    """Levels of a value, counted without recursion: [[1]] -> 2."""
    deepest, level = 0, [value]
    while level:
        inner = [v for one in level if isinstance(one, dict | list)
                 for v in (one.values() if isinstance(one, dict) else one)]
        if not any(isinstance(one, dict | list) for one in level):
            break
        deepest, level = deepest + 1, inner
        if deepest > DEEPEST:
            break
    return deepest

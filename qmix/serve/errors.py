"""What went wrong, as each API says it: a status, and a body in that API's form."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from qmix.errors import PromptTooLong, QmixError, UsageError
from qmix.serve.body import BadRequest
from qmix.serve.engine_thread import Busy, NotReady

FAULT = "a fault in qmix; the server's output has the details"  # paths and the like are nobody else's business
TOO_LONG = re.compile(r"the prompt has (?:at least )?(\d+) tokens, the context holds (\d+)")
RETRY_AFTER = 2  # seconds, where the server is busy or not ready
ANTHROPIC = "/v1/messages"
OLLAMA = "/api/"


class Problem(NamedTuple):
    """code: a word for programs. param: the key at fault."""

    status: int
    code: str | None
    message: str
    param: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_AFTER)} if self.status in (429, 503) else {}


def problem_of(error: Exception) -> Problem:
    """What an exception comes to for the client. The text of one that is a fault of the server stays on the server."""
    if isinstance(error, BadRequest):
        return Problem(error.status, error.code, error.message, error.param)
    if isinstance(error, Busy):
        return Problem(429, "queue_full", _line(error))
    if isinstance(error, NotReady):
        return Problem(503, "not_ready", _line(error))
    if isinstance(error, PromptTooLong):
        return Problem(400, "context_length_exceeded", _line(error), "messages")
    if isinstance(error, UsageError):
        return Problem(400, "invalid_request", _line(error))
    return Problem(500, "server_error", FAULT)


def _line(error: QmixError) -> str:
    """What is wrong and the cure, in one line."""
    return f"{error.message}; {error.cure}" if error.cure else error.message


def body_of(path: str, problem: Problem) -> dict[str, Any]:
    """In the form of the API that `path` belongs to."""
    if path.startswith(ANTHROPIC):
        message = problem.message
        if problem.code == "context_length_exceeded":  # clients look for just these words
            message = "prompt is too long: " + TOO_LONG.sub(r"\1 tokens > \2 maximum, the context", message)
        return {"type": "error", "error": {"type": _anthropic_type(problem.status), "message": message}}
    if path.startswith(OLLAMA):
        return {"error": problem.message}
    return {"error": {"message": problem.message, "type": _openai_type(problem.status), "param": problem.param,
                      "code": problem.code}}


def _openai_type(status: int) -> str:
    return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error",
            503: "server_error"}.get(status, "invalid_request_error")


def _anthropic_type(status: int) -> str:
    return {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
            429: "rate_limit_error", 500: "api_error", 503: "overloaded_error"}.get(status, "invalid_request_error")

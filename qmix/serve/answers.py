"""How an answer leaves: whole, as one JSON document, or as server-sent events; and what ends it when the client leaves
or the server stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qmix.serve.engine_thread import NotReady
from qmix.serve.errors import body_of, problem_of
from qmix.serve.events import Ended, Event
from qmix.serve.service import Answer

GONE = 499  # nginx's status for a client that left
FOR_EVER = 1e9  # seconds that sse-starlette leaves a stream when the server stops: server.py ends it in its own form

Result = TypeVar("Result")


async def until_cancelled(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The same events; an answer that the server cut short is NotReady, so that nobody takes it for a whole one."""
    async for event in events:
        if isinstance(event, Ended) and event.reason == "cancelled":
            raise NotReady("the server stops", "the answer is not complete")
        yield event


async def whole(request: Request, answer: Answer,
                collect: Callable[[AsyncIterator[Event]], Awaitable[dict[str, Any]]]) -> Response:
    """One document. A client that leaves ends the computing."""
    work = asyncio.ensure_future(collect(until_cancelled(answer.events())))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(await work) if work.done() else Response(status_code=GONE)
    finally:
        answer.close()
        for task in (work, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    """Returns when the client has left; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream(EventSourceResponse):
    """Ends the computing when it ends, also where the client left before the first event."""

    def __init__(self, answer: Answer, *args: Any, **named: Any):
        super().__init__(*args, **named)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


def stream(answer: Answer, events: AsyncIterator[ServerSentEvent], ping: float,
           sent_ping: ServerSentEvent | None = None) -> Response:
    """Server-sent events, with a comment, or `sent_ping`, every `ping` seconds."""
    return _Stream(answer, events, ping=ping, sep="\n", ping_message_factory=lambda: sent_ping or ServerSentEvent(
        comment="ping", sep="\n"), shutdown_event=anyio.Event(), shutdown_grace_period=FOR_EVER)


class _Lines(StreamingResponse):
    """As _Stream."""

    def __init__(self, answer: Answer, content: AsyncIterator[str]):
        super().__init__(content, media_type="application/x-ndjson")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


def lines(answer: Answer, content: AsyncIterator[str]) -> Response:
    """A JSON document a line."""
    return _Lines(answer, content)


async def openai_events(path: str, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[ServerSentEvent]:
    """Chunks as OpenAI streams them: an error is a chunk too, and [DONE] the last one in any case."""
    try:
        async for chunk in chunks:
            yield ServerSentEvent(data=dumps(chunk), sep="\n")
    except Exception as e:
        yield ServerSentEvent(data=dumps(body_of(path, problem_of(e))), sep="\n")
    yield ServerSentEvent(data="[DONE]", sep="\n")


def dumps(value: Any) -> str:
    """One line for any client: in ASCII, since some of them take U+2028 and the like for the end of a line."""
    return json.dumps(value, separators=(",", ":"))

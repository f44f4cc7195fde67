"""Anthropic's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from sse_starlette import ServerSentEvent
from starlette.responses import JSONResponse, Response

from qmix.serve.answers import dumps, stream, until_cancelled, whole
from qmix.serve.anthropic.messages import MessageAnswer
from qmix.serve.anthropic.schema import CountRequest, MessagesRequest
from qmix.serve.anthropic.translate import generation_of
from qmix.serve.body import read
from qmix.serve.errors import body_of, problem_of
from qmix.serve.routing import body_schema, client_of, left_out_header, served_name, state_of

router = APIRouter()
PING = ServerSentEvent(event="ping", data='{"type":"ping"}', sep="\n")


@router.post("/v1/messages", openapi_extra=body_schema(MessagesRequest))
async def messages(request: Request) -> Response:
    """Answer a conversation."""
    service, defaults = state_of(request)
    body = await read(request, MessagesRequest)
    model = served_name(service, body.model)
    translated = generation_of(body, defaults, service.engine.ready().tokenizer)
    answer = await service.answer(translated.generation, client_of(request))
    form = MessageAnswer(model, translated.generation.params.stop)
    if body.stream:
        found = stream(answer, _named(request.url.path, form.stream(until_cancelled(answer.events()))),
                       service.options.ping, PING)
    else:
        found = await whole(request, answer, form.whole)
    found.headers.update(left_out_header(translated.left_out))
    return found


@router.post("/v1/messages/count_tokens", openapi_extra=body_schema(CountRequest))
async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has as a prompt."""
    service, defaults = state_of(request)
    body = await read(request, CountRequest)
    served_name(service, body.model)
    generation = generation_of(body, defaults, service.engine.ready().tokenizer).generation
    tokens = await service.with_preparation(lambda preparation: preparation.count(generation))
    return JSONResponse({"input_tokens": tokens})


async def _named(path: str, events: AsyncIterator[tuple[str, dict[str, Any]]]) -> AsyncIterator[ServerSentEvent]:
    """Events as Anthropic streams them; an error is one too, and the last."""
    try:
        async for name, data in events:
            yield ServerSentEvent(event=name, data=dumps(data), sep="\n")
    except Exception as e:
        yield ServerSentEvent(event="error", data=dumps(body_of(path, problem_of(e))), sep="\n")

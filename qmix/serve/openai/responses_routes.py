"""The route of OpenAI's responses."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from sse_starlette import ServerSentEvent
from starlette.responses import Response

from qmix.serve.answers import dumps, stream, until_cancelled, whole
from qmix.serve.body import BadRequest, read
from qmix.serve.errors import problem_of
from qmix.serve.events import Event
from qmix.serve.openai.responses import ResponseAnswer
from qmix.serve.openai.responses_schema import ResponsesRequest
from qmix.serve.openai.responses_store import ResponseStore
from qmix.serve.openai.responses_translate import input_messages, names_of, responses_generation
from qmix.serve.routing import body_schema, client_of, left_out_header, served_name, state_of
from qmix.tokenizer import Message

router = APIRouter()


@router.post("/v1/responses", openapi_extra=body_schema(ResponsesRequest))
async def responses(request: Request) -> Response:
    """Answer a conversation of items."""
    service, defaults = state_of(request)
    body = await read(request, ResponsesRequest)
    model = served_name(service, body.model)
    store: ResponseStore = request.app.state.responses
    earlier = _earlier(store, body.previous_response_id)
    translated = responses_generation(body, earlier, defaults, service.engine.ready().tokenizer)
    answer = await service.answer(translated.generation, client_of(request))
    def keep(form: ResponseAnswer) -> None:
        if body.store is not False:
            store.add(form.id, [*earlier, *input_messages(body.input, names_of(earlier)), form.message()])

    form = ResponseAnswer(model, body, translated.custom, keep)
    if body.stream:
        found = stream(answer, _named(form, until_cancelled(answer.events())), service.options.ping)
    else:
        found = await whole(request, answer, form.whole)
    found.headers.update(left_out_header(translated.left_out))
    return found


def _earlier(store: ResponseStore, name: str | None) -> tuple[Message, ...]:
    found = () if name is None else store.get(name)
    if found is None:
        raise BadRequest(f"previous_response_id: {name!r:.80} is not, or no longer, kept here", "previous_response_id",
                         "previous_response_not_found", 404)
    return found


async def _named(form: ResponseAnswer, events: AsyncIterator[Event]) -> AsyncIterator[ServerSentEvent]:
    try:
        async for name, data in form.stream(events):
            yield ServerSentEvent(event=name, data=dumps(data), sep="\n")
    except Exception as e:
        name, data = form.failed(problem_of(e))
        yield ServerSentEvent(event=name, data=dumps(data), sep="\n")

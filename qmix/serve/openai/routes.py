"""OpenAI's routes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from qmix.serve.answers import openai_events, stream, until_cancelled, whole
from qmix.serve.body import read
from qmix.serve.openai.chat import ChatAnswer
from qmix.serve.openai.completions import CompletionAnswer
from qmix.serve.openai.schema import ChatRequest, CompletionRequest, StreamOptions
from qmix.serve.openai.translate import chat_generation, completion_generation
from qmix.serve.routing import body_schema, client_of, served_name, state_of

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service, defaults = state_of(request)
    body = await read(request, ChatRequest)
    model = served_name(service, body.model)
    generation = chat_generation(body, defaults, service.engine.ready().tokenizer)
    answer = await service.answer(generation, client_of(request))
    form = ChatAnswer(model, generation, _with_usage(body.stream_options))
    if not body.stream:
        return await whole(request, answer, form.whole)
    return stream(answer, openai_events(request.url.path, form.chunks(until_cancelled(answer.events()))),
                  service.options.ping)


@router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
async def completions(request: Request) -> Response:
    """Continue a text as it is."""
    service, defaults = state_of(request)
    body = await read(request, CompletionRequest)
    model = served_name(service, body.model)
    generation = completion_generation(body, defaults)
    answer = await service.answer(generation, client_of(request))
    form = CompletionAnswer(model, generation, _with_usage(body.stream_options))
    if not body.stream:
        return await whole(request, answer, form.whole)
    return stream(answer, openai_events(request.url.path, form.chunks(until_cancelled(answer.events()))),
                  service.options.ping)


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The served model, under each of its names."""
    service, _ = state_of(request)
    return JSONResponse({"object": "list", "data": [model_card(name, service.created, service.context)
                                                    for name in service.options.names]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    service, _ = state_of(request)
    return JSONResponse(model_card(served_name(service, name), service.created, service.context))


def model_card(name: str, created: int, context: int | None) -> dict[str, object]:
    """max_model_len: of the context, where the model is loaded; vLLM's name."""
    return {"id": name, "object": "model", "created": created, "owned_by": "qmix",
            **({} if context is None else {"max_model_len": context})}


def _with_usage(options: StreamOptions | None) -> bool:
    return bool(options is not None and options.include_usage)

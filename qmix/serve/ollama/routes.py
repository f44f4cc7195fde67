"""ollama's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from qmix import __version__
from qmix.serve.answers import dumps, lines, until_cancelled, whole
from qmix.serve.body import read
from qmix.serve.errors import body_of, problem_of
from qmix.serve.ollama.answer import OllamaAnswer
from qmix.serve.ollama.schema import OllamaChat, OllamaGenerate, ShowRequest
from qmix.serve.ollama.translate import chat_generation, text_generation
from qmix.serve.request import Generation
from qmix.serve.routing import body_schema, client_of, served_name, state_of
from qmix.serve.service import Service

router = APIRouter()


@router.head("/api/version", include_in_schema=False)
@router.get("/api/version")
async def version() -> Response:
    return JSONResponse({"version": __version__})


@router.head("/api/tags", include_in_schema=False)
@router.get("/api/tags")
async def tags(request: Request) -> Response:
    """The served model, under each of its names."""
    service, _ = state_of(request)
    made = datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z")
    return JSONResponse({"models": [{"name": name, "model": name, "modified_at": made, "size": 0, "digest": "",
                                     "details": _details()} for name in service.options.names]})


@router.get("/api/ps")
async def running(request: Request) -> Response:
    service, _ = state_of(request)
    return JSONResponse({"models": [{"name": name, "model": name, "size": 0, "digest": "", "details": _details(),
                                     "expires_at": "9999-12-31T00:00:00Z", "size_vram": 0}
                                    for name in service.options.names]})


@router.post("/api/show", openapi_extra=body_schema(ShowRequest))
async def show(request: Request) -> Response:
    """What the model can do."""
    service, _ = state_of(request)
    body = await read(request, ShowRequest)
    _name(service, body.model or body.name)
    tokenizer = service.engine.ready().tokenizer
    found = ["completion", *(["tools"] if tokenizer.takes_tools else []),
             *(["thinking"] if tokenizer.thinking_switch or tokenizer.takes_effort else [])]
    return JSONResponse({"details": _details(), "capabilities": found,
                         "model_info": {"general.architecture": "qmix", "qmix.context_length": service.context}})


@router.post("/api/chat", openapi_extra=body_schema(OllamaChat))
async def chat(request: Request) -> Response:
    """Answer a conversation. One without messages is how clients ask for the model to be loaded."""
    service, defaults = state_of(request)
    body = await read(request, OllamaChat)
    name = _name(service, body.model)
    tokenizer = service.engine.ready().tokenizer
    if not body.messages:
        return JSONResponse({"model": name, "message": {"role": "assistant", "content": ""}, "done": True,
                             "done_reason": "load"})
    return await _answer(request, service, OllamaAnswer(name, True), chat_generation(body, defaults, tokenizer),
                         body.stream)


@router.post("/api/generate", openapi_extra=body_schema(OllamaGenerate))
async def generate(request: Request) -> Response:
    """Answer a text, or continue it (raw)."""
    service, defaults = state_of(request)
    body = await read(request, OllamaGenerate)
    name = _name(service, body.model)
    tokenizer = service.engine.ready().tokenizer
    if not body.prompt:
        return JSONResponse({"model": name, "response": "", "done": True, "done_reason": "load"})
    return await _answer(request, service, OllamaAnswer(name, False), text_generation(body, defaults, tokenizer),
                         body.stream)


async def _answer(request: Request, service: Service, form: OllamaAnswer, generation: Generation,
                  streamed: bool | None) -> Response:
    """Streamed unless the client says no."""
    answer = await service.answer(generation, client_of(request))
    if streamed is False:
        return await whole(request, answer, form.whole)
    return lines(answer, _told(request.url.path, form.stream(until_cancelled(answer.events()))))


async def _told(path: str, documents: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """A line each; an error is one too, and the last."""
    try:
        async for document in documents:
            yield dumps(document) + "\n"
    except Exception as e:
        yield dumps(body_of(path, problem_of(e))) + "\n"


def _name(service: Service, name: str | None) -> str:
    """ollama's clients put a tag behind a name."""
    return served_name(service, None if name is None else name.removesuffix(":latest"))


def _details() -> dict[str, Any]:
    return {"parent_model": "", "format": "qmix", "family": "qmix", "families": ["qmix"], "parameter_size": "",
            "quantization_level": ""}

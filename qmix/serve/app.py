"""The ASGI application: routes, errors in each API's form, and the guard in front of them."""

from __future__ import annotations

import traceback
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Scope

from qmix import __version__, render
from qmix.config import SamplingParams
from qmix.errors import QmixError
from qmix.serve.answers import GONE
from qmix.serve.anthropic.routes import router as anthropic_router
from qmix.serve.body import BadRequest
from qmix.serve.errors import Problem, body_of, problem_of
from qmix.serve.guard import BodyRefused, Guard
from qmix.serve.ollama.routes import router as ollama_router
from qmix.serve.openai.responses_routes import router as responses_router
from qmix.serve.openai.responses_store import ResponseStore
from qmix.serve.openai.routes import router as openai_router
from qmix.serve.page import page_files, page_router
from qmix.serve.routing import state_of
from qmix.serve.service import Service


def make_app(service: Service, defaults: SamplingParams) -> ASGIApp:
    """defaults: the sampling of requests that leave it open."""
    app = FastAPI(title="qmix", version=__version__, docs_url=None, redoc_url=None)
    app.state.service, app.state.defaults, app.state.responses = service, defaults, ResponseStore()
    for router in (openai_router, responses_router, anthropic_router, ollama_router):
        app.include_router(router)
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/health", _health, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/metrics", _metrics, methods=["GET"])
    app.add_api_route("/v1/stats", _stats, methods=["GET"])
    app.add_api_route("/v1/stats/experts", _experts, methods=["GET"])
    app.include_router(page_router(page_files()))
    for kind in (BadRequest, QmixError, HTTPException, Exception):
        app.add_exception_handler(kind, _failed)
    app.add_exception_handler(ClientDisconnect, _left)
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    guarded: ASGIApp = Guard(app, service.options, lambda scope, *told: _refused(scope, Problem(*told)))
    if service.options.origins:
        guarded = CORSMiddleware(guarded, allow_origins=service.options.origins, allow_methods=["GET", "POST"],
                                 allow_headers=["*"])
    return guarded


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; what the bodies' schemas refer to is moved where their references point."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        shared = found.setdefault("components", {}).setdefault("schemas", {})
        for route in found["paths"].values():
            for operation in route.values():
                for content in operation.get("requestBody", {}).get("content", {}).values():
                    shared |= content["schema"].pop("$defs", {})
        app.openapi_schema = found
    return app.openapi_schema


async def _health(request: Request) -> Response:
    """200 as soon as the model is loaded."""
    service, _ = state_of(request)
    state = service.engine.state
    said = {"ready": "ok", "loading": "loading model"}.get(state, state)
    return JSONResponse({"status": said}, 200 if state == "ready" else 503,
                        {} if state == "ready" else {"Retry-After": "2"})


async def _metrics(request: Request) -> Response:
    return PlainTextResponse(state_of(request)[0].metrics.text(), media_type="text/plain; version=0.0.4")


async def _stats(request: Request) -> Response:
    """What the engine and the queue do, as one document."""
    service, _ = state_of(request)
    found = service.figures()
    return JSONResponse({"model": service.options.names[0], "state": service.engine.state, "running": found.running,
                         "waiting": found.waiting, **found.engine})


async def _experts(request: Request) -> Response:
    """Where each expert is, and how often the last tokens chose it. The first answer may be old: the map is kept up to
    date only as long as somebody asks."""
    service, _ = state_of(request)
    return JSONResponse({"model": service.options.names[0], "state": service.engine.state,
                         **service.engine.ask_map()})


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, BodyRefused):
        raise error  # the guard's business
    if isinstance(error, HTTPException):
        problem = Problem(error.status_code, None, f"{request.method} {request.url.path}: {error.detail}")
    else:
        problem = problem_of(error)
    if problem.status == 500:
        render.say("".join(traceback.format_exception(error)).rstrip())
    return _refused(request.scope, problem)


async def _left(request: Request, error: Exception) -> Response:
    """The client left before its body was there: nobody reads this."""
    return Response(status_code=GONE)


def _refused(scope: Scope, problem: Problem) -> Response:
    return JSONResponse(body_of(scope["path"], problem), problem.status, problem.headers)

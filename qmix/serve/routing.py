"""What all routes need of a request: the service, the model's name, who asks."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from qmix.config import SamplingParams
from qmix.serve.body import BadRequest
from qmix.serve.service import Service


def state_of(request: Request) -> tuple[Service, SamplingParams]:
    """The service, and the sampling of requests that leave it open."""
    return request.app.state.service, request.app.state.defaults


def client_of(request: Request) -> str:
    """Whom the queue is fair to."""
    return request.client.host if request.client is not None else ""


def served_name(service: Service, name: str | None) -> str:
    """The name that was asked for; the first one where none was. BadRequest (404) for a model that is not served."""
    names = service.options.names
    if name is not None and name not in names:
        raise BadRequest(f"the model {name!r:.200} does not exist here; this server has {' and '.join(names)}", "model",
                         "model_not_found", 404)
    return names[0] if name is None else name


def body_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """For a route that reads its body itself: what OpenAPI says of it."""
    return {"requestBody": {"required": True, "content": {"application/json": {
        "schema": schema.model_json_schema(ref_template="#/components/schemas/{model}")}}}}


def left_out_header(names: tuple[str, ...]) -> dict[str, str]:
    """Says that hosted tools were not shown to the model."""
    said = ", ".join(name.encode("ascii", "replace").decode() for name in names if name.isprintable())
    return {"x-qmix-left-out": said[:1000]} if said else {}

"""What clients may send to /v1/responses. A key that is not here is a 400 that names it. Items and tools are read by
responses_translate.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from qmix.serve.body import Schema
from qmix.serve.openai.schema import Number


class Reasoning(Schema):
    """summary, generate_summary: accepted without effect: the reasoning itself is given."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Any = None
    generate_summary: Any = None


class TextFormat(Schema):
    """name, description and strict: accepted without effect."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    name: Any = None
    description: Any = None
    strict: Any = None


class TextOptions(Schema):
    """verbosity: accepted without effect."""

    format: TextFormat | None = None
    verbosity: Any = None


class ResponsesRequest(Schema):
    """The second half is accepted without effect, but for what null, false or 0 say."""

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(max_length=10_000)]
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    store: bool | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None

    include: Any = None
    metadata: Any = None
    user: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    stream_options: Any = None
    truncation: Any = None
    max_tool_calls: Any = None
    client_metadata: Any = None
    context_management: Any = None
    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None

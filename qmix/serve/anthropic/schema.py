"""What clients may send to /v1/messages and /v1/messages/count_tokens. A key that is not here is a 400 that names it.

Blocks of content are read by translate.py: a union of schemas would say little about what is wrong with one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from qmix.serve.body import Schema
from qmix.serve.openai.schema import Blocks, Number, Stops


class AnthropicMessage(Schema):
    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class AnthropicTool(Schema):
    """type: absent or "custom" for a client's own; anything else is hosted by Anthropic, and left out of what the model
    is shown, whatever else it says. cache_control, eager_input_streaming, defer_loading, strict and input_examples:
    accepted without effect."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["custom"] | None = None
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: Any = None
    eager_input_streaming: Any = None
    defer_loading: Any = None
    strict: Any = None
    input_examples: Any = None
    allowed_callers: Any = None


class ToolChoice(Schema):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Schema):
    """budget_tokens, display: accepted without effect: the model itself says when it has thought enough."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Any = None
    display: Any = None


class OutputFormat(Schema):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Schema):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Schema):
    """metadata, service_tier, container, context_management, betas, speed, inference_geo, mcp_servers (an empty list)
    and cache_control: accepted without effect."""

    model: str
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=10_000)]
    system: str | Blocks | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    metadata: Any = None
    service_tier: Any = None
    container: None = None
    context_management: Any = None
    betas: Any = None
    speed: Any = None
    inference_geo: Any = None
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None
    cache_control: Any = None
    diagnostics: Any = None


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: Stops | None = None
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None

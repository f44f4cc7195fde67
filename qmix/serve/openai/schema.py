"""What clients may send to /v1/chat/completions and /v1/completions. A key that is not here is a 400 that names it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from qmix.serve.body import Schema

MOST_CHOICES = 64  # answers of one request: the next one waits for all of them
Positive = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=-1)] | None  # -1: until the context is full
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None
Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=0.01, le=100)]  # a smaller one would make logits infinite
Blocks = Annotated[list[dict[str, Any]], Field(max_length=10_000)]
Stop = Annotated[str, Field(max_length=1000)]  # each token is searched for all of them
Stops = Annotated[list[Stop], Field(max_length=32)]


class StreamOptions(Schema):
    """include_obfuscation: accepted without effect."""

    include_usage: bool | None = None
    include_obfuscation: Any = None


class Sampling(Schema):
    """How tokens are chosen, in all of OpenAI's and llama-server's spellings. Keys of llama-server and vLLM that
    OpenAI lacks: top_k, min_p, repeat_penalty and repetition_penalty."""

    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repeat_penalty: Penalty | None = None
    repetition_penalty: Penalty | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop: Stop | Stops | None = None
    n: Choices = None


class Ignored(Schema):
    """Accepted without effect."""

    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    verbosity: Any = None


class FunctionCall(Schema):
    name: Annotated[str, Field(min_length=1)]
    arguments: str = ""


class ToolCallMessage(Schema):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(Schema):
    """reasoning_content, reasoning: what the model thought before this answer. name, refusal, annotations, audio,
    function_call and cache_control: accepted without effect where they are null, name and cache_control always."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Blocks | None = None
    name: str | None = None
    tool_calls: list[ToolCallMessage] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    cache_control: Any = None


class FunctionDefinition(Schema):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Schema):
    type: Literal["function"]
    function: FunctionDefinition
    cache_control: Any = None


class NamedFunction(Schema):
    name: str


class NamedTool(Schema):
    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Schema):
    """name, description and strict: accepted without effect: the schema is always kept to."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class TemplateArguments(Schema):
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


class ChatRequest(Sampling, Ignored):
    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens = None
    max_completion_tokens: Tokens = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: TemplateArguments | None = None


class CompletionRequest(Sampling, Ignored):
    """suffix, echo and best_of: only what changes nothing."""

    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    suffix: Literal[""] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

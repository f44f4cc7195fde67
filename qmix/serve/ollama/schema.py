"""What clients may send to /api/chat and /api/generate. A key that is not here is a 400 that names it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from qmix.serve.body import Schema
from qmix.serve.openai.schema import Number, Penalty, Stop, Stops, Tool


class Options(Schema):
    """The second half is accepted without effect: it is set when the server is started, or means nothing here."""

    num_predict: Annotated[int, Field(ge=-2)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repeat_penalty: Penalty | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    stop: Stop | Stops | None = None

    num_ctx: Any = None
    num_keep: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    numa: Any = None
    low_vram: Any = None
    f16_kv: Any = None
    vocab_only: Any = None
    logits_all: Any = None
    embedding_only: Any = None
    repeat_last_n: Any = None
    typical_p: Any = None
    tfs_z: Any = None
    mirostat: Any = None
    mirostat_eta: Any = None
    mirostat_tau: Any = None
    penalize_newline: Any = None


class Function(Schema):
    name: Annotated[str, Field(min_length=1)]
    arguments: dict[str, Any]
    index: Any = None
    description: Any = None


class Call(Schema):
    function: Function
    id: str | None = None
    type: Any = None
    index: Any = None


class OllamaMessage(Schema):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: str | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None


class Common(Schema):
    """keep_alive: accepted without effect: the model stays."""

    model: str
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: Any = None
    truncate: Any = None
    shift: Any = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None


class OllamaChat(Common):
    messages: Annotated[list[OllamaMessage], Field(max_length=10_000)] | None = None
    tools: list[Tool] | None = None


class OllamaGenerate(Common):
    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: Any = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None


class ShowRequest(Schema):
    model: str | None = None
    name: str | None = None
    verbose: Any = None

"""OpenAI's words into the record: messages, sampling, tools, formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qmix.config import EFFORTS, SamplingParams
from qmix.serve.arguments import arguments_object
from qmix.serve.body import BadRequest
from qmix.serve.openai.schema import (
    MOST_CHOICES,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    NamedTool,
    ResponseFormat,
    Sampling,
    Tool,
    ToolCallMessage,
)
from qmix.serve.request import Format, Generation, Text, overridden
from qmix.tokenizer import Message, Request, Tokenizer, ToolCall

TEXTS = ("text", "input_text", "output_text")  # parts of a message that are text


def chat_generation(body: ChatRequest, defaults: SamplingParams, tokenizer: Tokenizer) -> Generation:
    """BadRequest for what a schema cannot tell is wrong."""
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    tools = tuple(map(tool_definition, body.tools or ()))
    choice = _choice(body.tool_choice, [tool.function.name for tool in body.tools or ()])
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs: given without logprobs, want logprobs true", "top_logprobs")
    return Generation(
        messages=tuple(messages_of(body.messages)), params=sampling(body, defaults, limit),
        asked=_asked(body, tools, tokenizer), choices=body.n or 1,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        format=format_of(body.response_format, body.grammar), tool_choice=choice,
        parallel=body.parallel_tool_calls is not False)


def completion_generation(body: CompletionRequest, defaults: SamplingParams) -> Generation:
    texts = _texts(body.prompt)
    if len(texts) * (body.n or 1) > MOST_CHOICES:
        raise BadRequest(f"prompt: got {len(texts)} with n {body.n}, want at most {MOST_CHOICES} answers", "prompt")
    return Generation(texts=texts, params=sampling(body, defaults, body.max_tokens),
                      choices=body.n or 1, top_logprobs=body.logprobs,
                      format=format_of(body.response_format, body.grammar))


def sampling(body: Sampling, defaults: SamplingParams, limit: int | None) -> SamplingParams:
    """What the request leaves open is the server's default."""
    if limit == 0:
        raise BadRequest("max_tokens: got 0, want at least 1", "max_tokens")
    penalty = body.repeat_penalty if body.repeat_penalty is not None else body.repetition_penalty
    return overridden(
        defaults, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, min_p=body.min_p,
        repeat_penalty=penalty, frequency_penalty=body.frequency_penalty, presence_penalty=body.presence_penalty,
        max_tokens=limit, seed=body.seed, stop=body.stop,
        logit_bias=None if body.logit_bias is None else _biases(body.logit_bias))


def _biases(biases: Mapping[str, float]) -> dict[int, float]:
    wrong = next((key for key in biases if not (key.isascii() and key.isdecimal() and len(key) < 10)), None)
    if wrong is not None:
        raise BadRequest(f"logit_bias: got {wrong!r:.80}, want token ids", "logit_bias")
    return {int(key): value for key, value in biases.items()}


def _texts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[Text, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt or (len(prompt) > MOST_CHOICES and not isinstance(prompt[0], int)):
        raise BadRequest(f"prompt: got {len(prompt)} of them, want 1 to {MOST_CHOICES}", "prompt")
    if isinstance(prompt[0], int):
        return (tuple(prompt),)
    return tuple(text if isinstance(text, str) else tuple(text) for text in prompt)


def messages_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """A result gets the name of the tool whose call it answers. System messages at the begin are one."""
    found: list[Message] = []
    names: dict[str, str] = {}
    for n, message in enumerate(messages):
        where = f"messages.{n}"
        text = text_of(message.content, where)
        if message.role in ("system", "developer"):
            if found and all(one.role == "system" for one in found):
                found[-1] = replace(found[-1], content=f"{found[-1].content}\n\n{text}")
            else:
                found.append(Message("system", text))
        elif message.role == "tool":
            call = message.tool_call_id
            found.append(Message("tool", text, tool_call_id=call, name=names.get(call or "")))
        elif message.role == "assistant":
            calls = tuple(map(tool_call, message.tool_calls or ()))
            names |= {call.id: call.name for call in calls if call.id}
            reasoning = message.reasoning_content or message.reasoning
            found.append(Message("assistant", text, reasoning=reasoning or None, tool_calls=calls))
        else:
            found.append(Message("user", text))
    return found


def text_of(content: str | list[dict[str, Any]] | None, where: str) -> str:
    """A message's text, its parts joined by line breaks. BadRequest for parts that are no text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for n, part in enumerate(content):
        kind = part.get("type")
        if kind not in TEXTS or not isinstance(part.get("text"), str):
            raise BadRequest(f"{where}.content.{n}: got a part of type {kind!r:.40}, want text: this model takes no "
                             "pictures, sound or files", f"{where}.content.{n}", "unsupported_content")
        texts.append(part["text"])
    return "\n".join(texts)


def tool_call(call: ToolCallMessage) -> ToolCall:
    return ToolCall(call.function.name, arguments_object(call.function.arguments), call.id)


def tool_definition(tool: Tool) -> dict[str, Any]:
    """As chat templates have it."""
    function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
    return {"type": "function", "function": {"description": "", "parameters": {"type": "object", "properties": {}},
                                             **function}}


def _choice(choice: str | NamedTool | None, names: Sequence[str]) -> str:
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice == "required" and not names:
            raise BadRequest("tool_choice: required, but there are no tools", "tool_choice")
        return choice
    return named_tool(choice.function.name, names)


def named_tool(name: str, names: Sequence[str]) -> str:
    """Generation.tool_choice for one tool; BadRequest where there is none of that name."""
    if name not in names:
        raise BadRequest(f"tool_choice: no tool has the name {name!r:.80}", "tool_choice")
    return f"tool:{name}"


def _asked(body: ChatRequest, tools: tuple[dict[str, Any], ...], tokenizer: Tokenizer) -> Request:
    extra = body.chat_template_kwargs
    effort = body.reasoning_effort or (extra.reasoning_effort if extra else None)
    return asked(tools, effort, extra.enable_thinking if extra else None, tokenizer)


def asked(tools: tuple[dict[str, Any], ...], effort: str | None, thinking: bool | None,
          tokenizer: Tokenizer) -> Request:
    """How much to reason, as far as the model can be told: a client says it to any model. Where there is only a switch,
    "none" is off and everything else on."""
    known = {"minimal": "low", "xhigh": "high"}.get(effort or "", effort)
    if tokenizer.thinking_switch and thinking is None and effort is not None:
        thinking = effort != "none"
    return Request(tools, thinking if tokenizer.thinking_switch else None,
                   known if tokenizer.takes_effort and known in EFFORTS else None)


def format_of(wanted: ResponseFormat | None, grammar: str | None) -> Format | None:
    """grammar: Lark, as llguidance has it, or llama.cpp's GBNF, which is told by its ::=."""
    if grammar is not None:
        if wanted is not None and wanted.type != "text":
            raise BadRequest("grammar and response_format both say what the answer must be", "grammar")
        return Format("grammar", lark_of(grammar))
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Format("object")
    schema = None if wanted.json_schema is None else wanted.json_schema.schema_
    if schema is None:
        raise BadRequest("response_format.json_schema.schema: missing", "response_format.json_schema")
    return Format("schema", json.dumps(schema))


def lark_of(grammar: str) -> str:
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(grammar))
    except Exception as e:  # the converter raises bare Exception
        raise BadRequest(f"grammar: not GBNF: {e!s:.200}", "grammar") from None

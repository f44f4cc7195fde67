"""The items of /v1/responses into the record. Neighbouring reasoning, text and calls of the assistant are one Message;
what a system or developer message says in the middle of a conversation is the user's, since templates have no place for
it there.

A custom tool, whose input is text of any form, is shown to the model as a function with one argument; its calls go back
as what they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qmix.config import SamplingParams
from qmix.serve.arguments import arguments_object
from qmix.serve.body import BadRequest
from qmix.serve.openai.responses_schema import ResponsesRequest, TextFormat
from qmix.serve.openai.translate import asked, named_tool, text_of
from qmix.serve.request import Format, Generation, overridden
from qmix.tokenizer import Message, Tokenizer, ToolCall

INPUT = "input"  # the argument that stands for a custom tool's text
CALLS = ("function_call", "custom_tool_call")
OUTPUTS = ("function_call_output", "custom_tool_call_output")


class Translated(NamedTuple):
    """custom: names of custom tools. left_out: hosted tools, which the model is not shown."""

    generation: Generation
    custom: frozenset[str]
    left_out: tuple[str, ...]


def responses_generation(body: ResponsesRequest, earlier: Sequence[Message], defaults: SamplingParams,
                         tokenizer: Tokenizer) -> Translated:
    """earlier: the conversation that previous_response_id stands for."""
    tools, custom, left_out = _tools(body.tools or ())
    messages = [*earlier, *input_messages(body.input, names_of(earlier))]
    return Translated(Generation(
        messages=tuple(_with_system(body.instructions, messages)),
        params=overridden(defaults, temperature=body.temperature, top_p=body.top_p, max_tokens=body.max_output_tokens),
        asked=asked(tuple(tools), body.reasoning.effort if body.reasoning else None, None, tokenizer),
        format=_format(body.text.format if body.text else None),
        tool_choice=_choice(body.tool_choice, [tool["function"]["name"] for tool in tools]),
        parallel=body.parallel_tool_calls is not False), frozenset(custom), left_out)


def _with_system(instructions: str | None, messages: Sequence[Message]) -> Iterable[Message]:
    """System messages at the begin are one, the instructions first."""
    first = next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))
    texts = [text for text in (instructions, *(message.content for message in messages[:first])) if text]
    if texts:
        yield Message("system", "\n\n".join(texts))
    for message in messages[first:]:
        yield Message("user", message.content) if message.role == "system" else message


@dataclass(slots=True)
class _Assistant:
    """What the assistant said between two others."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    def message(self) -> Message | None:
        if not (self.texts or self.calls):
            return None  # reasoning alone says nothing
        return Message("assistant", "\n".join(self.texts), reasoning="\n".join(self.thoughts) or None,
                       tool_calls=tuple(self.calls))


def names_of(messages: Iterable[Message]) -> dict[str, str]:
    """{id of a call: its tool}."""
    return {call.id: call.name for message in messages for call in message.tool_calls if call.id}


def input_messages(items: str | Sequence[Mapping[str, Any]], names: dict[str, str]) -> list[Message]:
    """names: of tools that were called earlier, by the ids of the calls; calls of these items are added."""
    if isinstance(items, str):
        return [Message("user", items)]
    found: list[Message] = []
    open_one = _Assistant()
    for n, item in enumerate(items):
        where, kind = f"input.{n}", item.get("type", "message")
        if kind == "message" and item.get("role") == "assistant":
            open_one.texts.append(_content(item, where))
        elif kind == "reasoning":
            open_one.thoughts += _thoughts(item, where)
        elif kind in CALLS:
            call = _call(item, kind, where)
            names[call.id or ""] = call.name
            open_one.calls.append(call)
        elif kind in OUTPUTS or (kind == "message" and item.get("role") in ("user", "system", "developer")):
            if (message := open_one.message()) is not None:
                found.append(message)
            open_one = _Assistant()
            if kind in OUTPUTS:
                call_id = _string(item, "call_id", where)
                found.append(Message("tool", _output(item.get("output"), where), tool_call_id=call_id,
                                     name=names.get(call_id)))
            else:
                found.append(Message("user" if item["role"] == "user" else "system", _content(item, where)))
        else:
            told = f"a role {item.get('role')!r:.40}" if kind == "message" else f"an item of type {kind!r:.40}"
            raise BadRequest(f"{where}: got {told}, which is not supported here", where, "unsupported_content")
    last = open_one.message()
    return [*found, last] if last is not None else found


def _content(item: Mapping[str, Any], where: str) -> str:
    content = item.get("content")
    if not isinstance(content, str | list) or (isinstance(content, list)
                                                and not all(isinstance(part, dict) for part in content)):
        raise BadRequest(f"{where}.content: want text or a list of parts", f"{where}.content")
    if isinstance(content, list):
        content = [{"type": "text", "text": part.get("refusal")} if part.get("type") == "refusal" else part
                   for part in content]
    return text_of(content, where)


def _thoughts(item: Mapping[str, Any], where: str) -> list[str]:
    """The text of a reasoning item: its content, or else its summary."""
    for key in ("content", "summary"):
        parts = item.get(key) or []
        if not isinstance(parts, list):
            raise BadRequest(f"{where}.{key}: want a list", f"{where}.{key}")
        texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if texts:
            return texts
    return []


def _call(item: Mapping[str, Any], kind: str, where: str) -> ToolCall:
    name, call_id = _string(item, "name", where), _string(item, "call_id", where)
    if kind == "custom_tool_call":
        return ToolCall(name, {INPUT: _string(item, "input", where)}, call_id)
    return ToolCall(name, arguments_object(_string(item, "arguments", where)), call_id)


def _output(value: Any, where: str) -> str:
    """What a tool gave: text, parts of text, or any JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return text_of(value, f"{where}.output")
    return json.dumps(value, ensure_ascii=False)


def _string(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or (not value and key != "input" and key != "arguments"):
        raise BadRequest(f"{where}.{key}: got {value!r:.40}, want text", f"{where}.{key}")
    return value


def _tools(given: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str], tuple[str, ...]]:
    """As chat templates have them; names of custom ones; hosted ones."""
    tools, custom, left_out = [], [], []
    for n, tool in enumerate(given):
        kind = tool.get("type")
        if kind not in ("function", "custom"):
            left_out.append(str(kind))
            continue
        name, told = _string(tool, "name", f"tools.{n}"), tool.get("description")
        parameters = tool.get("parameters") or {"type": "object", "properties": {}}
        if kind == "custom":
            custom.append(name)
            parameters = {"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT]}
        if not isinstance(parameters, dict) or not isinstance(told, str | None):
            raise BadRequest(f"tools.{n}: parameters is no object, or description no text", f"tools.{n}")
        tools.append({"type": "function", "function": {"name": name, "description": told or "",
                                                       "parameters": parameters}})
    return tools, custom, tuple(left_out)


def _choice(choice: str | Mapping[str, Any] | None, names: Sequence[str]) -> str:
    if choice is None:
        return "auto"
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        if choice == "required" and not names:
            raise BadRequest("tool_choice: required, but there are no tools", "tool_choice")
        return choice
    if isinstance(choice, Mapping) and choice.get("type") in ("function", "custom"):
        return named_tool(str(choice.get("name")), names)
    raise BadRequest(f"tool_choice: got {choice!r:.80}, want auto, none, required, or a function's name", "tool_choice")


def _format(wanted: TextFormat | None) -> Format | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Format("object")
    if wanted.schema_ is None:
        raise BadRequest("text.format.schema: missing", "text.format.schema")
    return Format("schema", json.dumps(wanted.schema_))

"""Anthropic's words into the record. A message's blocks become Messages: results of tools first, as ones of their own,
then the text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qmix.config import SamplingParams
from qmix.serve.anthropic.schema import AnthropicTool, CountRequest, MessagesRequest, OutputFormat
from qmix.serve.body import BadRequest, check
from qmix.serve.openai.translate import asked, named_tool
from qmix.serve.request import Format, Generation, overridden
from qmix.tokenizer import Message, Request, Tokenizer, ToolCall

IGNORED = ("cache_control", "citations")  # keys of a block that change nothing
CHANGING = "x-anthropic-billing-header:"  # a line that Claude Code puts in front, other at every request


class Translated(NamedTuple):
    """left_out: names of hosted tools, which the model is not shown."""

    generation: Generation
    left_out: tuple[str, ...]


def generation_of(body: CountRequest, defaults: SamplingParams, tokenizer: Tokenizer) -> Translated:
    tools, left_out = _tools(body.tools or ())
    choice, parallel = _choice(body, [tool["function"]["name"] for tool in tools])
    params = defaults
    if isinstance(body, MessagesRequest):
        params = overridden(defaults, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k,
                            max_tokens=body.max_tokens, stop=body.stop_sequences)
    return Translated(Generation(
        messages=tuple(_messages(body)), params=params, asked=_asked(body, tuple(tools), tokenizer),
        format=_format(body), tool_choice=choice, parallel=parallel), left_out)


def _tools(given: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    tools, left_out = [], []
    for n, value in enumerate(given):
        if value.get("type") not in (None, "custom"):
            left_out.append(str(value.get("name", value["type"])))
            continue
        try:
            tool = check(value, AnthropicTool)
        except BadRequest as e:
            raise BadRequest(f"tools.{n}.{e.message}", f"tools.{n}.{e.param}", e.code) from None
        tools.append({"type": "function", "function": {
            "name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}})
    return tools, tuple(left_out)


def _choice(body: CountRequest, names: Sequence[str]) -> tuple[str, bool]:
    choice = body.tool_choice
    if choice is None:
        return "auto", True
    parallel = not choice.disable_parallel_tool_use
    if choice.type == "tool":
        return named_tool(choice.name or "", names), parallel
    if choice.type == "any" and not names:
        raise BadRequest("tool_choice: any, but there are no tools", "tool_choice")
    return {"any": "required"}.get(choice.type, choice.type), parallel


def _asked(body: CountRequest, tools: tuple[dict[str, Any], ...], tokenizer: Tokenizer) -> Request:
    """Without a word about thinking the model thinks as it does by itself where it cannot be told; where it can, only
    `thinking` turns it on, as in Anthropic's API."""
    thinking = body.thinking is not None and body.thinking.type != "disabled"
    effort = body.output_config.effort if body.output_config else None
    return asked(tools, {"max": "high"}.get(effort or "", effort), thinking, tokenizer)


def _format(body: CountRequest) -> Format | None:
    wanted: OutputFormat | None = body.output_format or (body.output_config.format if body.output_config else None)
    return None if wanted is None else Format("schema", json.dumps(wanted.schema_))


def _messages(body: CountRequest) -> Iterator[Message]:
    system = [] if body.system is None else [_system(body.system)]
    names: dict[str, str] = {}  # of tools, by the ids of their calls
    first = next((n for n, message in enumerate(body.messages) if message.role != "system"), len(body.messages))
    system += [_text(message.content, f"messages.{n}.content") for n, message in enumerate(body.messages[:first])]
    if any(system):
        yield Message("system", "\n\n".join(filter(None, system)))
    for n, message in enumerate(body.messages[first:], first):
        where = f"messages.{n}.content"
        blocks = [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content
        if message.role == "assistant":
            yield _answer(blocks, where, names)
        else:  # a system message in the middle, for which templates have no place, is the user's
            yield from _question(blocks, where, names)


def _system(system: str | list[dict[str, Any]]) -> str:
    """Without the line that changes at every request: with it no prompt would have a prefix in common with another."""
    texts = [system] if isinstance(system, str) else [_text([block], f"system.{n}") for n, block in enumerate(system)]
    return "\n\n".join(text for text in texts if not text.startswith(CHANGING))


def _question(blocks: Sequence[Mapping[str, Any]], where: str, names: Mapping[str, str]) -> Iterator[Message]:
    texts = []
    for n, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "tool_result":
            _only(block, ("tool_use_id", "content", "is_error"), f"{where}.{n}")
            call = _string(block, "tool_use_id", f"{where}.{n}")
            text = _text(_without_images(block.get("content") or ""), f"{where}.{n}.content")
            if block.get("is_error"):
                text = f"Error: {text}"
            yield Message("tool", text, tool_call_id=call, name=names.get(call))
        elif kind == "text":
            texts.append(_text([block], f"{where}.{n}"))
        else:
            raise _no_text(kind, f"{where}.{n}")
    if texts:
        yield Message("user", "\n".join(texts))


def _without_images(content: Any) -> Any:
    """A tool that gives a picture is not the user's choice: its conversation goes on with a note in its place."""
    return content if not isinstance(content, list) else [
        {"type": "text", "text": "[image left out]"} if isinstance(block, Mapping) and block.get("type") == "image"
        else block for block in content]


def _answer(blocks: Sequence[Mapping[str, Any]], where: str, names: dict[str, str]) -> Message:
    texts, thoughts, calls = [], [], []
    for n, block in enumerate(blocks):
        kind, place = block.get("type"), f"{where}.{n}"
        if kind == "text":
            texts.append(_text([block], place))
        elif kind == "thinking":
            _only(block, ("thinking", "signature"), place)
            thoughts.append(_string(block, "thinking", place))
        elif kind == "redacted_thinking":
            continue
        elif kind == "tool_use":
            _only(block, ("id", "name", "input", "caller"), place)
            call = ToolCall(_string(block, "name", place), _object(block, "input", place), _string(block, "id", place))
            names[call.id or ""] = call.name
            calls.append(call)
        else:
            raise _no_text(kind, place)
    return Message("assistant", "".join(texts), reasoning="\n".join(thoughts) or None, tool_calls=tuple(calls))


def _text(content: str | Sequence[Mapping[str, Any]], where: str) -> str:
    """The text of blocks, joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise BadRequest(f"{where}: got {type(content).__name__}, want text or a list of blocks", where)
    texts = []
    for n, block in enumerate(content):
        place = f"{where}.{n}" if len(content) > 1 else where
        if not isinstance(block, Mapping) or block.get("type") != "text":
            raise _no_text(block.get("type") if isinstance(block, Mapping) else type(block).__name__, place)
        _only(block, ("text",), place)
        texts.append(_string(block, "text", place))
    return "\n".join(texts)


def _only(block: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    if unknown := block.keys() - {*keys, *IGNORED, "type"}:
        name = f"{where}.{min(unknown)}"
        raise BadRequest(f"{name}: unknown, or not supported here", name, "unknown_parameter")


def _string(block: Mapping[str, Any], key: str, where: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise BadRequest(f"{where}.{key}: got {type(value).__name__}, want text", f"{where}.{key}")
    return value


def _object(block: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = block.get(key)
    if not isinstance(value, Mapping):
        raise BadRequest(f"{where}.{key}: got {type(value).__name__}, want an object", f"{where}.{key}")
    return value


def _no_text(kind: object, where: str) -> BadRequest:
    return BadRequest(f"{where}: got a block of type {kind!r:.40}, want text: this model takes no pictures, sound or "
                      "files", where, "unsupported_content")

"""ollama's words into the record."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qmix.config import SamplingParams
from qmix.serve.ollama.schema import Common, OllamaChat, OllamaGenerate, OllamaMessage, Options
from qmix.serve.openai.translate import asked, tool_definition
from qmix.serve.request import Format, Generation, overridden
from qmix.tokenizer import Message, Request, Tokenizer, ToolCall


def chat_generation(body: OllamaChat, defaults: SamplingParams, tokenizer: Tokenizer) -> Generation:
    tools = tuple(map(tool_definition, body.tools or ()))
    return Generation(messages=tuple(messages_of(body.messages or ())), params=sampling(body.options, defaults),
                      asked=_asked(body, tools, tokenizer), format=_format(body))


def text_generation(body: OllamaGenerate, defaults: SamplingParams, tokenizer: Tokenizer) -> Generation:
    params = sampling(body.options, defaults)
    if body.raw:
        return Generation(texts=(body.prompt,), params=params, format=_format(body))
    system = [Message("system", body.system)] if body.system else []
    return Generation(messages=(*system, Message("user", body.prompt)), params=params,
                      asked=_asked(body, (), tokenizer), format=_format(body))


def sampling(options: Options | None, defaults: SamplingParams) -> SamplingParams:
    if options is None:
        return defaults
    limit, seed = options.num_predict, options.seed
    return overridden(
        defaults, temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, min_p=options.min_p,
        repeat_penalty=options.repeat_penalty, presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty, seed=None if seed is None or seed < 0 else seed,
        max_tokens=None if limit is None else limit if limit > 0 else -1,  # -1, -2: until the context is full
        stop=options.stop)


def messages_of(messages: Sequence[OllamaMessage]) -> list[Message]:
    """Calls have no ids in ollama's API: results are in the order of the calls."""
    found = []
    for message in messages:
        text = message.content or ""
        if message.role == "tool":
            found.append(Message("tool", text, tool_call_id=message.tool_call_id,
                                 name=message.tool_name or message.name))
        elif message.role == "assistant":
            calls = tuple(ToolCall(call.function.name, call.function.arguments, call.id)
                          for call in message.tool_calls or ())
            found.append(Message("assistant", text, reasoning=message.thinking or None, tool_calls=calls))
        else:
            found.append(Message(message.role, text))
    return found


def _asked(body: Common, tools: tuple[dict[str, object], ...], tokenizer: Tokenizer) -> Request:
    effort = body.think if isinstance(body.think, str) else None
    return asked(tools, effort, body.think if isinstance(body.think, bool) else None, tokenizer)


def _format(body: Common) -> Format | None:
    if not body.format:
        return None
    return Format("object") if body.format == "json" else Format("schema", json.dumps(body.format))

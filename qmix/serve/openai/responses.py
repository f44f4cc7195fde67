"""The record's events as a response of OpenAI's, whole or streamed:

    response.created, response.in_progress,
    for each item: response.output_item.added, its content, response.output_item.done
    response.completed, response.incomplete or response.failed

Items are runs of reasoning or text, and calls. Each event has a number of its own, counted up."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qmix.serve.arguments import arguments_object
from qmix.serve.errors import Problem
from qmix.serve.events import Called, Ended, Event, Piece
from qmix.serve.openai.chunks import new_id, usage
from qmix.serve.openai.responses_schema import ResponsesRequest
from qmix.serve.openai.responses_translate import INPUT
from qmix.tokenizer import Call, Message, ToolCall

KINDS = {"answer": "output_text", "reasoning": "reasoning_text"}  # of events and of parts
Sent = tuple[str, dict[str, Any]]


@dataclass(slots=True)
class ResponseAnswer:
    """model: the name under which it was asked for. custom: names of custom tools. keep: called with the answer before
    the last event goes out, so that the next request finds it."""

    model: str
    body: ResponsesRequest
    custom: frozenset[str] = frozenset()
    keep: Callable[[ResponseAnswer], None] = lambda answer: None
    id: str = field(default_factory=lambda: new_id("resp_"))
    created: int = field(default_factory=lambda: int(time.time()))
    output: list[dict[str, Any]] = field(default_factory=list)
    _number: int = 0
    _kind: str | None = None  # of the item that is open, the last of `output`
    _text: list[str] = field(default_factory=list)  # of that item

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        last: dict[str, Any] = {}
        async for _, data in self.stream(events):
            last = data
        return last["response"]

    async def stream(self, events: AsyncIterator[Event]) -> AsyncIterator[Sent]:
        """(name, data) of each event. The first ones go out at once: a long prompt may take minutes."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        async for event in events:
            if isinstance(event, Piece) and event.text:
                for one in self._piece(event.kind, event.text):
                    yield one
            elif isinstance(event, Called):
                for one in (*self._close(), *self._call(event.call)):
                    yield one
            elif isinstance(event, Ended):
                status = "incomplete" if event.reason == "length" else "completed"
                for one in self._close(status):
                    yield one
                self.keep(self)
                yield self._event(f"response.{status}", response=self._response(status, event))

    def failed(self, problem: Problem) -> Sent:
        """The last event of a stream that went wrong."""
        return self._event("response.failed", response={**self._response("failed"), "error": {
            "code": problem.code or "server_error", "message": problem.message}})

    def message(self) -> Message:
        """What was answered, for the next request."""
        texts = {kind: "".join(part["text"] for item in self.output if item["type"] == kind
                               for part in item.get("content", ())) for kind in ("message", "reasoning")}
        calls = tuple(_shown(item) for item in self.output if item["type"] in ("function_call", "custom_tool_call"))
        return Message("assistant", texts["message"], reasoning=texts["reasoning"] or None, tool_calls=calls)

    def _piece(self, kind: str, text: str) -> Iterator[Sent]:
        if kind != self._kind:
            yield from self._close()
            self._kind = kind
            item: dict[str, Any] = (
                {"id": new_id("msg_"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
                if kind == "answer" else
                {"id": new_id("rs_"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []})
            self.output.append(item)
            yield self._event("response.output_item.added", output_index=self._index, item=item)
            yield self._event("response.content_part.added", **self._place, part=_part(kind, ""))
        self._text.append(text)
        more: dict[str, Any] = {"logprobs": []} if kind == "answer" else {}
        yield self._event(f"response.{KINDS[kind]}.delta", **self._place, delta=text, **more)

    def _close(self, status: str = "completed") -> Iterator[Sent]:
        """The end of the item that is open, if one is."""
        if self._kind is None:
            return
        kind, text = self._kind, "".join(self._text)
        more: dict[str, Any] = {"logprobs": []} if kind == "answer" else {}
        yield self._event(f"response.{KINDS[kind]}.done", **self._place, text=text, **more)
        yield self._event("response.content_part.done", **self._place, part=_part(kind, text))
        self.output[-1] = {**self.output[-1], "status": status, "content": [_part(kind, text)]}
        yield self._event("response.output_item.done", output_index=self._index, item=self.output[-1])
        self._kind, self._text = None, []

    def _call(self, call: Call) -> Iterator[Sent]:
        custom = call.name in self.custom
        key, text = (INPUT, _input(call)) if custom else ("arguments", call.arguments or "{}")
        event = "response.custom_tool_call_input" if custom else "response.function_call_arguments"
        item = {"id": new_id("ctc_" if custom else "fc_"), "type": "custom_tool_call" if custom else "function_call",
                "status": "in_progress", "call_id": new_id("call_"), "name": call.name, key: ""}
        self.output.append(item)
        place = {"item_id": item["id"], "output_index": self._index}
        yield self._event("response.output_item.added", output_index=self._index, item=item)
        yield self._event(f"{event}.delta", **place, delta=text)
        yield self._event(f"{event}.done", **place, **{key: text}, **({} if custom else {"name": call.name}))
        self.output[-1] = {**item, "status": "completed", key: text}
        yield self._event("response.output_item.done", output_index=self._index, item=self.output[-1])

    @property
    def _index(self) -> int:
        return len(self.output) - 1

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": self._index, "content_index": 0}

    def _event(self, name: str, /, **data: Any) -> Sent:
        self._number += 1
        return name, {"type": name, "sequence_number": self._number - 1, **data}

    def _response(self, status: str, ended: Ended | None = None) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": self.model,
            "output": list(self.output) if ended is not None else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": body.store is not False, "temperature": body.temperature, "top_p": body.top_p,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)
                     if body.text and body.text.format else {"type": "text"}},
            "tool_choice": body.tool_choice or "auto", "tools": body.tools or [], "truncation": "disabled",
            "metadata": body.metadata if isinstance(body.metadata, dict) else {},
            "usage": None if ended is None else _usage(ended)}


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": KINDS[kind], "text": text, **({"annotations": [], "logprobs": []} if kind == "answer" else {})}


def _usage(ended: Ended) -> dict[str, Any]:
    found = usage([ended])
    return {"input_tokens": found["prompt_tokens"], "input_tokens_details": found["prompt_tokens_details"],
            "output_tokens": found["completion_tokens"], "output_tokens_details": found["completion_tokens_details"],
            "total_tokens": found["total_tokens"]}


def _input(call: Call) -> str:
    """The text that a custom tool is called with; all that the model wrote, where it kept to no form."""
    text = arguments_object(call.arguments).get(INPUT)
    return text if isinstance(text, str) else call.arguments


def _shown(item: dict[str, Any]) -> ToolCall:
    if item["type"] == "custom_tool_call":
        return ToolCall(item["name"], {INPUT: item[INPUT]}, item["call_id"])
    return ToolCall(item["name"], arguments_object(item["arguments"]), item["call_id"])

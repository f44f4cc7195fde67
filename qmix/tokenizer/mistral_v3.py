"""The chat format of Mixtral 8x22B Instruct and Mistral 7B Instruct v0.3, segment by segment as Mistral does it
(tokenizer v3).

    <s> [INST] question [/INST] answer </s> [AVAILABLE_TOOLS] tools [/AVAILABLE_TOOLS] [INST] question [/INST]
    [TOOL_CALLS] calls </s> [TOOL_RESULTS] result [/TOOL_RESULTS]

Here the brackets are control tokens with ids of their own; each text between them is encoded alone. The system text and
the tools stand with the last question, so they move from turn to turn. Tools, calls and results are JSON as Python's
json.dumps writes it. Source and oracle: mistral-common, InstructTokenizerV3 and InstructRequestNormalizer.

As with v1 the model's template has priority unless it writes plain conversations in the same way. Conversations with
tools always follow Mistral's own code: the published templates write a result that is no JSON without quotes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from qmix.errors import UsageError
from qmix.tokenizer.message import Message, Prompt, Request, ToolCall, check_conversation, without_end
from qmix.tokenizer.mistral import TemplateBeside, probes
from qmix.tokenizer.template import TemplateFormat
from qmix.tokenizer.vocabulary import Vocabulary

PIECES, CONTROLS = 32768, 771
NAMED = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]")  # ids 3 to 9; up to CONTROLS follow tokens whose names differ from release to release
# SHA-256 of the vocabulary's pieces from CONTROLS on, joined by newlines.
PIECES_SHA256 = "29822dca0297686baa84102633d1b3def10ccc7b5310d173ba75767b8aa78906"
LATER = "[SYSTEM_PROMPT]"  # tokenizer v7 has it, with the same pieces and another format


def has_mistral_v3_pieces(vocabulary: Vocabulary) -> bool:
    """Whether the vocabulary is Mistral's third one, piece by piece."""
    if vocabulary.size < PIECES or LATER in vocabulary.markers or any(
            vocabulary.markers.get(text) != i for i, text in enumerate(NAMED, 3)):
        return False
    pieces = "\n".join(vocabulary.token(i) for i in range(CONTROLS, PIECES))
    return hashlib.sha256(pieces.encode("utf-8")).hexdigest() == PIECES_SHA256


class MistralV3Format:
    """template: the checkpoint's own, where it has one. both: there are tokenizer.json and tokenizer.model."""

    turn_stops: tuple[str, ...] = ()
    takes_tools, thinking_switch, takes_effort = True, False, False

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int], template: TemplateFormat | None,
                 say: Callable[[str], None], *, both: bool = False):
        assert vocabulary.bos_id is not None and vocabulary.eos_id is not None  # pieces 1 and 2
        self._template = TemplateBeside("v3", vocabulary, template, say)
        self.name = self._template.name(both)
        self._vocabulary = vocabulary
        self._bos, self._eos = vocabulary.bos_id, vocabulary.eos_id
        self._ends = tuple(eos_ids)

    def fits_template(self) -> bool:
        """Whether the checkpoint's template, if any, writes plain conversations as the segments are."""
        said = (("system", "Be brief."), ("user", "one"), ("assistant", "two"), ("user", "three"))
        later = [Message(role, text) for role, text in said]
        return all(self._same(probe) for probe in (*probes(), later))

    def _same(self, messages: Sequence[Message]) -> bool:
        eos = re.escape(self._vocabulary.token(self._eos))
        turns = (rf"\s?\[INST\]\s?{re.escape(turn.text)}\s?\[/INST\]" if turn.role == "user" else
                 rf"\s?{re.escape(turn.text)}\s*{eos}" for turn in _turns(messages))
        return self._template.writes(messages, "".join(turns))

    @property
    def turn_end(self) -> int:
        return self._eos

    def encode(self, messages: Sequence[Message], limit: int | None = None, request: Request | None = None) -> Prompt:
        check_conversation(messages)
        request = request or Request()
        tools = request.tools or any(message.role == "tool" or message.tool_calls for message in messages)
        if not tools and not self._same(messages):
            return self._template.encode(messages, limit, request)
        turns = list(_turns(messages))
        self._vocabulary.check_length((turn.text for turn in turns), limit)
        last = max(i for i, turn in enumerate(turns) if turn.role == "user")
        ids = [self._bos]
        for i, turn in enumerate(turns):
            if i == last and request.tools:
                ids += self._between("[AVAILABLE_TOOLS]", _json([_tool(tool) for tool in request.tools]),
                                     "[/AVAILABLE_TOOLS]")
            ids += self._turn(turn)
        return Prompt(ids)

    def _turn(self, turn: _Turn) -> list[int]:
        if turn.role == "user":
            return self._between("[INST]", turn.text, "[/INST]")
        if turn.role == "tool":
            return self._between("[TOOL_RESULTS]", turn.text, "[/TOOL_RESULTS]")
        if turn.ids is not None:
            return [*without_end(turn.ids, self._ends), self._eos]
        head = [self._vocabulary.markers["[TOOL_CALLS]"]] if turn.calls else []
        return [*head, *self._vocabulary.encode_text(turn.text, start=True), self._eos]

    def _between(self, head: str, text: str, tail: str) -> list[int]:
        markers = self._vocabulary.markers
        return [markers[head], *self._vocabulary.encode_text(text, start=True), markers[tail]]


class _Turn(NamedTuple):
    """text: as it is encoded. calls: whether an answer's text is its tool calls. ids: an answer's, where known."""

    role: str
    text: str
    calls: bool = False
    ids: tuple[int, ...] | None = None


def _turns(messages: Sequence[Message]) -> Iterator[_Turn]:
    """Neighbours of one role are one turn, results aside; the system text joins the last question."""
    system = "\n\n".join(m.content for m in messages if m.role == "system" and m.content)
    turns = [(role, list(turn)) for role, turn in groupby(
        (m for m in messages if m.role != "system"), key=lambda m: m.role)]
    if not turns or turns[0][0] != "user":
        turns.insert(0, ("user", [Message("user", "")]))
    last = max(i for i, (role, _) in enumerate(turns) if role == "user")
    for i, (role, turn) in enumerate(turns):
        content = "\n\n".join(m.content for m in turn if m.content)
        if role == "user":
            yield _Turn(role, f"{system}\n\n{content}" if i == last and system else content)
        elif role == "tool":
            yield from (_Turn(role, _result(message)) for message in turn)
        elif calls := [call for message in turn for call in message.tool_calls]:
            if content:
                raise UsageError("an answer with text and tool calls: Mistral's tokenizer v3 has no place for both",
                                 "leave the text out")
            yield _Turn(role, _json([_call(call) for call in calls]), calls=True)
        else:
            yield _Turn(role, content.rstrip(" "), ids=turn[0].ids if len(turn) == 1 else None)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool in the order of keys that Mistral writes."""
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError(f"tools: got {tool!r:.80}, want {{'type': 'function', 'function': {{'name': ...}}}}")
    return {"type": "function", "function": {
        "name": function["name"], "description": function.get("description") or "",
        "parameters": function.get("parameters") or {}}}


def _call(call: ToolCall) -> dict[str, Any]:
    known = {} if call.id in (None, "", "null") else {"id": call.id}
    return {"name": call.name, "arguments": call.arguments, **known}


def _result(message: Message) -> str:
    """A result as JSON; one that is JSON itself stands in it as an object, other text as a string."""
    if message.tool_call_id is None:
        raise UsageError("tool_call_id: missing in a tool's result", "name the call that it answers")
    try:
        content = json.loads(message.content or "{}")
    except ValueError:
        content = message.content
    return _json({"content": content, "call_id": message.tool_call_id})

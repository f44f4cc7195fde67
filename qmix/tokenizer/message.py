"""One turn of a conversation, what is asked of the model besides, and what a chat format is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qmix.config import EFFORTS
from qmix.errors import UsageError

ROLES = ("system", "user", "assistant", "tool")
ASKING = ("user", "tool")  # roles that an answer can follow
OPEN, CLOSE = "<think>", "</think>"  # around a model's reasoning


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an answer calls. arguments: the object that its JSON text stands for."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UsageError(f"tool call: name: got {self.name!r:.80}, want a text")
        if not isinstance(self.arguments, Mapping):
            raise UsageError(f"tool call {self.name!r}: arguments: got {type(self.arguments).__name__}, want an object",
                             "parse the JSON text first")


@dataclass(frozen=True, slots=True)
class Message:
    """role is "system", "user", "assistant" or "tool" (the result of a tool call).

    ids: for an answer of this model, the ids it generated for `content`. They are spliced into the next prompt as
    they are, since encoding the text again may give other ids and so another KV cache; a final
    end-of-answer id may be among them and is never doubled. None where only the text is known.
    reasoning: what the model thought before an answer, without the tags around it. Whether the model sees it again is
    the chat template's decision; a format that knows nothing of reasoning drops it.
    tool_calls: of an answer. tool_call_id and name: which call and tool a result belongs to.
    """

    role: str
    content: str
    ids: tuple[int, ...] | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"role: got {self.role!r}, want {' or '.join(map(repr, ROLES))}")
        if not isinstance(self.content, str):
            raise UsageError(f"content: got {type(self.content).__name__}, want text")
        for field, owner in (("ids", "assistant"), ("reasoning", "assistant"), ("tool_calls", "assistant"),
                             ("tool_call_id", "tool"), ("name", "tool")):
            if getattr(self, field) not in (None, ()) and self.role != owner:
                wanted = "them" if field in ("ids", "tool_calls") else "it"
                raise UsageError(f"{field}: given for role {self.role!r}, want {wanted} only for {owner!r}")
        if self.ids is not None and self.tool_calls:
            raise UsageError("ids: given for an answer with tool calls, want them only for text")


@dataclass(frozen=True, slots=True)
class Request:
    """What a prompt is made of besides the messages. tools: the functions that the answer may call, as OpenAI's API
    describes them ({"type": "function", "function": {...}}). thinking: whether the model is to reason before it
    answers; effort: how much, one of EFFORTS. None for what the template does by itself."""

    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool | None = None
    effort: str | None = None

    def __post_init__(self) -> None:
        if self.effort not in (None, *EFFORTS):
            raise UsageError(f"reasoning: got {self.effort!r}, want {' or '.join(EFFORTS)}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """ids of a conversation up to the start of the next answer. in_reasoning: the prompt itself opened the reasoning,
    so that the answer begins inside it. tools: those of the request, which say what the arguments of a call are."""

    ids: list[int]
    in_reasoning: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()


class ChatFormat(Protocol):
    """How a conversation becomes ids: Mistral's segments, a template, or a plain transcript."""

    @property
    def name(self) -> str:
        """What to tell the user about the choice."""

    @property
    def turn_stops(self) -> tuple[str, ...]:
        """Strings that end an answer although they are no special tokens."""

    @property
    def turn_end(self) -> int | None:
        """The id that closes an answer, where it is known from the format alone."""

    @property
    def takes_tools(self) -> bool:
        """Whether there is a place for tools, calls and results."""

    @property
    def thinking_switch(self) -> bool:
        """Whether Request.thinking changes anything."""

    @property
    def takes_effort(self) -> bool:
        """Whether Request.effort changes anything."""

    def encode(self, messages: Sequence[Message], limit: int | None = None, request: Request | None = None) -> Prompt:
        """The whole conversation, ready for the next answer. limit: see Vocabulary.check_length."""


def check_conversation(messages: Sequence[Message]) -> None:
    """An answer can only follow a user's message or a tool's result; UsageError otherwise."""
    if not messages or messages[-1].role not in ASKING:
        last = repr(messages[-1].role) if messages else "none"
        raise UsageError(f"the last message of the conversation: got {last}, want one of role 'user' or 'tool'")


def without_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """ids without the end-of-answer ids at their end: [5, 6, 2] -> [5, 6] where 2 ends an answer."""
    kept = list(ids)
    while kept and kept[-1] in ends:
        kept.pop()
    return kept

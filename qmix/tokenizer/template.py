"""The checkpoint's own chat template, rendered to text and encoded without trusting the messages.

A rendered conversation is one string in which "</s>" may be the template's marker or five characters that a user typed.
The template gets the unchanged messages, so it takes the branches that they lead to, and the result says for each
character who wrote it (traced.py). The vocabulary then reads only what the template wrote as a marker.

If a template does something to a message that cannot be followed, the resulting text counts as typed: a marker in it is
encoded as text, and qmix says so. An answer whose ids are kept is inserted as those ids if the template shows it whole,
white space at its ends aside. If it shows a part (without the thoughts of an earlier answer), that part is encoded as
text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qmix.errors import QmixError, UsageError
from qmix.tokenizer.message import CLOSE, OPEN, Message, Prompt, Request, check_conversation, without_end
from qmix.tokenizer.sandbox import Template
from qmix.tokenizer.traced import TEMPLATE, UNKNOWN, Traced, plain, source, sources_of
from qmix.tokenizer.vocabulary import ANSWER, OWN, TYPED, Rendered, Splice, Vocabulary, check_text

STAND_IN = "\U00100000"  # private use, plane 16
OTHER = "qmix"  # what stands for a message to see whether the template looks at it
SWITCH = "enable_thinking"  # the variable that turns a model's reasoning on and off
EFFORT = "reasoning_effort"  # the variable that says how much to reason
TOOLS = source(0)


def _content(k: int) -> str:
    """The source of message k's text; its reasoning and its tool calls have sources of their own."""
    return source(3 * k + 1)


def _reasoning(k: int) -> str:
    return source(3 * k + 2)


def _calls(k: int) -> str:
    return source(3 * k + 3)


class TemplateFormat:
    """tool_template: the template for requests with tools, where the model has one of its own for them."""

    turn_stops: tuple[str, ...] = ()

    def __init__(self, vocabulary: Vocabulary, template: Template, named: Mapping[str, str],
                 eos_ids: Sequence[int], say: Callable[[str], None], tool_template: Template | None = None,
                 name: str = "the checkpoint's template"):
        self.name = name
        self._vocabulary = vocabulary
        self._template = template
        self._tool_template = tool_template or template
        self._named = dict(named)
        self._say = say
        self._said = False
        self.takes_tools = self._tool_template.reads("tools")
        self.thinking_switch = template.reads(SWITCH)
        self.takes_effort = template.reads(EFFORT)
        self.turn_end = self._find_turn_end()
        ends = [*eos_ids, self.turn_end]
        self._ends = tuple(i for i in ends if i is not None)

    def encode(self, messages: Sequence[Message], limit: int | None = None, request: Request | None = None) -> Prompt:
        request = request or Request()
        check_conversation(messages)
        for message in messages:
            check_text(message.content)
        text = self._render(messages, request)
        self._vocabulary.check_length([plain(text)], limit)
        self._check_complete(messages, text, request)
        parts = list(self._splice(text, messages, request))
        self._check_followed(text)
        ids = self._vocabulary.encode_rendered(list(_join_ends(parts, self._ends, self._vocabulary)))
        bos = self._vocabulary.bos_id
        while bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        return Prompt(ids, _opens_reasoning(text), request.tools)

    def render(self, messages: Sequence[Message], prompt: bool = True) -> str:
        """The conversation as the template writes it; prompt: with the start of the next answer."""
        return plain(self._render(messages, Request(), prompt))

    def _render(self, messages: Sequence[Message], request: Request, prompt: bool = True) -> Traced:
        template = self._tool_template if request.tools else self._template
        tools = [_traced(tool, TOOLS) for tool in request.tools] or None
        switches = {name: value for name, value in ((SWITCH, request.thinking), (EFFORT, request.effort))
                    if value is not None}
        shown = [_shown(message, k, template) for k, message in enumerate(messages)]
        return template.render(shown, self._named, prompt, tools, **switches)

    def _splice(self, text: Traced, messages: Sequence[Message], request: Request) -> Iterator[Rendered | Splice]:
        """The rendered text, with the ids of each answer that is shown whole in its place."""
        places = sorted((match.start(), match.end(), k) for k, message in enumerate(messages)
                        if message.ids is not None and message.content.strip()
                        for match in re.finditer(f"{re.escape(_content(k))}+", sources_of(text)))
        begin = 0
        for start, end, k in places:
            ids = messages[k].ids
            if ids is None or plain(text[start:end]).strip() != messages[k].content.strip():
                continue
            yield self._rendered(self._align(text, start, messages[:k], request)[begin:], messages)
            yield Splice(ids)
            begin = end
        yield self._rendered(text[begin:], messages)

    def _align(self, text: Traced, start: int, before: Sequence[Message], request: Request) -> Traced:
        """The text in front of a spliced answer, with the white space that was there when it was generated: a template
        that writes "[/INST] answer" but asks with "[/INST]" would else change the ids in front of it."""
        ahead = text[:start]
        asked = self._render(before, request)
        bare = ahead.rstrip()
        return bare + asked[len(bare):] if plain(bare) == plain(asked.rstrip()) else ahead

    def _rendered(self, text: Traced, messages: Sequence[Message]) -> Rendered:
        """The text with who is behind each character; white space at the ends of answers is the template's."""
        trust = {ord(TEMPLATE): OWN, ord(UNKNOWN): TYPED, ord(TOOLS): TYPED}
        for k, message in enumerate(messages):
            trust[ord(_content(k))] = ANSWER if message.role == "assistant" else TYPED
            trust[ord(_reasoning(k))], trust[ord(_calls(k))] = ANSWER, TYPED
        return Rendered(plain(text), sources_of(text).translate(trust))

    def _check_followed(self, text: Traced) -> None:
        """Say, once, that markers in what the template made of a message are encoded as text."""
        unknown = (match.span() for match in re.finditer(f"{UNKNOWN}+", sources_of(text)))
        found = next((m for start, end in unknown if (m := self._vocabulary.marker_pattern.search(
            plain(text), start, end))), None)
        if found is not None and not self._said:
            self._said = True
            self._say(f"the chat template rewrites a message in a way that qmix cannot follow: {found[0]!r} in it is "
                      "encoded as text, not as a control token")

    def _check_complete(self, messages: Sequence[Message], text: Traced, request: Request) -> None:
        """A template that leaves out a system prompt, tools or a call would do so in silence. One that looks at them
        does not: it writes something else without them."""
        shown = set(sources_of(text))

        def left_out(source: str, other: Sequence[Message], asked: Request = request) -> bool:
            return source not in shown and plain(self._render(other, asked)) == plain(text)

        for k, message in enumerate(messages):
            def changed(k: int = k, **fields: Any) -> list[Message]:
                return [*messages[:k], replace(messages[k], **fields), *messages[k + 1:]]

            if message.role != "assistant" and message.content.strip() and left_out(
                    _content(k), changed(content=OTHER)):
                raise UsageError(f"the model's chat template leaves out the {message.role} message",
                                 "this model takes no system prompt: put it into your first message"
                                 if message.role == "system" else None)
            if message.tool_calls and left_out(_calls(k), changed(tool_calls=())):
                raise UsageError("the model's chat template leaves out the tool calls of an answer")
            if len(message.tool_calls) > 1 and plain(text) == plain(self._render(
                    changed(tool_calls=message.tool_calls[:-1]), request)):
                raise UsageError("the model's chat template leaves out all but the first tool call of an answer",
                                 "give each call as an answer of its own, its result behind it")
        if request.tools and self._tool_template is self._template and left_out(
                TOOLS, messages, replace(request, tools=())):
            raise UsageError("the model's chat template leaves out the tools")

    def _find_turn_end(self) -> int | None:
        """The marker that the template writes behind an answer."""
        try:
            text = self._render([Message("user", "x"), Message("assistant", STAND_IN)], Request(), prompt=False)
        except QmixError:
            return None  # a template that fails here fails with its message when a conversation comes
        at = sources_of(text).rfind(_content(1))
        if at < 0:
            return None
        after = self._vocabulary.split(Rendered(plain(text[at + 1:]).lstrip(), OWN * len(text[at + 1:].lstrip())))
        return after[0] if after and isinstance(after[0], int) else None


def _shown(message: Message, k: int, template: Template) -> dict[str, Any]:
    """Message k as a template gets it, in the form that transformers documents. Reasoning is handed over under
    "reasoning_content" where the template reads that key, between its tags in front of the answer where the template
    knows the tags, under "thinking" where it reads that (gpt-oss), and not at all where it knows none of them."""
    content = Traced(message.content, _content(k) * len(message.content))
    shown: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning is not None:
        if template.reads_key("reasoning_content"):
            shown["reasoning_content"] = _traced(message.reasoning, _reasoning(k))
        elif template.parses_reasoning:
            shown["content"] = _traced(f"{OPEN}\n{message.reasoning}\n{CLOSE}\n\n", _reasoning(k)) + content
        elif template.reads_key("thinking"):
            shown["thinking"] = _traced(message.reasoning, _reasoning(k))
    if message.tool_calls:
        shown["tool_calls"] = [_traced({
            "type": "function", **({} if call.id is None else {"id": call.id}),
            "function": {"name": call.name, "arguments": call.arguments}}, _calls(k)) for call in message.tool_calls]
    for key in ("tool_call_id", "name"):
        if (value := getattr(message, key)) is not None:
            shown[key] = _traced(value, _content(k))
    return shown


def _traced(value: Any, source: str) -> Any:
    """value with every text in it traced to `source`, keys of objects included."""
    if isinstance(value, str):
        return Traced(value, source * len(value))
    if isinstance(value, Mapping):
        return {_traced(key, source): _traced(each, source) for key, each in value.items()}
    return [_traced(each, source) for each in value] if isinstance(value, list | tuple) else value


def _opens_reasoning(text: Traced) -> bool:
    """Whether a prompt ends with the tag that opens the reasoning, written by the template itself."""
    end = text.rstrip()
    return plain(end).endswith(OPEN) and sources_of(end)[-len(OPEN):] == TEMPLATE * len(OPEN)


def _join_ends(parts: Sequence[Rendered | Splice], ends: Sequence[int],
               vocabulary: Vocabulary) -> Iterator[Rendered | Splice]:
    """Let each answer end once: a generated end that the template writes too comes from the template, and
    white space that it puts between the answer and that end is left out, as it was not generated."""
    ended = False
    for i, part in enumerate(parts):
        if isinstance(part, Splice):
            kept = without_end(part.ids, ends)
            ended = len(kept) < len(part.ids) and _begins_with_end(parts[i + 1:], ends, vocabulary)
            yield Splice(kept) if ended else part
            continue
        spaces = len(part.text) - len(part.text.lstrip())
        yield Rendered(part.text[spaces:], part.trust[spaces:]) if ended else part
        ended = False


def _begins_with_end(parts: Sequence[Rendered | Splice], ends: Sequence[int], vocabulary: Vocabulary) -> bool:
    """Whether the template goes on with a marker, which after white space must be one that ends an answer."""
    if not parts or isinstance(parts[0], Splice):
        return False
    text, trust = parts[0].text, parts[0].trust
    spaces = len(text) - len(text.lstrip())
    match = vocabulary.marker_pattern.match(text, spaces)
    if match is None or set(trust[match.start():match.end()]) != {OWN}:
        return False
    return spaces == 0 or vocabulary.markers[match[0]] in ends

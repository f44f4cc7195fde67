"""The checkpoint's own chat template, rendered to text and encoded without trusting the messages.

A rendered conversation is one string in which "</s>" may be the template's marker or five characters
that a user typed. So the template never sees the typed ones: before rendering, every marker spelled in a
message is replaced by one private-use character, and so are a message's first and last character where
they could complete a marker together with the template's text or a neighbour's. Whatever marker is in the
rendered text is then the template's own. The text is split there, the stand-ins are put back, and the texts
between are encoded as plain text. An answer whose ids are kept is a stand-in as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from qmix.errors import QmixError, UsageError
from qmix.tokenizer.message import Message, check_conversation, without_end
from qmix.tokenizer.sandbox import Template
from qmix.tokenizer.vocabulary import Segment, Splice, Vocabulary, check_text

PRIVATE_USE = range(0x100000, 0x10FFFE)  # plane 16


class _StandIns:
    """Private-use characters that stand for text, or for the ids of a whole answer."""

    def __init__(self, vocabulary: Vocabulary, texts: Sequence[str]):
        used = {c for text in texts for c in text}
        self._free = (c for c in map(chr, PRIVATE_USE) if c not in used)
        self._pattern = vocabulary.marker_pattern
        self._marker_characters = {c for text in vocabulary.markers for c in text}
        self._of: dict[str, str] = {}
        self._texts: dict[int, str] = {}
        self.splices: dict[str, Splice] = {}

    def _new(self) -> str:
        found = next(self._free, None)
        if found is None:
            raise UsageError("the conversation uses every private-use character of Unicode", "shorten it")
        return found

    def _for(self, text: str) -> str:
        if text not in self._of:
            self._of[text] = self._new()
            self._texts[ord(self._of[text])] = text
        return self._of[text]

    def protect(self, content: str) -> str:
        """content without any marker in it, with safe edges; white space stays, for the template to trim."""
        safe = self._pattern.sub(lambda match: self._for(match[0]), content)
        inner = safe.strip()
        start = safe.find(inner)
        for at in {start, start + len(inner) - 1} if inner else ():
            if safe[at] in self._marker_characters:
                safe = safe[:at] + self._for(safe[at]) + safe[at + 1:]
        return safe

    def splice(self, ids: Sequence[int]) -> str:
        character = self._new()
        self.splices[character] = Splice(ids)
        return character

    def restore(self, text: str) -> str:
        return text.translate(self._texts)


class TemplateFormat:
    name = "the checkpoint's template"
    turn_stops: tuple[str, ...] = ()

    def __init__(self, vocabulary: Vocabulary, template: Template, named: Mapping[str, str],
                 eos_ids: Sequence[int]):
        self._vocabulary = vocabulary
        self._template = template
        self._named = dict(named)
        self.turn_end = self._find_turn_end()
        ends = [*eos_ids, self.turn_end]
        self._ends = tuple(i for i in ends if i is not None)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        check_conversation(messages)
        for message in messages:
            check_text(message.content)
        stand_ins, shown = self._show(messages)
        text = self._template.render(shown, self._named, prompt=True)
        self._check_complete(messages, stand_ins.restore(text))
        text = self._align(text, shown, stand_ins)
        segments = list(_join_ends(list(self._split(text, stand_ins)), self._ends))
        ids = self._vocabulary.encode_segments(segments)
        bos = self._vocabulary.bos_id
        while bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        return ids

    def _show(self, messages: Sequence[Message]) -> tuple[_StandIns, list[dict[str, str]]]:
        """The messages as the template sees them."""
        stand_ins = _StandIns(self._vocabulary, [message.content for message in messages])
        shown = []
        for message in messages:
            ids, content = message.ids, message.content
            content = stand_ins.protect(content) if ids is None else stand_ins.splice(ids)
            shown.append({"role": message.role, "content": content})
        return stand_ins, shown

    def _align(self, text: str, shown: list[dict[str, str]], stand_ins: _StandIns) -> str:
        """In front of a spliced answer put the white space that was there when it was generated: a template
        that writes "[/INST] answer" but asks with "[/INST]" would else change the ids in front of it."""
        for i in range(len(shown) - 1, 0, -1):
            at = text.find(shown[i]["content"]) if shown[i]["content"] in stand_ins.splices else -1
            if at < 0:
                continue
            asked = self._template.render(shown[:i], self._named, prompt=True)
            before = text[:at].rstrip()
            if before == asked.rstrip():
                text = before + asked[len(before):] + text[at:]
        return text

    def _split(self, text: str, stand_ins: _StandIns) -> Iterator[Segment]:
        pattern = "|".join([self._vocabulary.marker_pattern.pattern, *map(re.escape, stand_ins.splices)])
        for part in re.split(f"({pattern})", text):
            if part in stand_ins.splices:
                yield stand_ins.splices[part]
            elif part in self._vocabulary.markers:
                yield self._vocabulary.markers[part]
            elif part:
                yield stand_ins.restore(part)

    def _check_complete(self, messages: Sequence[Message], rendered: str) -> None:
        """A template that leaves out a system prompt would do so in silence."""
        squeezed = "".join(rendered.split())
        for message in messages:
            if message.role != "assistant" and "".join(message.content.split()) not in squeezed:
                raise UsageError(f"the model's chat template leaves out the {message.role} message",
                                 "this model takes no system prompt: put it into your first message"
                                 if message.role == "system" else None)

    def _find_turn_end(self) -> int | None:
        """The marker that the template writes behind an answer."""
        try:
            stand_ins, shown = self._show([Message("user", "x"), Message("assistant", "", ids=())])
            text = self._template.render(shown, self._named, prompt=False)
        except QmixError:
            return None  # a template that fails here fails with its message when a conversation comes
        segments = [s for s in self._split(text, stand_ins) if not (isinstance(s, str) and s.isspace())]
        after = next((i + 1 for i, s in enumerate(segments) if isinstance(s, Splice)), len(segments))
        end = segments[after] if after < len(segments) else None
        return end if isinstance(end, int) else None


def _join_ends(segments: Sequence[Segment], ends: Sequence[int]) -> Iterator[Segment]:
    """Let each answer end once: a generated end that the template writes too comes from the template, and
    white space that it puts between the answer and that end is left out, as it was not generated."""
    i = 0
    while i < len(segments):
        segment = segments[i]
        i += 1
        if not isinstance(segment, Splice):
            yield segment
            continue
        ended = len(without_end(segment.ids, ends)) < len(segment.ids)
        space = segments[i] if i < len(segments) else None
        ahead = i + (isinstance(space, str) and space.isspace())
        marker = segments[ahead] if ahead < len(segments) else None
        if ended and isinstance(marker, int) and (ahead == i or marker in ends):
            i = ahead
            yield Splice(without_end(segment.ids, ends))
        else:
            yield segment

"""The answers of gpt-oss: messages in channels, as the harmony format has them.

    <|channel|>analysis<|message|>The sky, hm.<|end|><|start|>assistant<|channel|>final<|message|>It scatters.<|return|>

The header of a message stands before its <|message|>: role, channel, recipient (`to=functions.weather`, in the role's
part or the channel's), type of the content. Channel analysis is reasoning. Channel final is the answer, and so is
commentary that goes to nobody: what the model tells the user before it calls a tool. A message to a recipient is a
call.

A message ends with <|end|>, an answer with <|return|>, or with <|call|> where it waits for a tool's result. Malformed
answers give parts too: a message that starts before the last one ended ends it, and what is not understood (another
role or channel, a header without its message) is shown as it is spelled, with the answer.

Source: OpenAI, "Harmony response format". Only marked control tokens count (parts.py), so an answer may write about
<|end|>.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from qmix.tokenizer.message import Prompt
from qmix.tokenizer.parts import CALL, MARK, AnswerFormat, Call, Kind, Part, Span
from qmix.tokenizer.vocabulary import Vocabulary

START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALLED = MARKS = (
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
STOPS = (RETURN, CALLED)
ASSISTANT = "assistant"
CHANNELS = ("analysis", "commentary", "final")
RECIPIENT = "to="
FUNCTIONS = "functions."  # the namespace of the tools that a request brings
TO_NOBODY = (ASSISTANT, "user", "all")
LONGEST_HEADER = 256  # characters; longer ones are no header
MARKED = re.compile(f"{MARK}({'|'.join(map(re.escape, MARKS))})")


def harmony_format(vocabulary: Vocabulary, templates: str | None) -> AnswerFormat | None:
    """The format of answers, where the vocabulary has its control tokens and the templates, if any, write them."""
    ids = {vocabulary.markers.get(text): text for text in MARKS}
    if None in ids or (templates is not None and not (CHANNEL in templates and MESSAGE in templates)):
        return None
    marks = {i: text for i, text in ids.items() if i is not None}
    return AnswerFormat(_parser, marks, vocabulary.markers[START], (vocabulary.markers[MESSAGE],), verbatim=False)


def harmony_stops(vocabulary: Vocabulary) -> list[int]:
    return [vocabulary.markers[text] for text in STOPS]


def _parser(prompt: Prompt, opening: str) -> HarmonyParser:
    return HarmonyParser(opening)


@dataclass(slots=True)
class _Header:
    """spelled: what the model wrote of it. begin: where in the text. role, channel, content_type: the texts behind
    <|start|>, <|channel|> and <|constrain|>, None before these came."""

    begin: int
    spelled: str = ""
    role: str | None = None
    channel: str | None = None
    content_type: str | None = None

    def add(self, text: str) -> None:
        self.spelled += text
        if self.content_type is not None:
            self.content_type += text
        elif self.channel is not None:
            self.channel += text
        else:
            self.role = (self.role or "") + text

    @property
    def words(self) -> tuple[list[str], list[str]]:
        """Role and channel, without the recipient."""
        role, channel = ([word for word in (part or "").split() if not word.startswith(RECIPIENT)]
                         for part in (self.role, self.channel))
        return role or [ASSISTANT], channel

    @property
    def recipient(self) -> str | None:
        """Whom the message goes to, None for nobody in particular."""
        found = [word.removeprefix(RECIPIENT) for word in f"{self.role or ''} {self.channel or ''}".split()
                 if word.startswith(RECIPIENT)]
        return found[0] if found and found[0] not in ("", *TO_NOBODY) else None

    @property
    def possible(self) -> bool:
        """Whether it may become a header: few words, and behind the role nothing but the recipient."""
        role = (self.role or "").split()
        return (len(self.spelled) <= LONGEST_HEADER and len(role) <= 2
                and all(w.startswith(RECIPIENT) or RECIPIENT.startswith(w) for w in role[1:])
                and len((self.channel or "").split()) <= 3)

    @property
    def unfinished(self) -> bool:
        """Whether what there is of it begins a header that is understood."""
        (role, *others), channel = self.words
        return bool(self.spelled.startswith((START, CHANNEL)) and ASSISTANT.startswith(role) and not others
                    and any(name.startswith("".join(channel[:1])) for name in CHANNELS))


@dataclass(slots=True)
class _Content:
    """The message that is being read. begin: of the message; content: of its text. call: the function's name. texts:
    what came of the text; shown: whether a part was given."""

    kind: Kind
    begin: int
    content: int
    call: str | None = None
    texts: list[str] = field(default_factory=list)
    shown: bool = False


class HarmonyParser:
    """An AnswerParser. opening: what the prompt wrote of the message that the answer goes on with, marked."""

    def __init__(self, opening: str = MARK + START + ASSISTANT):
        self.found = False
        self.calls: list[Call] = []
        self.thinking: list[Span] = []
        self._answers: list[Span] = []
        self._exact = True  # whether the parts say no other characters than the text
        self._said: set[str] = set()  # kinds that parts have been given of
        self._held = ""
        self._blank = ""  # spaces between two messages, which count where other text follows them
        self._at = 0  # characters read
        self._header: _Header | None = None
        self._content: _Content | None = None
        self.push(opening)
        self._begin_afresh()

    def _begin_afresh(self) -> None:
        """Where the prompt ends the answer begins: what came until now is not part of it."""
        self._at, self.calls, self.thinking, self._answers, self._exact = 0, [], [], [], True
        self._said.clear()
        if self._header is not None:
            self._header.begin, self._header.spelled = 0, ""
        elif self._content is not None:
            self._content.begin = self._content.content = 0
            self._content.texts.clear()
        else:
            self._header = _Header(0)

    @property
    def answering(self) -> bool:
        return self._content is not None and self._content.kind == "answer"

    @property
    def answers(self) -> list[Span]:
        last = self._content
        open_ones: list[Span] = [(last.content, None)] if last is not None and last.kind == "answer" and last.texts \
            else []
        return [*self._answers, *open_ones] if self._exact else []

    def push(self, text: str) -> list[Part]:
        """What is certain with this piece. Of a message, the header is held back until it is complete."""
        self._held += text
        parts: list[Part] = []
        while self._held:
            found = MARKED.match(self._held)
            if found is not None:
                parts += self._mark(found[1])
                self._take(len(found[0]))
                continue
            if any((MARK + mark).startswith(self._held) for mark in MARKS):
                break
            at = self._held.find(MARK, 1)
            taken = self._take(len(self._held) if at < 0 else at)
            self._exact = self._exact and MARK not in taken
            parts += self._text(taken.replace(MARK, ""))
        return parts

    def finish(self) -> list[Part]:
        """What was held back: a header that the end cut in two is dropped, one that is none is shown."""
        self._exact = self._exact and not self._held
        parts = self._text(self._held.replace(MARK, ""))
        self._held = ""
        if self._header is not None and not self._header.unfinished:
            parts += self._spell(self._header)
            self._header = None
        last, self._content = self._content, None
        if last is not None and last.kind == "reasoning":
            self.thinking.append((last.begin, None))
        elif last is not None and last.kind == "answer" and last.texts:
            self._answers.append((last.content, None))
        return parts

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._at += count
        return text

    def _text(self, text: str) -> list[Part]:
        """Text between two control tokens, or a piece of it; it has been taken already."""
        if self._content is not None:
            return self._say(text)
        if self._header is None:
            text, self._blank = self._blank + text, ""
            if not text.strip():
                self._blank = text
                return []
            self._content = _Content("answer", self._at - len(text), self._at - len(text))
            return self._say(text)
        self._header.add(text)
        if self._header.possible:
            return []
        header, self._header = self._header, None
        return self._spell(header)

    def _mark(self, mark: str) -> list[Part]:
        """A control token, which has not been taken yet."""
        self._blank = ""
        if self._content is not None:
            if mark in (MESSAGE, CONSTRAIN):
                self._exact = False
                return self._say(mark)
            self._end(self._at + len(MARK + mark) if mark not in (START, CHANNEL) else self._at)
        parts: list[Part] = []
        header = self._header
        if header is not None and mark == MESSAGE:
            self._header = None
            return self._open(header, mark)
        if header is not None and ((mark == CHANNEL and header.channel is None)
                                   or (mark == CONSTRAIN and header.content_type is None)):
            self._begin_section(header, mark)
            return []
        if header is not None:
            if header.spelled:
                parts = self._spell(header)
                self._end(self._at)
            self._header = None
        if mark in (START, CHANNEL, CONSTRAIN):
            self._header = _Header(self._at)
            self._begin_section(self._header, mark)
        elif mark == MESSAGE:
            parts += self._open(_Header(self._at), mark)
        return parts

    @staticmethod
    def _begin_section(header: _Header, mark: str) -> None:
        header.spelled += mark
        if mark == CHANNEL:
            header.channel = ""
        elif mark == CONSTRAIN:
            header.content_type = ""

    def _open(self, header: _Header, mark: str) -> list[Part]:
        """A message begins behind its complete header."""
        role, channel = header.words
        content = self._at + len(MARK + mark)
        if role != [ASSISTANT] or (channel and channel[0] not in CHANNELS):
            parts = self._spell(header)
            return parts + self._say(mark)
        if (recipient := header.recipient) is not None:
            self._content = _Content("call", header.begin, content, recipient.removeprefix(FUNCTIONS))
            return self._show(f"{CALL}{self._content.call} ")
        if channel[:1] == ["analysis"]:
            self.found = True
            self._content = _Content("reasoning", header.begin, content)
        else:
            self._content = _Content("answer", header.begin, content)
        return []

    def _spell(self, header: _Header) -> list[Part]:
        """A header that is none, as it is written, begins a part of the answer."""
        self._exact = self._exact and "<|" not in header.spelled
        self._content = _Content("answer", header.begin, header.begin)
        return self._say(header.spelled)

    def _say(self, text: str) -> list[Part]:
        """A piece of the message that is being read."""
        if text and self._content is not None:
            self._content.texts.append(text)
        return self._show(text)

    def _show(self, text: str) -> list[Part]:
        """A blank line parts a message from an earlier one of its kind."""
        message = self._content
        if message is None or not text:
            return []
        between = "\n\n" if message.kind in self._said and not message.shown else ""
        message.shown = True
        self._said.add(message.kind)
        return [Part(between + text, message.kind)]

    def _end(self, end: int) -> None:
        """The message that is being read is complete. end: behind it, its control token included."""
        message, self._content = self._content, None
        if message is None:
            return
        if message.call is not None:
            self.calls.append(Call(message.call, "".join(message.texts)))
        elif message.kind == "reasoning":
            self.thinking.append((message.begin, end))
        elif message.texts:
            self._answers.append((message.content, self._at))

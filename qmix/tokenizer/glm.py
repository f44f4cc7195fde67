"""The calls of GLM-4.5:

    <tool_call>weather
    <arg_key>place</arg_key>
    <arg_value>Lyon</arg_value>
    </tool_call>

gives Call("weather", '{"place": "Lyon"}'). A value is text where the tools of the request say that the argument is a
text. Any other value is JSON, and what is no JSON is text. A call that gives an argument twice is none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qmix.tokenizer.call_grammars import glm_grammar
from qmix.tokenizer.calls import BEGIN, END, CallParser, NoCall, TextArguments, arguments_of
from qmix.tokenizer.parts import AnswerFormat, Call

KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


def glm_format(templates: str) -> AnswerFormat | None:
    """The format of answers, where the templates write calls in this form."""
    return AnswerFormat(lambda prompt, opening: CallParser(prompt, GlmCall), call_grammar=glm_grammar) if all(
        tag in templates for tag in (BEGIN, KEY, VALUE)) else None


@dataclass(slots=True)
class GlmCall:
    """A call as far as it has been read. at: behind the last complete element of the text; searched: where the search
    for the end of the next one goes on."""

    at: int
    name: str | None = None
    key: str | None = None
    values: list[tuple[str, str]] = field(default_factory=list)
    searched: int = 0

    def read(self, text: str) -> bool:
        """Whether the call is complete; `at` is behind it then. NoCall where it can become none. text: from the same
        place on as before, and longer."""
        while True:
            if self.name is None:
                if not self._read_name(text):
                    return False
            elif self.key is None:
                self._skip_space(text)
                if text.startswith(END, self.at):
                    self.at += len(END)
                    return True
                if not self._begins(text, KEY, END) or (key := self._until(text, KEY, KEY_END)) is None:
                    return False
                self.key = key
            else:
                self._skip_space(text)
                if not self._begins(text, VALUE) or (value := self._until(text, VALUE, VALUE_END)) is None:
                    return False
                if any(key == self.key for key, _ in self.values):
                    raise NoCall
                self.values.append((self.key, value))
                self.key = None

    def _read_name(self, text: str) -> bool:
        """The name ends with its line, or where a tag begins."""
        ends = [at for stop in ("\n", "<") if (at := text.find(stop, self.at)) >= 0]
        if not ends:
            return False
        name = text[self.at:min(ends)].strip()
        if not name or any(map(str.isspace, name)):
            raise NoCall
        self.name, self.at = name, min(ends)
        return True

    def _skip_space(self, text: str) -> None:
        while self.at < len(text) and text[self.at].isspace():
            self.at += 1

    def _begins(self, text: str, *tags: str) -> bool:
        """Whether the first of the tags stands there whole; NoCall where none of them can."""
        there = text[self.at:self.at + max(map(len, tags))]
        if not any(there.startswith(tag) or tag.startswith(there) for tag in tags):
            raise NoCall
        return there.startswith(tags[0])

    def _until(self, text: str, tag: str, end: str) -> str | None:
        """What stands between the tags, None as long as the second is missing."""
        begin = self.at + len(tag)
        found = text.find(end, max(begin, self.searched))
        if found < 0:
            self.searched = max(begin, len(text) - len(end) + 1)
            return None
        self.at = found + len(end)
        return text[begin:found]

    def call(self, texts: TextArguments) -> Call:
        assert self.name is not None
        return Call(self.name, arguments_of(self.values, texts.get(self.name, frozenset())))

"""Calls as Qwen3-Coder and Qwen3.5 write them:

    <tool_call>
    <function=weather>
    <parameter=place>
    Lyon
    </parameter>
    </function>
    </tool_call>

gives Call("weather", '{"place": "Lyon"}'). One line break at each end of a value belongs to its tags. A value is text
where the tools of the request say that the argument is a text. Any other value is JSON, or True, False or None, which
is how these templates spell JSON's true, false and null; what is neither is text. A call that gives an argument twice
is none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qmix.tokenizer.call_grammars import xml_grammar
from qmix.tokenizer.calls import BEGIN, END, CallParser, NoCall, TextArguments, arguments_of
from qmix.tokenizer.parts import AnswerFormat, Call

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
WORDS = {"True": "true", "False": "false", "None": "null"}


def xml_format(templates: str) -> AnswerFormat | None:
    """The format of answers, where the templates write calls in this form."""
    return AnswerFormat(lambda prompt, opening: CallParser(prompt, XmlCall), call_grammar=xml_grammar) if all(
        tag in templates for tag in (BEGIN, FUNCTION, PARAMETER)) else None


@dataclass(slots=True)
class XmlCall:
    """A CallReader. key: of the parameter whose value comes next; closed: whether the function is; searched: where the
    search for the end of a value goes on."""

    at: int
    name: str | None = None
    key: str | None = None
    closed: bool = False
    values: list[tuple[str, str]] = field(default_factory=list)
    searched: int = 0

    def read(self, text: str) -> bool:
        while True:
            if self.key is not None:
                end = text.find(PARAMETER_END, max(self.at, self.searched))
                if end < 0:
                    self.searched = max(self.at, len(text) - len(PARAMETER_END) + 1)
                    return False
                self.values.append((self.key, text[self.at:end].removeprefix("\n").removesuffix("\n")))
                self.at, self.key = end + len(PARAMETER_END), None
                continue
            self._skip_space(text)
            wanted = (END,) if self.closed else (FUNCTION,) if self.name is None else (PARAMETER, FUNCTION_END)
            tag = next((tag for tag in wanted if text.startswith(tag, self.at)), None)
            if tag is None:
                if not any(tag.startswith(text[self.at:]) for tag in wanted):
                    raise NoCall
                return False
            if tag == END:
                self.at += len(END)
                return True
            if tag == FUNCTION_END:
                self.at, self.closed = self.at + len(tag), True
            elif not self._read_name(text, self.at + len(tag)):
                return False

    def _read_name(self, text: str, start: int) -> bool:
        """The function's name or a parameter's, which ends with its tag."""
        end = text.find(">", start)
        name = text[start:] if end < 0 else text[start:end]
        if "\n" in name or "<" in name:
            raise NoCall
        if end < 0:
            return False
        if not name.strip() or any(name.strip() == key for key, _ in self.values):
            raise NoCall
        self.at = end + 1
        if self.name is None:
            self.name = name.strip()
        else:
            self.key = name.strip()
        return True

    def _skip_space(self, text: str) -> None:
        while self.at < len(text) and text[self.at].isspace():
            self.at += 1

    def call(self, texts: TextArguments) -> Call:
        assert self.name is not None
        typed = texts.get(self.name, frozenset())
        spelled = [(key, value if key in typed else WORDS.get(value, value)) for key, value in self.values]
        return Call(self.name, arguments_of(spelled, typed))

"""A chat template is a program that came with the weights, so it runs in jinja2's immutable sandbox: environment.py.

It sees plain dicts and strings only. Its source, its steps, its work, the values that it makes and its output are
bounded: see allowance.py. The result says for each character whether the template wrote it or which message it came
from: see traced.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from qmix.errors import ModelFileError, QmixError, UsageError
from qmix.tokenizer.allowance import MAX_OUTPUT, TooMuch, granted
from qmix.tokenizer.charged import counted, written
from qmix.tokenizer.environment import Refused, template_environment
from qmix.tokenizer.message import CLOSE
from qmix.tokenizer.traced import Traced, sources_of

MAX_SOURCE = 2**20  # characters of a template
CURE = "fix the template, or fetch the model's files again"


class Template:
    """A compiled chat template; file is where it came from, now the clock of strftime_now."""

    def __init__(self, source: str, file: Path, now: Callable[[], datetime] = datetime.now):
        if len(source) > MAX_SOURCE:
            raise ModelFileError(f"{file}: the chat template has {len(source)} characters, "
                                 f"want at most {MAX_SOURCE}")
        self._file = file
        import jinja2

        try:
            environment = template_environment(now)
            with granted():  # jinja2 computes what is constant
                tree = environment.parse(source)
                self._compiled = environment.from_string(tree)
        except (jinja2.TemplateError, TooMuch, MemoryError, OverflowError, RecursionError, SyntaxError,
                ValueError) as e:
            line = f" line {e.lineno}" if isinstance(e, jinja2.TemplateSyntaxError) else ""
            raise ModelFileError(f"{file}: the chat template{line} is broken: {str(e) or type(e).__name__:.300}",
                                 CURE) from None
        self._names, self._keys = _reads(tree)
        self.parses_reasoning = CLOSE in source

    def reads(self, name: str) -> bool:
        """Whether the template looks at the variable `name` anywhere."""
        return name in self._names

    def reads_key(self, key: str) -> bool:
        """Whether the template looks at `key` of a message or of anything else."""
        return key in self._keys

    def render(self, messages: Sequence[Mapping[str, Any]], named: Mapping[str, str], prompt: bool,
               tools: Sequence[Mapping[str, Any]] | None = None, **switches: bool | str) -> Traced:
        """The conversation as text. named: bos_token and the like. prompt: end with the start of an answer.
        switches: further variables, such as enable_thinking and reasoning_effort.
        The sources of what a message brings are those of its `content`; a plain str is as the template's own.

        UsageError with the template's own words where it refuses the conversation, ModelFileError
        where the template fails."""
        context = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt,
                   **named, **switches}
        try:
            with counted():
                parts, length = [], 0
                for part in self._compiled.generate(context):
                    part = written(part)  # a filter block yields what its filter gives
                    parts.append(part)
                    length += len(part)
                    if length > MAX_OUTPUT:
                        raise TooMuch(f"wrote more than {MAX_OUTPUT} characters")
        except Refused as e:
            raise UsageError(f"the model's chat template refuses this conversation: {e}",
                             "most templates want user and assistant to alternate") from None
        except TooMuch as e:
            raise ModelFileError(f"{self._file}: the chat template {e}", CURE) from None
        except QmixError:
            raise
        except Exception as e:  # a template can fail in as many ways as a program
            raise ModelFileError(f"{self._file}: the chat template fails: {type(e).__name__}: "
                                 f"{e!s:.300}", CURE) from None
        return Traced("".join(parts), "".join(map(sources_of, parts)))


def _reads(tree: Any) -> tuple[frozenset[str], frozenset[str]]:
    """(variables, keys of objects) that a parsed template looks at: the keys are attributes and all constant texts,
    which may stand in brackets, before `in` or in a call of `get`."""
    from jinja2 import nodes

    names = frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load")
    texts = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    return names, frozenset((*(node.attr for node in tree.find_all(nodes.Getattr)), *texts))

"""A chat template is a program that came with the weights, so it runs in jinja2's immutable sandbox.

A template gets what transformers gives it (raise_exception, strftime_now, tojson, loop controls, the {% generation %}
mark), but no files, imports or attributes of Python objects. It sees plain dicts and strings only. Its source, its
steps, its products and its output are bounded.

The result says for each character whether the template wrote it or which message it came from: see traced.py. All ways
in which a template makes a text out of others are followed here: output, `~`, operators, filters, methods of literals,
macros and blocks.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from pathlib import Path
from types import BuiltinMethodType, FrameType, FunctionType
from typing import Any

from qmix.errors import ModelFileError, QmixError, UsageError
from qmix.tokenizer.message import CLOSE
from qmix.tokenizer.traced import Traced, as_text, concat, followed, interleave, plain, sources_of

MAX_SOURCE = 2**20  # characters of a template
MAX_STEPS = 2_000_000  # lines of compiled template that one rendering may run: about a second
MAX_VALUE = 2**22  # length of a product or power made inside a template
MAX_OUTPUT = 2**26  # characters of a rendered conversation
# Filters that hand on what they are given, or parts of it, and make no text.
CHOOSING = frozenset({
    "attr", "batch", "d", "default", "dictsort", "first", "groupby", "items", "last", "list", "map", "max", "min",
    "random", "reject", "rejectattr", "select", "selectattr", "slice", "sort", "unique"})
# Filters that call one method of the text.
EXACT = frozenset({"capitalize", "lower", "replace", "reverse", "string", "trim", "upper"})
# Methods of a literal that put their arguments into the result.
MAKING = frozenset({"center", "format", "format_map", "join", "ljust", "replace", "rjust", "translate"})
CURE = "fix the template, or fetch the model's files again"


class _Refused(Exception):
    """The template called raise_exception."""


class _TooMuch(Exception):
    """A bound was reached."""


class Template:
    """A compiled chat template; file is where it came from, now the clock of strftime_now."""

    def __init__(self, source: str, file: Path, now: Callable[[], datetime] = datetime.now):
        if len(source) > MAX_SOURCE:
            raise ModelFileError(f"{file}: the chat template has {len(source)} characters, "
                                 f"want at most {MAX_SOURCE}")
        self._file = file
        import jinja2

        try:
            environment = _environment(now)
            tree = environment.parse(source)
            self._compiled = environment.from_string(tree)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as e:
            line = f" line {e.lineno}" if isinstance(e, jinja2.TemplateSyntaxError) else ""
            raise ModelFileError(f"{file}: the chat template{line} is broken: {e}", CURE) from None
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
            with _bounded(MAX_STEPS):
                parts, length = [], 0
                for part in self._compiled.generate(context):
                    parts.append(part)
                    length += len(part)
                    if length > MAX_OUTPUT:
                        raise _TooMuch(f"wrote more than {MAX_OUTPUT} characters")
        except _Refused as e:
            raise UsageError(f"the model's chat template refuses this conversation: {e}",
                             "most templates want user and assistant to alternate") from None
        except _TooMuch as e:
            raise ModelFileError(f"{self._file}: the chat template {e}", CURE) from None
        except QmixError:
            raise
        except Exception as e:  # a template can fail in as many ways as a program
            raise ModelFileError(f"{self._file}: the chat template fails: {type(e).__name__}: {e}",
                                 CURE) from None
        return Traced("".join(parts), "".join(map(sources_of, parts)))


def _reads(tree: Any) -> tuple[frozenset[str], frozenset[str]]:
    """(variables, keys of objects) that a parsed template looks at: the keys are attributes and all constant texts,
    which may stand in brackets, before `in` or in a call of `get`."""
    from jinja2 import nodes

    names = frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load")
    texts = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    return names, frozenset((*(node.attr for node in tree.find_all(nodes.Getattr)), *texts))


def _environment(now: Callable[[], datetime]) -> Any:
    from jinja2 import compiler, ext, filters, nodes, sandbox, utils

    class Code(compiler.CodeGenerator):
        """Compiles `a ~ b` to a function that keeps the sources."""

        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.concat_values((")
            for arg in node.nodes:
                self.visit(arg, frame)
                self.write(", ")
            self.write("))")

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})
        code_generator_class = Code
        concat = staticmethod(concat)

        def concat_values(self, values: tuple[Any, ...]) -> str:
            return concat(map(as_text, values))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operation(operator, left, right)
            if operator == "%" and isinstance(left, str):
                return followed(lambda form, values: plain(form) % values, (left, right), {})
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            if _makes_text(__obj) and __self.is_safe_callable(__obj):
                kwargs = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}  # jinja2's own
                if getattr(__obj, "__name__", "") == "join" and len(args) == 1 and not kwargs:
                    return interleave(__obj.__self__, list(args[0]))
                return followed(__obj, args, kwargs, exact=True)
            return super().call(__context, __obj, *args, **kwargs)

    class Generation(ext.Extension):
        """{% generation %}...{% endgeneration %} marks answers for training; here it only shows them."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: object) -> None:
        raise _Refused(str(message))

    class Namespace(utils.Namespace):
        """Without names that could shadow Python's own protocols."""

        def __init__(*args: Any, **kwargs: Any):
            utils.Namespace.__init__(*args, **kwargs)
            for name in args[0]._Namespace__attrs:  # what the base class keeps the attributes in
                _check_name(name)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        items = value if attribute is None else map(filters.make_attrgetter(environment, attribute), value)
        return interleave(as_text(d), list(map(as_text, items)))

    def strftime_now(form: str) -> str:
        text = now().strftime(plain(form))
        return Traced(text) if isinstance(form, Traced) else text

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation],
                              finalize=as_text)
    environment.filters["tojson"] = tojson
    for name, function in environment.filters.items():
        if name not in CHOOSING:
            environment.filters[name] = _following(function, exact=name in EXACT)
    environment.filters["join"] = utils.pass_environment(join)
    environment.globals.pop("lipsum")
    environment.globals["namespace"] = Namespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _following(function: Callable[..., Any], exact: bool) -> Callable[..., Any]:
    """A filter whose text is traced; jinja2's marks of what it is to be passed stay."""
    return wraps(function)(lambda *args, **kwargs: followed(function, args, kwargs, exact=exact))


def _makes_text(method: Any) -> bool:
    """Whether it is a method of a str that may put its arguments into its result. Those of Traced follow by
    themselves, but for format, which the sandbox wraps; those that only cut or search give the str's own characters."""
    name = getattr(method, "__name__", "")
    if isinstance(method, FunctionType):
        return name in ("format", "format_map") and hasattr(method, "__wrapped__")
    return isinstance(method, BuiltinMethodType) and isinstance(method.__self__, str) and name in MAKING


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise ValueError(f"a namespace holds no {name!r}")


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse the single operations that could fill the memory. Best effort: a template from a stranger
    can still waste memory in small steps, but it cannot reach anything outside itself."""
    sizes = [len(x) if isinstance(x, (str, list, tuple)) else None for x in (left, right)]
    if operator == "+" and None not in sizes and sum(sizes) > MAX_VALUE:  # type: ignore[arg-type]
        raise _TooMuch(f"made a value longer than {MAX_VALUE}")
    if operator == "*" and sizes != [None, None]:
        times = next((x for x in (left, right) if isinstance(x, int)), 0)
        if max(n for n in sizes if n is not None) * times > MAX_VALUE:
            raise _TooMuch(f"made a value longer than {MAX_VALUE}")
    if operator == "**" and not all(isinstance(x, (int, float)) and abs(x) <= 2**16 for x in (left, right)):
        raise _TooMuch("raised a number to a large power")
    if operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
        raise _TooMuch("formatted text to a great width")


@contextmanager
def _bounded(steps: int) -> Iterator[None]:
    """Count the lines that compiled templates run and stop at `steps`. Counting, unlike a deadline,
    gives the same answer on every machine."""
    left = steps

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooMuch(f"ran more than {steps} steps")
        return line

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)

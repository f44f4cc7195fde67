"""A chat template is a program that came with the weights, so it runs in jinja2's immutable sandbox.

A template gets what transformers gives it (raise_exception, strftime_now, tojson, loop controls, the {% generation %}
mark), but no files, imports or attributes of Python objects. It sees plain dicts and strings only. Its source, its
steps, its work, the values that it makes and its output are bounded: see allowance.py. All operators, calls, filters,
tests, comparisons, slices and lists of a template are charged there.

The result says for each character whether the template wrote it or which message it came from: see traced.py. All ways
in which a template makes a text out of others are followed here: output, `~`, operators, filters, methods of literals,
macros and blocks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from pathlib import Path
from types import BuiltinMethodType, FrameType, FunctionType
from typing import Any

from qmix.errors import ModelFileError, QmixError, UsageError, one_line
from qmix.tokenizer.allowance import (
    COMPARING,
    FLAT_FILTERS,
    FLAT_METHODS,
    FLAT_TESTS,
    MAX_OUTPUT,
    TooMuch,
    allowance,
    check_filter,
    check_length,
    check_method,
    check_operation,
    granted,
    weigh,
)
from qmix.tokenizer.message import CLOSE
from qmix.tokenizer.traced import Traced, as_text, concat, followed, interleave, plain, sources_of

MAX_SOURCE = 2**20  # characters of a template
MAX_WORDS = 2000  # characters of what a template says when it refuses a conversation
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
            with _counted():
                parts, length = [], 0
                for part in self._compiled.generate(context):
                    part = _written(part)  # a filter block yields what its filter gives
                    parts.append(part)
                    length += len(part)
                    if length > MAX_OUTPUT:
                        raise TooMuch(f"wrote more than {MAX_OUTPUT} characters")
        except _Refused as e:
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

        def visit_Compare(self, node: Any, frame: Any) -> None:
            self.write("(environment.look(")
            self.visit(node.expr, frame)
            self.write(")")
            for op in node.ops:
                self.visit(op, frame)
            self.write(")")

        def visit_Operand(self, node: Any, frame: Any) -> None:
            self.write(f" {compiler.operators[node.op]} environment.look(")
            self.visit(node.expr, frame)
            self.write(")")

        def visit_Getitem(self, node: Any, frame: Any) -> None:
            if not isinstance(node.arg, nodes.Slice):
                return super().visit_Getitem(node, frame)
            self.write("environment.make(")
            super().visit_Getitem(node, frame)
            return self.write(")")

        def visit_List(self, node: Any, frame: Any) -> None:
            self.write("environment.make(")
            super().visit_List(node, frame)
            self.write(")")

        def visit_Tuple(self, node: Any, frame: Any) -> None:
            self.write("environment.make(" if node.ctx == "load" else "(")
            super().visit_Tuple(node, frame)
            self.write(")")

        def visit_Dict(self, node: Any, frame: Any) -> None:
            self.write("environment.make({")
            for item in node.items:
                self.write("environment.look(")
                self.visit(item.key, frame)
                self.write("): ")
                self.visit(item.value, frame)
                self.write(", ")
            self.write("})")

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})
        code_generator_class = Code
        concat = staticmethod(_concat)

        def getitem(self, obj: Any, argument: Any) -> Any:
            return super().getitem(obj, self.look(argument) if isinstance(argument, tuple) else argument)

        def look(self, value: Any) -> Any:
            """Of a comparison or a key."""
            allowance().look(value)
            return value

        def make(self, value: Any) -> Any:
            """Of a slice or a list."""
            return allowance().make(value)

        def concat_values(self, values: tuple[Any, ...]) -> str:
            return _concat(map(_written, values))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operation(operator, left, right)
            if operator == "%" and isinstance(left, str):
                return self.make(followed(lambda form, values: plain(form) % values, (left, right), {}))
            return self.make(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, dict) and getattr(__obj, "__name__", "") in FLAT_METHODS:
                allowance().glance(*args[1:])
                allowance().look(*args[:1])  # a key is hashed as a whole
            elif isinstance(owner, str | bytes | int | list | tuple | dict):
                allowance().look(owner, args)
            check_method(__obj, args, kwargs)
            if _makes_text(__obj) and __self.is_safe_callable(__obj):
                kwargs = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}  # jinja2's own
                if getattr(__obj, "__name__", "") == "join" and len(args) == 1 and not kwargs:
                    return __self.make(_interleave(__obj.__self__, args[0]))
                return __self.make(followed(__obj, args, kwargs, exact=True))
            return __self.make(super().call(__context, __obj, *args, **kwargs))

    class Generation(ext.Extension):
        """{% generation %}...{% endgeneration %} marks answers for training; here it only shows them."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: object) -> None:
        raise _Refused(one_line(f"{_written(message):.{MAX_WORDS}}"))

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
        return _interleave(as_text(d), map(_written, items))

    def strftime_now(form: str) -> str:
        check_length(len(form), MAX_WORDS)
        text = now().strftime(plain(form))
        return Traced(text) if isinstance(form, Traced) else text

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation],
                              finalize=_written)
    environment.filters["tojson"] = tojson
    environment.filters["join"] = utils.pass_environment(join)
    for name, function in environment.filters.items():
        environment.filters[name] = _charged(name, function)
    tests: dict[str, Any] = environment.tests
    for name, test in tests.items():
        tests[name] = _charged_test(name, test)
    environment.globals.pop("lipsum")
    environment.globals["namespace"] = Namespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*environment.look(args), **kwargs)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose call is charged, and whose text is traced; jinja2's marks of what it is to be passed stay."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0
    times = 32 if name in COMPARING else 1

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        left = allowance()
        if name in FLAT_FILTERS:
            left.glance(*args[skip:], *kwargs.values())
        else:
            left.look(*args[skip:], *kwargs.values(), times=times)
        check_filter(name, function, args, kwargs)
        if name in CHOOSING or name in FLAT_FILTERS or name == "join":
            return left.make(function(*args, **kwargs))
        check_length(weigh(args[skip:skip + 1]), MAX_OUTPUT)  # it may write what it is given
        return left.make(followed(function, args, kwargs, exact=name in EXACT))

    return call


def _charged_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        charge = allowance().glance if name in FLAT_TESTS else allowance().look
        charge(*args[skip:], *kwargs.values())
        return function(*args, **kwargs)

    return call


def _written(value: Any) -> str:
    """As `as_text`, charged."""
    if isinstance(value, str):
        return value
    check_length(weigh(value), MAX_OUTPUT)
    text: str = allowance().make(as_text(value))
    return text


def _concat(parts: Iterable[str]) -> str:
    parts = list(parts)
    check_length(sum(map(len, parts)), MAX_OUTPUT)
    text: str = allowance().make(concat(parts))
    return text


def _interleave(between: str, items: Iterable[str]) -> Traced:
    parts = list(items)
    check_length(sum(len(part) + len(between) for part in parts if isinstance(part, str)), MAX_OUTPUT)
    return interleave(between, parts)


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


@contextmanager
def _counted() -> Iterator[None]:
    """An allowance, of which each line that compiled templates run takes a step. Counting, unlike a deadline, gives the
    same answer on every machine."""
    with granted() as left:

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            left.step()
            return line

        def call(frame: FrameType, event: str, arg: Any) -> Any:
            return line if frame.f_code.co_filename == "<template>" else None

        before = sys.gettrace()
        sys.settrace(call)
        try:
            yield
        finally:
            sys.settrace(before)

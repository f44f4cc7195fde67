"""The environment in which chat templates are compiled and run: jinja2's immutable sandbox, with what transformers
gives a template (raise_exception, strftime_now, tojson, loop controls, the {% generation %} mark), but no files,
imports or attributes of Python objects.

All operators, calls, filters, tests, comparisons, slices and lists of a template are charged here: see allowance.py.
All ways in which a template makes a text out of others are followed here: output, `~`, operators, filters, methods of
literals, macros and blocks: see traced.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from types import BuiltinMethodType, FunctionType
from typing import Any

from qmix.errors import one_line
from qmix.tokenizer.allowance import FLAT_METHODS, allowance, check_length, check_method, check_operation
from qmix.tokenizer.charged import charged_filter, charged_test, interleaved, joined, written
from qmix.tokenizer.traced import Traced, as_text, followed, plain

MAX_WORDS = 2000  # characters of what a template says when it refuses a conversation
# Methods of a literal that put their arguments into the result.
MAKING = frozenset({"center", "format", "format_map", "join", "ljust", "replace", "rjust", "translate"})


class Refused(Exception):
    """The template called raise_exception."""


def template_environment(now: Callable[[], datetime]) -> Any:
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
        concat = staticmethod(joined)

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
            return joined(map(written, values))

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
                    return __self.make(interleaved(__obj.__self__, args[0]))
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
        raise Refused(one_line(f"{written(message):.{MAX_WORDS}}"))

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
        return interleaved(as_text(d), map(written, items))

    def strftime_now(form: str) -> str:
        check_length(len(form), MAX_WORDS)
        text = now().strftime(plain(form))
        return Traced(text) if isinstance(form, Traced) else text

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation],
                              finalize=written)
    environment.filters["tojson"] = tojson
    environment.filters["join"] = utils.pass_environment(join)
    for name, function in environment.filters.items():
        environment.filters[name] = charged_filter(name, function)
    tests: dict[str, Any] = environment.tests
    for name, test in tests.items():
        tests[name] = charged_test(name, test)
    environment.globals.pop("lipsum")
    environment.globals["namespace"] = Namespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*environment.look(args), **kwargs)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


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

"""Triton's interpreter, without the work that it repeats: what it computes and what it checks stay as they are.

It runs a kernel's every operation in Python and numpy, so the tests of Triton's kernels are the longest of the suite.
Of a launch's time a tenth was numpy's; the rest made types and shapes anew for each value, looked them up, and computed
overflows that nobody asks for. test_fast_interpreter.py holds it to the interpreter as Triton has it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

HAVE_TRITON = importlib.util.find_spec("triton") is not None
KNOWN = 10_000  # types that are kept; pointers are new with each launch, and so are blocks of them


def quicken() -> None:
    """Change the interpreter of this process, which compiles nothing then."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    used = {interpreter: ("_patch_lang", "_get_np_dtype", "_LangPatchScope"),
            core: ("_unwrap_if_constexpr", "block_type", "tensor", "tuple", "constexpr", "dtype", "pointer_type"),
            TritonSemantic: ("binary_op_sanitize_overflow_impl", "broadcast_impl_value", "cast",
                             "computation_type_impl")}
    if not all(hasattr(owner, name) for owner, names in used.items() for name in names):
        return  # another Triton: its tests take longer
    _launches(interpreter)
    _types(core)
    _operations(core, TritonSemantic)


def _launches(interpreter: Any) -> None:
    """A launch replaces the functions of triton.language and puts them back at its end. Each call of a function of
    another kernel's, and of Triton's own such as tl.zeros, replaces them again, which takes most of a millisecond; they
    are put back by the launch or not at all. And each operation builds a table of all dtypes to look one up."""
    import triton.language as tl

    patch_language, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
    known = functools.cache(dtype_of)  # blocks and pointers are not hashable

    @functools.cache
    def languages(function: Any) -> list[Any]:
        return [each for each in (tl, tl.core) if any(value is each for value in function.__globals__.values())]

    def patch_once(function: Any) -> Any:
        missing = any(tl.core.is_builtin(language.load) for language in languages(function))
        return patch_language(function) if missing else interpreter._LangPatchScope()

    def look_up(kind: Any) -> Any:
        return dtype_of(kind) if isinstance(kind.scalar, tl.pointer_type) else known(kind.scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, look_up


def _types(core: Any) -> None:
    """Types of blocks and shapes of tensors never change, so one object serves all that are alike: a type is found by
    its elements' type and its shape, and brings the shape that its tensors have. What is no constant is seen at once to
    be none."""
    make_block, unwrap = core.block_type.__init__, core._unwrap_if_constexpr
    plain = {int, float, bool, str, type(None), core.dtype, core.block_type, core.pointer_type, core.tensor}
    blocks: dict[tuple[int, tuple[int, ...]], Any] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def unwrapped(value: Any) -> Any:
        return value if type(value) in plain else unwrap(value)

    def numbers(shape: Any) -> tuple[int, ...]:
        values = shape.values if type(shape) is core.tuple else unwrapped(shape)
        return tuple(value.value if type(value) is core.constexpr else value for value in values)

    def block(cls: Any, element_ty: Any, shape: Any) -> Any:
        key = id(element_ty), numbers(shape)  # the type keeps its elements' type, so the number stays its own
        found = blocks.get(key) if all(type(length) is int for length in key[1]) else None
        if found is None:
            found = object.__new__(cls)
            make_block(found, element_ty, shape)  # raises where it is no shape of a block
            found.shape, found.of_tensors = shapes.setdefault(key[1], (found.shape, constants(key[1])))
            if len(blocks) > KNOWN:
                blocks.clear()
            blocks[key] = found
        return found

    def constants(shape: tuple[int, ...]) -> tuple[Any, Any]:
        numel = 1
        for length in shape:
            numel *= length
        return core.tuple([core.constexpr(length) for length in shape]), core.constexpr(numel)

    of_scalars = constants(())

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else of_scalars

    core.block_type.__new__, core.block_type.__init__ = staticmethod(block), lambda self, *how: None
    core.tensor.__init__, core._unwrap_if_constexpr = tensor, unwrapped


def _operations(core: Any, semantic: Any) -> None:
    """Operands of one shape and one type need no broadcast and no cast, and which type two of them give is looked up.
    For each sum and product of integers Triton computes whether it overflows, five operations more, and then drops the
    answer unless it debugs."""
    overflow, broadcast, cast, promoted = (semantic.binary_op_sanitize_overflow_impl, semantic.broadcast_impl_value,
                                           semantic.cast, semantic.computation_type_impl)
    known: dict[tuple[object, ...], Any] = {}

    def check_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if self.builder.options.debug:
            overflow(self, lhs, rhs, binary_op)

    def alike(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        same = left.is_block() and right.is_block() and left.shape is right.shape
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    def converted(self: Any, value: Any, kind: Any, *how: Any, **more: Any) -> Any:
        return value if value.type.scalar is kind.scalar else cast(self, value, kind, *how, **more)

    def common(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in known:
            known[key] = promoted(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return known[key]

    semantic.binary_op_sanitize_overflow_impl, semantic.broadcast_impl_value = check_overflow, alike
    semantic.cast, semantic.computation_type_impl = converted, common

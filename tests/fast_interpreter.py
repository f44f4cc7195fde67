"""Triton's interpreter, without the work that it repeats: what it computes and what it checks stay as they are.

It runs a kernel's every operation in Python and numpy, so the tests of Triton's kernels are the longest of the suite.
Half of a small launch's time was none of the kernel's.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

HAVE_TRITON = importlib.util.find_spec("triton") is not None


def quicken() -> None:
    """Change the interpreter of this process.

    A launch replaces the functions of triton.language and puts them back at its end. Each call of a function of
    another kernel's, and of Triton's own such as tl.zeros, replaces them again, which takes most of a millisecond; they
    are put back by the launch or not at all. And each operation builds a table of all dtypes to look one up.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_get_np_dtype", "_LangPatchScope")):
        return  # another Triton: its tests take longer

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

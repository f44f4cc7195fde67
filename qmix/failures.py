"""The last line of defence: an exception that no file of qmix raised on purpose.

Users' input meets a QmixError or an OSError where it is read. All other exceptions are faults of qmix itself, or limits
of the machine that show up anywhere. Each is one line and exit code 1. The traceback of a fault goes into a file, for
the report.
"""

from __future__ import annotations

import errno
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from qmix import __version__, render
from qmix.errors import DoesNotFit
from qmix.process import address_space_limit
from qmix.sizes import format_bytes

LEAST = 1 << 30  # bytes of address space that Python, torch and its first threads map, without any model
LIMITS = "close other programs, choose a smaller --ram or -c/--ctx-size, or raise the limits (ulimit -v, ulimit -u)"
# How libraries say that an allocation, a mapping or a thread was refused, where they raise no MemoryError.
REFUSED = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "can't start new thread",
           "failed to map segment", "bad_alloc", "thread constructor failed")


def check_address_space(args: Sequence[str]) -> None:
    """DoesNotFit where `ulimit -v` is so low that importing torch would abort the process, or hang it. args: the
    command line; what needs no torch is let through."""
    limit = address_space_limit()
    if limit is None or limit >= LEAST or not args or args[0] in ("list", "--version") or {"-h", "--help"} & set(args):
        return
    raise DoesNotFit(f"ulimit -v {limit // 1024}: {format_bytes(limit)} of address space, and torch alone maps about "
                     f"{format_bytes(LEAST)}", "raise it (ulimit -v unlimited); --ram limits the memory that is used")


def out_of_memory(error: BaseException) -> bool:
    """Whether the system refused memory or a thread, whichever library tells it."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ImportError | SystemError) and any(
        words in str(error) for words in REFUSED)


def report(error: Exception) -> None:
    """Say what failed in one line."""
    what = (str(error).strip().splitlines() or [""])[0]
    if out_of_memory(error):
        render.say(f"error: out of memory: {what or type(error).__name__}\n  {LIMITS}")
        return
    named = f"{type(error).__name__}: {what}" if what else type(error).__name__
    text = _document(error)
    try:
        fd, name = tempfile.mkstemp(prefix="qmix-error-", suffix=".txt")
        with open(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:  # no file can be written: better a traceback here than none
        render.say(f"{text}error: a fault in qmix: {named:.300}; please report it, with the traceback above, to "
                   "qmix's issue tracker")
        return
    render.say(f"error: a fault in qmix: {named:.300}; please report it to qmix's issue tracker, with the traceback in "
               f"{name}")


def _document(error: Exception) -> str:
    """The traceback, and what a reader of it will ask for."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    torch = getattr(sys.modules.get("torch"), "__version__", "not imported")
    return (f"{command}\nqmix {__version__}, Python {platform.python_version()}, torch {torch}, {platform.platform()}\n"
            f"{''.join(traceback.format_exception(error))}")

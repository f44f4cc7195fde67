'''The input line: prompt_toolkit on a capable terminal, plain line reading on a dumb one.

In both, `read()` returns a text or raises EOFError (Ctrl-D or `leave()`), KeyboardInterrupt (Ctrl-C with
nothing typed) or OSError (the terminal is gone). A text that begins with """ continues over many lines
until a line ends with """; so does the text of /system. The result still has the quotes: commands.parse
interprets them.
'''

from __future__ import annotations

import os
import re
import select
import termios
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from qmix.chat import keyboard
from qmix.chat.lines import Lines

PROMPT, CONTINUATION = ">>> ", "... "
QUOTES = '"""'
OPENING = re.compile(r'\s*(/system\s+)?"""')


class Prompt(Protocol):
    """An input line. `interrupt` and `leave` are called from signal handlers."""

    problem: str | None

    def read(self) -> str: ...

    def interrupt(self) -> None: ...

    def leave(self) -> None: ...


def open_prompt(stdin: TextIO, stdout: TextIO, history: Path | None, commands: Iterable[str],
                environ: Mapping[str, str] = os.environ) -> Prompt:
    """The prompt for this terminal. history: the file of earlier inputs, created with mode 0600; None for none."""
    if environ.get("TERM", "dumb").lower() in ("dumb", "unknown"):
        return LinePrompt(stdin, stdout)
    return EditingPrompt(stdin, stdout, history, commands, environ.get("TERM"))


def is_open(text: str) -> bool:
    """Whether `text` began a many-line text with triple quotes and did not end it yet."""
    opening = OPENING.match(text)
    return opening is not None and not text[opening.end():].rstrip().endswith(QUOTES)


def repaired(text: str) -> str:
    """Bytes of the terminal that were no UTF-8 become U+FFFD, so that the text can be written anywhere."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class EditingPrompt:
    """prompt_toolkit: editing, history, completion of commands, many lines."""

    def __init__(self, stdin: TextIO, stdout: TextIO, history: Path | None, commands: Iterable[str],
                 term: str | None):
        self.problem: str | None = None
        self._leaving = False
        self._session: PromptSession[str] = PromptSession(
            PROMPT, input=_Terminal(stdin),
            output=_output(stdout, term),
            history=open_history(history, self._tell), key_bindings=_key_bindings(), multiline=True,
            prompt_continuation=lambda width, number, wrapped: "" if wrapped else CONTINUATION,
            completer=_Commands(commands), complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE, enable_suspend=True)

    def read(self) -> str:
        return repaired(self._session.prompt(pre_run=self._leave_if_asked))

    def interrupt(self) -> None:
        """Nothing: while the prompt runs, prompt_toolkit turns SIGINT into the key Ctrl-C."""

    def leave(self) -> None:
        self._leaving = True
        app = self._session.app
        if app.is_running and app.loop is not None:
            app.loop.call_soon_threadsafe(self._leave_if_asked)

    def _leave_if_asked(self) -> None:
        app = self._session.app
        if self._leaving and app.is_running and not app.is_done:
            app.exit(exception=EOFError)

    def _tell(self, problem: str) -> None:
        self.problem = problem


def open_history(path: Path | None, tell: Callable[[str], None]) -> History:
    """Earlier inputs from `path`, made with mode 0600; what fails is told once, and then they are kept
    in memory."""
    if path is None:
        tell("no history of inputs, and conversations are not saved: there is no home folder (set HOME or "
             "XDG_STATE_HOME)")
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)  # one that an umask or a copy left readable
    except OSError as e:
        tell(f"no history of inputs: {path}: {e.strerror}")
        return InMemoryHistory()
    return _History(path, tell)


def _output(stdout: TextIO, term: str | None) -> Vt100_Output:
    output = Vt100_Output.from_pty(stdout, term=term, default_color_depth=ColorDepth.from_env())
    # No cursor position requests: an answer that comes late would be read as typing.
    output.enable_cpr = False
    return output


class _Terminal(Vt100Input):
    """prompt_toolkit reads a terminal whose other end is closed forever (EIO, and no end of file)."""

    def read_keys(self) -> list[Any]:
        keys = super().read_keys()
        if not keys:
            poll = select.poll()
            poll.register(self.fileno(), select.POLLIN)
            if any(event & select.POLLHUP for _, event in poll.poll(0)):
                self.stdin_reader.closed = True
        return keys


class _History(FileHistory):
    """A history whose file fails goes on in memory."""

    def __init__(self, path: Path, tell: Callable[[str], None]):
        super().__init__(path)
        self._tell = tell
        self._failed = False

    def store_string(self, string: str) -> None:
        if self._failed:
            return
        try:
            super().store_string(string)
        except OSError as e:
            self._failed = True
            self._tell(f"inputs are not added to the history: {e.filename}: {e.strerror}")


class _Commands(Completer):
    """Tab completes the first word of a line that begins with a slash."""

    def __init__(self, names: Iterable[str]):
        self._names = sorted(f"/{name}" for name in names)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/") and " " not in typed:
            for name in self._names:
                if name.startswith(typed):
                    yield Completion(name, -len(typed))


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not searching the history

    @keys.add("enter", filter=typing)
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)  # a message, not indented code
        else:
            buffer.validate_and_handle()

    @keys.add("c-c", filter=typing)
    @keys.add(Keys.SIGINT)
    def _clear_or_interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        elif not get_app().is_done:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


class LinePrompt:
    """Reads lines from a terminal that cannot move its cursor; erasing is all the editing, and there is no history."""

    def __init__(self, stdin: TextIO, stdout: TextIO):
        self.problem: str | None = "dumb terminal: no line editing, no history of inputs"
        self._in = stdin
        self._out = stdout
        self._reading = False
        self._leaving = False
        self._lines = Lines(stdin.fileno(), self._show)

    def read(self) -> str:
        text = self._line(PROMPT)
        while is_open(text):
            text += "\n" + self._line(CONTINUATION)
        return repaired(text)

    def interrupt(self) -> None:
        if self._reading:
            raise KeyboardInterrupt

    def leave(self) -> None:
        self._leaving = True
        if self._reading:
            raise EOFError

    def _line(self, prompt: str) -> str:
        try:
            # From here on a signal raises: one that came while the prompt is shown must not be followed
            # by a wait for a line that nobody types.
            self._reading = True
            if self._leaving:
                raise EOFError
            self._show(prompt)
            with keyboard.quiet(self._in.fileno()):
                line = self._lines.read()
        except termios.error as e:
            raise OSError(*e.args) from None
        finally:
            self._reading = False
        if line is None:
            raise EOFError
        return line

    def _show(self, text: str) -> None:
        encoding = self._out.encoding or "utf-8"
        self._out.write(text.encode(encoding, "replace").decode(encoding))
        self._out.flush()

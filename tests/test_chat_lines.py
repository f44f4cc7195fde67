"""Lines typed on a dumb terminal: of any length, erased key by key, and what is typed ahead waits."""

from __future__ import annotations

import os
import pty
import threading
from collections.abc import Callable, Iterator

import pytest

from qmix.chat import keyboard
from qmix.chat.lines import Lines
from qmix.chat.prompt import LinePrompt

Typed = Callable[[bytes], "tuple[Lines, list[str]]"]


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """(the user's end, the program's end) of a terminal that neither echoes nor gathers lines."""
    user, program = pty.openpty()
    with keyboard.quiet(program):
        yield user, program
    for fd in (user, program):
        os.close(fd)


@pytest.fixture
def typed(terminal: tuple[int, int]) -> Typed:
    """typed(keys) -> the lines that come of them, and what is echoed."""
    def begin(keys: bytes) -> tuple[Lines, list[str]]:
        user, program = terminal
        threading.Thread(target=os.write, args=(user, keys), daemon=True).start()
        shown: list[str] = []
        return Lines(program, shown.append), shown

    return begin


@pytest.mark.parametrize("length", [10, 4094, 4095, 4096, 100_000])
def test_a_line_of_any_length_comes_whole(typed: Typed, length: int) -> None:
    line = ("é" * length)[:length - 4] + " END"
    lines, shown = typed(f"{line}\nnext\n".encode())
    assert lines.read() == line
    assert lines.read() == "next"
    assert "".join(shown) == f"{line}\nnext\n"


@pytest.mark.parametrize(("keys", "line"), [
    (b"abc\x7f\x7fd\n", "ad"),  # erase
    (b"abc\x08\n", "ab"),
    (b"\x7f\x7fa\n", "a"),  # nothing to erase
    ("aé☃\x7f\x7fb\n".encode(), "ab"),  # whole characters, not bytes
    (b"one two\x15three\n", "three"),  # erase line
    (b"one two  \x17three\n", "one three"),  # erase word
    (b"one\x17two\n", "two"),
    (b"ab\x04c\n", "abc"),  # end of input in the middle of a line is none
    (b"a\rb\n", "a"),
    (b"a\xffb\n", "a\udcffb"),  # no UTF-8: kept apart, as the prompt expects it
])
def test_keys_that_edit(typed: Typed, keys: bytes, line: str) -> None:
    assert typed(keys)[0].read() == line


def test_what_is_erased_leaves_the_screen(typed: Typed) -> None:
    lines, shown = typed("世a\x01\x7f\x7f\x7f\n".encode())
    assert lines.read() == ""
    assert "".join(shown) == "世a^A" + "\b \b" * 5 + "\n"  # wide, narrow, and ^A


def test_end_of_input(typed: Typed) -> None:
    lines, _ = typed(b"\x04a\n")
    assert lines.read() is None
    assert lines.read() == "a"


def test_lines_ends_in_two_characters_are_one(terminal: tuple[int, int]) -> None:
    """As they come from a terminal that does not turn returns into newlines."""
    import termios

    user, program = terminal
    modes = termios.tcgetattr(program)
    modes[0] &= ~termios.ICRNL
    termios.tcsetattr(program, termios.TCSANOW, modes)
    os.write(user, b"a\r\nb\r\rc\n")
    lines = Lines(program, lambda text: None)
    assert [lines.read() for _ in range(4)] == ["a", "b", "", "c"]


def test_an_interrupt_drops_the_line(terminal: tuple[int, int]) -> None:
    user, program = terminal
    shown: list[str] = []

    def echo(text: str) -> None:
        shown.append(text)
        if text == "!":
            raise KeyboardInterrupt  # as the prompt's signal handler does

    lines = Lines(program, echo)
    os.write(user, b"half!rest\n")
    with pytest.raises(KeyboardInterrupt):
        lines.read()
    os.write(user, b"whole\n")
    assert lines.read() == "whole"


def test_the_prompt_reads_a_long_line(terminal: tuple[int, int]) -> None:
    """Through LinePrompt: the prompt is shown, and the text comes whole."""
    user, program = terminal
    line = "begin " + "x" * 9000 + " END"
    came = bytearray()

    def user_side() -> None:
        os.write(user, line.encode() + b"\n")
        while b"END\r\n" not in came:
            came.extend(os.read(user, 65536))

    other = threading.Thread(target=user_side, daemon=True)
    other.start()
    with open(program, closefd=False) as stdin, open(program, "w", closefd=False) as stdout:
        assert LinePrompt(stdin, stdout).read() == line
    other.join(60)
    assert came.startswith(b">>> begin ")

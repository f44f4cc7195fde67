"""A conversation as a program gives it, checked."""

from __future__ import annotations

from collections.abc import Sequence

from qmix.errors import UsageError
from qmix.tokenizer import Message


def conversation(prompt: Sequence[Message]) -> list[Message]:
    """A conversation given to Engine.generate; UsageError for anything else."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise UsageError(f"prompt: got {type(prompt).__name__}, want a text or a list of Message records")
    for n, message in enumerate(prompt):
        if not isinstance(message, Message):
            raise UsageError(f"prompt[{n}]: got {type(message).__name__}, want a Message record",
                             'as qmix.tokenizer.Message("user", "Hi"); a text to continue is one plain string')
    return list(prompt)

"""The errors qmix raises on purpose, each with its exit code and its cure.

One place (qmix/cli.py) catches QmixError, prints `message` and `cure` on stderr and leaves with `exit_code`; nothing
else in qmix turns an error into an exit. The codes are part of the command line:

    0 done   1 runtime error   2 usage   3 does not fit   4 model files missing or corrupt   130 interrupted
"""

from __future__ import annotations

LONGEST = 4000  # characters of a message about a file: a path, a key, and what is wrong there


def one_line(message: str) -> str:
    """A message that quotes what a stranger's file says: names in it may hold line ends, and be long."""
    if len(message) > LONGEST:
        message = f"{message[:LONGEST]} ..."
    return "\u240a".join(message.splitlines())


class QmixError(Exception):
    """Something went wrong that the user can understand: what, where, and the cure.

    message: one line that names the file, key and value at fault.
    cure: one line that says what to do about it, or None where the message already does.
    """

    exit_code = 1

    def __init__(self, message: str, cure: str | None = None):
        super().__init__(message)
        self.message = message
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.message}\n  {self.cure}" if self.cure else self.message


class UsageError(QmixError):
    """A flag, value or combination that makes no sense."""

    exit_code = 2


class ConfigError(UsageError):
    """A field of a config record is missing or out of range: `num_local_experts: got 0, want >= 1`."""

    def __init__(self, message: str, cure: str | None = None):
        super().__init__(one_line(message), cure)


class PromptTooLong(UsageError):
    """A prompt has more tokens than the context holds."""


class DoesNotFit(QmixError):
    """Memory or disk is too small for what was asked; the message carries the numbers."""

    exit_code = 3


class ModelFileError(QmixError):
    """A file of a checkpoint or store is missing, truncated or corrupt; the message names it."""

    exit_code = 4

    def __init__(self, message: str, cure: str | None = None):
        super().__init__(one_line(message), cure)


class CheckpointError(ModelFileError):
    """The unquantized source checkpoint is at fault."""


class StoreError(ModelFileError):
    """The quantized store is at fault."""


class Interrupted(QmixError):
    """The user pressed Ctrl-C (or the caller cancelled) outside the chat's own handling."""

    exit_code = 130

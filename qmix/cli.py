"""The command line: parse, call, turn a QmixError into its exit code.

The commands are in commands/, which has the flags that they share in options.py. Heavy imports stand inside the
commands, so that `qmix --help` answers without torch.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, get_type_hints

import typer

from qmix import __version__, failures, render, settings, streams
from qmix.commands.bench import bench
from qmix.commands.chat import ChatCommand, chat
from qmix.commands.demo import demo
from qmix.commands.doctor.command import doctor
from qmix.commands.eval import evaluate
from qmix.commands.generate import generate
from qmix.commands.list import list_models
from qmix.commands.plan.command import plan
from qmix.commands.quantize.command import quantize
from qmix.commands.replay import replay
from qmix.commands.rm import remove
from qmix.commands.run.command import run
from qmix.commands.serve import serve
from qmix.commands.show import show
from qmix.commands.stats import stats
from qmix.commands.verify import verify
from qmix.errors import QmixError

HELP = """Run Mixture-of-Experts models on one machine: 4-bit experts, one command to quantize, one to chat.

Exit codes: 0 done, 1 runtime error, 2 usage, 3 does not fit, 4 model files missing or corrupt, 130 interrupted.
Every flag can stand in the environment as QMIX_COMMAND_FLAG (QMIX_CHAT_TEMP=0.3), or in qmix.toml. One that may be
repeated takes a JSON list there: QMIX_CHAT_STOP='["### a", "b"]'."""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=True, rich_markup_mode=None,
                  context_settings={"help_option_names": ["-h", "--help"]})

@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"qmix {__version__}")
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run, "quantize": quantize, "chat": chat, "generate": generate, "serve": serve, "plan": plan,
    "doctor": doctor, "bench": bench, "eval": evaluate, "stats": stats, "replay": replay, "show": show,
    "list": list_models, "rm": remove, "verify": verify, "demo": demo}
for _name, _command in COMMANDS.items():
    app.command(_name, cls=ChatCommand if _name == "chat" else None)(_command)


def main(argv: list[str] | None = None) -> None:
    """The console script: run a command and leave with its exit code."""
    replaced = streams.prepare()
    code = _exit_code(argv)
    code = _flush_stdout(code)
    if line := replaced.line():
        render.say(line)
    if code:
        sys.exit(code)


def _exit_code(argv: list[str] | None) -> int:
    """Run a command. What it raises is said here, and nowhere else."""
    try:
        failures.check_address_space(sys.argv[1:] if argv is None else argv)
        command, kinds = parser()
        command.main(argv, prog_name="qmix", default_map=_defaults(kinds), auto_envvar_prefix=settings.ENV_PREFIX)
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # typer's way out when a reader left early
            return 0
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except QmixError as error:
        render.fail(error)
        return error.exit_code
    except KeyboardInterrupt:
        render.say("interrupted")
        return 130
    except OSError as error:
        if failures.out_of_memory(error):
            failures.report(error)
        else:  # Files of ours raise QmixErrors; what is left is the terminal, the disk or a pipe.
            render.say(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
        return 1
    except Exception as error:
        failures.report(error)
        return 1
    return 0


Kinds = dict[str, dict[str, Any]]  # {command: {flag: type}}


@cache
def parser() -> tuple[Any, Kinds]:
    """typer makes the parsers of all commands, which takes 20 ms: once, for programs that run several commands."""
    kinds = {name: get_type_hints(command) for name, command in COMMANDS.items()}
    command = typer.main.get_command(app)
    for name, one in command.commands.items():  # type: ignore[attr-defined]
        for parameter in one.params:
            parameter.show_envvar = False  # the rule stands once, in the help of qmix itself
            if parameter.name in kinds[name] and settings.is_list(kinds[name][parameter.name]):
                parameter.allow_from_autoenv = False  # click would split it at spaces
    return command, kinds


def _defaults(kinds: Kinds) -> dict[str, dict[str, Any]]:
    """What the environment's lists and qmix.toml say, for click; no QMIX_ variable and no key is ignored."""
    settings.check_environment(kinds)
    defaults = settings.read_file(settings.config_file(), kinds)
    for name, lists in settings.environment_lists(kinds).items():
        defaults.setdefault(name, {}).update(lists)
    return defaults


def _flush_stdout(code: int) -> int:
    """The exit code: 1 instead of 0 where the end of the output could not be written. A reader that left early
    (`| head`, a closed terminal) is no error; stdout then points elsewhere, so that exit stays quiet."""
    try:
        sys.stdout.flush()
        return code
    except (OSError, ValueError) as error:
        streams.abandon(sys.stdout)
        if code or isinstance(error, BrokenPipeError) or getattr(error, "errno", None) == errno.EIO:
            return code
        render.say(f"error: stdout: {getattr(error, 'strerror', None) or error}")
        return 1

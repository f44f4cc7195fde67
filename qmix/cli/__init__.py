"""The command line: parse, call, map a QmixError to its exit code.

One file per kind of command; options.py has the flags they share. Heavy imports stand inside the
commands, so that `qmix --help` answers without torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, get_type_hints

import typer

from qmix import __version__, render, settings
from qmix.cli.bench import bench
from qmix.cli.evaluate import evaluate
from qmix.cli.machine import doctor, plan
from qmix.cli.routing import replay, stats
from qmix.cli.stores import list_models, quantize, show, verify
from qmix.cli.talk import chat, demo, generate
from qmix.errors import QmixError

HELP = """Run Mixture-of-Experts models on one machine: 4-bit experts, one command to quantize, one to chat.

Exit codes: 0 done, 1 runtime error, 2 usage, 3 does not fit, 4 model files missing or corrupt, 130 interrupted.
Every flag can stand in the environment as QMIX_COMMAND_FLAG (QMIX_CHAT_TEMP=0.3), or in qmix.toml."""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=True, rich_markup_mode=None,
                  context_settings={"help_option_names": ["-h", "--help"]})

@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(f"qmix {__version__}")
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize, "chat": chat, "generate": generate, "plan": plan, "doctor": doctor, "bench": bench,
    "eval": evaluate, "stats": stats, "replay": replay, "show": show, "list": list_models, "verify": verify,
    "demo": demo}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main(argv: list[str] | None = None) -> None:
    """The console script: run a command and leave with its exit code."""
    command = typer.main.get_command(app)
    try:
        kinds = {}
        for name, one in command.commands.items():  # type: ignore[attr-defined]
            kinds[name] = get_type_hints(COMMANDS[name])
            for parameter in one.params:
                parameter.show_envvar = False  # the rule stands once, in the help of qmix itself
        defaults = settings.read_file(settings.xdg_folder("config") / "qmix.toml", kinds)
        settings.check_environment(kinds)
        command.main(argv, prog_name="qmix", default_map=defaults, auto_envvar_prefix=settings.ENV_PREFIX)
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # typer's way out when a reader left early
            sys.exit(0)
        raise
    except QmixError as error:
        render.fail(error)
        sys.exit(error.exit_code)
    except OSError as error:
        # Files of ours raise QmixErrors; what is left is the terminal, the disk or a pipe.
        render.say(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
        sys.exit(1)
    except MemoryError:
        render.say("error: out of memory\n  close other programs or choose a smaller -c/--ctx-size")
        sys.exit(1)
    finally:
        _flush_stdout()


def _flush_stdout() -> None:
    """A reader that left early (`| head`, a closed terminal) is no error; point stdout elsewhere so that
    exit stays quiet."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

'''The slash commands, as data: name, argument, one line of help, and the function that runs them.

A line that begins with a slash is a command or an error, never a prompt. A text that must begin with
a slash goes between """ and """.
'''

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qmix.chat import parameters, savefile, statline
from qmix.chat.conversation import adopted
from qmix.config import EFFORTS
from qmix.errors import QmixError, UsageError
from qmix.paths import expanded

if TYPE_CHECKING:
    from qmix.chat.repl import Chat

QUOTES = '"""'
SWITCHES = {"think": True, "nothink": False}  # of /set, without a value
EFFORT = "reasoning"  # of /set


class Input(NamedTuple):
    """What was typed: a command with its argument, or (command None) a message."""

    command: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """argument: "" for none, "FILE" for one that is needed, "[TEXT]" for one that may be left out."""

    name: str
    argument: str
    help: str
    run: Callable[[Chat, str], None]


def parse(line: str) -> Input:
    """/set temp 0.3 -> ("set", "temp 0.3"); \"\"\"\\nmany\\nlines\\n\"\"\" -> (None, "many\\nlines")"""
    text = line.strip()
    if not text.startswith("/"):
        return Input(None, unquoted(text))
    name, argument = (*text[1:].split(maxsplit=1), "", "")[:2]
    return Input(name, unquoted(argument))


def unquoted(text: str) -> str:
    """The inside of triple quotes, without the newline after the first and before the last."""
    if not (text.startswith(QUOTES) and text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES)):
        return text
    return text[len(QUOTES):-len(QUOTES)].removeprefix("\n").removesuffix("\n")


def execute(chat: Chat, name: str, argument: str) -> None:
    """Run one command; UsageError where there is none of that name or its argument is wrong."""
    command = next((c for c in COMMANDS if c.name == name), None)
    if command is None:
        raise UsageError(f"/{name[:40]}: no such command",
                         f"/help lists them; write a message that begins with a slash between {QUOTES}")
    if argument and not command.argument:
        raise UsageError(f"/{name}: takes no argument, got {argument!r}")
    if not argument and command.argument and not command.argument.startswith("["):
        raise UsageError(f"/{name}: {command.argument} is missing")
    command.run(chat, argument)


def _help(chat: Chat, argument: str) -> None:
    usage = {c.name: f"/{c.name} {c.argument}".rstrip() for c in COMMANDS}
    width = max(map(len, usage.values()))
    for c in COMMANDS:
        chat.screen.say(f"{usage[c.name]:<{width}}  {c.help}")
    chat.screen.say(f"{QUOTES:<{width}}  begin and end a text of many lines")
    chat.screen.say(f"{'Ctrl-C':<{width}}  stop the answer and keep it, or clear the line; Ctrl-D leaves")


def _exit(chat: Chat, argument: str) -> None:
    chat.leaving = True


def _clear(chat: Chat, argument: str) -> None:
    count, name = len(chat.conversation), chat.autosave.name
    chat.start_over(replace(chat.conversation, exchanges=()))
    chat.screen.say(f"cleared {exchanges(count)}; system prompt and parameters stay")
    if count and name and not chat.autosave_failed:
        chat.screen.dim(f"it stays saved as conversation {name} (qmix chat --continue={name})")


def _regen(chat: Chat, argument: str) -> None:
    if not chat.conversation.exchanges:
        raise UsageError("/regen: there is no question to answer again")
    if chat.params.temperature == 0:
        chat.screen.say("temp 0: the answer will be the same")
    elif chat.params.seed is None:
        before = chat.seed
        chat.draw_seed()
        chat.screen.say(f"new seed {chat.seed} (was {before})")
    else:
        chat.screen.say(f"seed {chat.params.seed} was given, so the answer will be the same; "
                        "/set seed random varies it")
    chat.answer(chat.conversation.exchanges[-1].question, chat.conversation.undone())


def _undo(chat: Chat, argument: str) -> None:
    if not chat.conversation.exchanges:
        raise UsageError("/undo: there is nothing to undo")
    question = chat.conversation.exchanges[-1].question
    chat.conversation = chat.conversation.undone()
    chat.autosave_now()
    chat.screen.say(f"undone: {shortened(question)} ({exchanges(len(chat.conversation))} left)")


def _system(chat: Chat, text: str) -> None:
    if not text:
        chat.screen.say(f"system prompt: {chat.conversation.system or '(none)'}")
        return
    chat.set_system(None if text == "none" else text)
    chat.screen.say("system prompt removed" if text == "none" else "system prompt set")
    if chat.conversation.exchanges:
        chat.screen.dim("the whole conversation is read again with the next message")


def _set(chat: Chat, text: str) -> None:
    name, _, value = text.partition(" ")
    if name in SWITCHES:
        if value.strip():
            raise UsageError(f"/set {name}: takes no value, got {value.strip()!r}", "/set think, or /set nothink")
        chat.set_thinking(SWITCHES[name])
        chat.screen.say(f"thinking {chat.thinking_text()}")
        return
    if name == EFFORT:
        if value.strip():
            chat.set_effort(value.strip())
        chat.engine.tokenizer.check_effort()
        chat.screen.say(f"reasoning {chat.effort_text()}")
        return
    if value.strip():
        chat.set_params(parameters.changed(chat.params, name, value.strip()))
    elif name:
        parameters.known(name)
    for each in [name] if name else parameters.FIELDS:
        drawn = f" (now {chat.seed})" if each == "seed" and chat.params.seed is None else ""
        chat.screen.say(parameters.shown(chat.params, each) + drawn)
    if not name and chat.engine.tokenizer.thinking_switch:
        chat.screen.say(f"thinking {chat.thinking_text()} (/set think, /set nothink)")
    if not name and chat.engine.tokenizer.takes_effort:
        chat.screen.say(f"reasoning {chat.effort_text()} (/set reasoning {'|'.join(EFFORTS)})")


def _show(chat: Chat, argument: str) -> None:
    used = chat.conversation.tokens(chat.engine.tokenizer)
    rows = {
        "model": chat.conversation.model,
        "template": chat.engine.tokenizer.template_name,
        "system": chat.conversation.system or "(none)",
        "parameters": parameters.listed(chat.params),
        **({"thinking": chat.thinking_text()} if chat.engine.tokenizer.thinking_switch else {}),
        **({"reasoning": chat.effort_text()} if chat.engine.tokenizer.takes_effort else {}),
        "seed": chat.seed_text(),
        "context": f"{used} of {chat.session.context} tokens used, {exchanges(len(chat.conversation))}",
        "saved in": f"{chat.autosave.path or 'nothing yet'}{' (failing)' if chat.autosave_failed else ''}",
    }
    for name, value in rows.items():
        chat.screen.say(f"{name:<11} {value}")


def _save(chat: Chat, text: str) -> None:
    path = _path(text)
    if savefile.exists(path):
        raise UsageError(f"{path}: exists", f"/save! {text} replaces it")
    _replace(chat, text)


def _replace(chat: Chat, text: str) -> None:
    path = _path(text)
    savefile.save(path, chat.conversation, chat.params)
    chat.screen.say(f"saved {exchanges(len(chat.conversation))} in {path}")


def _load(chat: Chat, text: str) -> None:
    path = _path(text)
    try:
        found, params = savefile.load(path)
        own, lost = adopted(found, chat.conversation.model, chat.engine.tokenizer)
        chat.check_system(own.system)
    except QmixError as e:
        raise UsageError(e.message, "the conversation here is unchanged") from None
    chat.start_over(own)
    chat.set_params(params)
    chat.autosave_now()
    chat.screen.say(f"loaded {exchanges(len(own))} from {path}")
    chat.tell_loaded(found, lost)
    chat.screen.dim(parameters.listed(params))


def _stats(chat: Chat, argument: str) -> None:
    if chat.figures is None:
        raise UsageError("/stats: there is no answer yet")
    chat.screen.dim(statline.block(chat.figures, chat.tiers(), chat.paging()))


def _path(text: str) -> Path:
    """A file name as typed: spaces need no quotes, but quotes around the whole are taken off."""
    if len(text) > 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return expanded(text)


def exchanges(count: int) -> str:
    return f"{count} exchange{'' if count == 1 else 's'}"


def shortened(text: str, width: int = 60) -> str:
    """The first line of a text, in quotes, at most `width` characters."""
    first, *more = text.split("\n", 1)
    return f"\u201c{first[:width]}{'…' if more or len(first) > width else ''}\u201d"


COMMANDS = (
    Command("help", "", "this list", _help),
    Command("exit", "", "leave", _exit),
    Command("clear", "", "forget the conversation, keep system prompt and parameters", _clear),
    Command("regen", "", "answer the last question again", _regen),
    Command("undo", "", "take back the last question and its answer", _undo),
    Command("system", "[TEXT]", "show or set the system prompt; none removes it", _system),
    Command("set", "[NAME VALUE]", "show or set a parameter; alone lists all; think, nothink: whether the model "
            "thinks; reasoning: how much",
            _set),
    Command("show", "", "model, template, system prompt, parameters, context used", _show),
    Command("save", "FILE", "write the conversation to a new file", _save),
    Command("save!", "FILE", "the same, replacing FILE if it exists", _replace),
    Command("load", "FILE", "go on with a saved conversation and its parameters", _load),
    Command("stats", "", "all figures of the last answer", _stats),
)

"""The chat's loop, and its state: read a line, run it, show the result.

Everything that changes while chatting is an attribute of Chat. A turn replaces the conversation in one assignment after
the answer ended, so an error, Ctrl-C or a signal at any moment leaves the conversation whole. After each change it is
saved for --continue.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from qmix.chat import commands, keyboard, parameters, statline
from qmix.chat.answer import Answer, respond
from qmix.chat.conversation import Conversation, Exchange, adopted, refuses_calls
from qmix.chat.prompt import Prompt, open_prompt
from qmix.chat.savefile import Autosave
from qmix.chat.screen import Screen
from qmix.chat.signals import Signals
from qmix.config import Cancel, SamplingParams
from qmix.errors import QmixError, UsageError
from qmix.generate import common_prefix
from qmix.offload.figures import sentences
from qmix.tokenizer import Part, Request

LONG_PREFILL = 128  # tokens; from here on the wait is announced
SEEDS = 2**31  # a random seed stays short enough to be typed again


def run(engine: Any, *, model_name: str, params: SamplingParams, system: str | None = None,
        resume: str | None = None, stats: bool = False, draft: int = 0, thinking: bool | None = None,
        effort: str | None = None, state_dir: Path | None, stdin: TextIO | None = None,
        stdout: TextIO | None = None, stderr: TextIO | None = None,
        environ: Mapping[str, str] = os.environ) -> int:
    """Chat until the user leaves; the exit code: 0, or 128 + the number of the signal that ended it.

    engine: an Engine; its session is used by this chat alone. resume: go on with the conversation of that
    name in state_dir, "" for the one last saved for model_name. state_dir None: nothing is saved, which is said.
    stats: all figures after each answer. draft: ids guessed at a time where that pays, 0 for none. thinking: whether
    the model is to think before it answers, effort: how much, None for what it does by itself. The streams are
    sys.stdin, sys.stdout and sys.stderr unless given.
    UsageError without a terminal, where the template refuses the system prompt or has no place for thinking or effort,
    or for a name that there is not.
    """
    stdin, stdout, stderr = stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr
    for name, stream in (("stdin", stdin), ("stdout", stdout)):
        if stream is None or not stream.isatty():
            raise UsageError(f"chat needs a terminal: {name} is none",
                             'for pipes and scripts: qmix generate MODEL -p "..."')
    chat = Chat(engine, model_name, params, Screen(stdout, stderr, environ),
                Autosave(state_dir, model_name), detailed=stats, draft=draft, thinking=thinking,
                effort=effort)
    chat.begin(system, resume)
    names = [c.name for c in commands.COMMANDS]
    history = None if state_dir is None else state_dir / "chat_history"
    prompt = open_prompt(stdin, stdout, history, names, environ)
    with keyboard.quiet(stdin.fileno()), Signals(chat.cancel, prompt) as signals:
        chat.ending = lambda: signals.ending
        _loop(chat, prompt)
    if chat.screen.gone:
        chat.screen.abandon()
    ending = signals.ending or (signal.SIGHUP if chat.screen.gone else None)
    return 0 if ending is None else 128 + ending


def _loop(chat: Chat, prompt: Prompt) -> None:
    while not (chat.leaving or chat.ending() or chat.screen.gone):
        if prompt.problem:
            chat.screen.dim(prompt.problem)
            prompt.problem = None
        try:
            line = prompt.read()
        except KeyboardInterrupt:
            chat.screen.say("Ctrl-D or /exit leaves")
            continue
        except EOFError:
            break
        except OSError:  # no line can be read or written: the terminal is gone
            chat.screen.gone = True
            break
        chat.turn(line)


class Chat:
    """One conversation with one engine. The commands (commands.py) are its other half."""

    def __init__(self, engine: Any, model_name: str, params: SamplingParams, screen: Screen,
                 autosave: Autosave, *, detailed: bool = False, draft: int = 0, thinking: bool | None = None,
                 effort: str | None = None,
                 draw: Callable[[], int] = lambda: secrets.randbelow(SEEDS),
                 clock: Callable[[], float] = time.perf_counter):
        """draft: ids guessed at a time, 0 for none; thinking, effort: see run; draw: a random seed; clock: seconds."""
        self.engine = engine
        self.session = engine.session()
        self.screen = screen
        self.pace = engine.pace(draft, screen.say) if draft else None
        self.autosave = autosave
        self.autosave_failed = False
        self.conversation = Conversation(model_name)
        self.params = params
        self.figures: statline.Figures | None = None
        self.cancel = Cancel()
        self.ending: Callable[[], signal.Signals | None] = lambda: None
        self.leaving = False
        self.request = Request()
        if thinking is not None:
            self.set_thinking(thinking)
        if effort is not None:
            self.set_effort(effort)
        self._detailed = detailed
        self._draw = draw
        self._clock = clock
        self.seed = draw() if params.seed is None else params.seed

    def begin(self, system: str | None, resume: str | None) -> None:
        """Say what the chat works with, and take up a saved conversation if asked to: see run."""
        self.set_system(system)
        self.screen.dim(f"{self.conversation.model} · context {self.session.context} tokens · "
                        f"seed {self.seed_text()}")
        self.screen.dim(f"chat format: {self.engine.tokenizer.template_name}")
        if resume is not None:
            self._resume(resume, system)
        self.screen.dim("/help lists the commands, Ctrl-D leaves")

    def _resume(self, name: str, system: str | None) -> None:
        try:
            saved = self.autosave.load(name)
        except UsageError:
            raise
        except QmixError as e:
            cure = "--continue=NAME takes another (qmix chat --list shows them); this file stays as it is"
            raise UsageError(e.message, cure) from None
        if saved is None:
            self.screen.say(f"no saved conversation with {self.conversation.model}: this is a new one")
            return
        own, lost = adopted(saved[0], self.conversation.model, self.engine.tokenizer)
        if system is not None and system != own.system:
            own = replace(own, system=system)
            self.screen.say("--system replaces the saved system prompt")
        self.check_system(own.system)
        self.conversation = own
        last = f", the last question was {commands.shortened(own.exchanges[-1].question)}" if len(own) else ""
        self.screen.say(f"continuing {commands.exchanges(len(own))}{last}")
        self.tell_loaded(saved[0], lost)
        if replace(saved[1], seed=self.params.seed) != self.params:
            self.screen.dim("parameters are this command's, not the saved ones: "
                            f"{parameters.listed(saved[1])}")

    def turn(self, line: str) -> None:
        """Do what was typed. Errors are said, and leave everything as it was."""
        typed = commands.parse(line)
        self.cancel.clear()
        if self.ending():  # a signal that came before clear() must not be forgotten
            self.cancel.set()
        try:
            if typed.command is not None:
                commands.execute(self, typed.command, typed.text)
            elif typed.text.strip():
                self.answer(typed.text, self.conversation)
        except QmixError as e:
            self.screen.error(e)

    def answer(self, question: str, base: Conversation) -> None:
        """Answer `question` after `base`; the conversation becomes base and this exchange, unless nothing
        was said. UsageError with the numbers where the context is too small."""
        context = self.session.context
        prompt = self.engine.tokenizer.prompt(base.messages(question), context, self.request)
        if len(prompt.ids) >= context:
            raise UsageError(
                f"with this message the conversation has {len(prompt.ids)} tokens, the context holds {context}",
                "/clear or /undo makes room, or start again with a larger -c/--ctx-size; "
                "Up brings the message back")
        known = 0 if self.engine.exact else common_prefix(prompt.ids, self.session.ids)
        kept = self.session.reachable(known)
        if len(prompt.ids) - kept >= LONG_PREFILL:
            again = f", {known - kept} of them again: the model's state is kept at few places" if kept < known else ""
            self.screen.transient(f"reading {len(prompt.ids) - kept} tokens{again}")
        self.screen.begin_answer()
        self.engine.reset_stats()
        answer = respond(self.session, self.engine.tokenizer, prompt, replace(self.params, seed=self.seed),
                         self.cancel, self._show, self._clock, self.pace, self.engine.exact)
        self.screen.end_answer()
        if self.pace is not None:
            self.pace.report()
        self._keep(question, base, answer)

    def _show(self, part: Part) -> None:
        self.screen.show(part)
        if self.screen.gone:
            self.cancel.set()

    def _keep(self, question: str, base: Conversation, answer: Answer) -> None:
        if not answer.text.strip() and answer.finish in ("cancelled", "error"):
            if answer.error is not None:
                self.screen.error(answer.error)
            kept = "the earlier answer stays" if base is not self.conversation else \
                "the question is not in the conversation (Up brings it back)"
            self.screen.dim(f"{self._ending(answer)} before the answer began: {kept}")
            return
        exchange = Exchange(question, answer.text, answer.ids, answer.reasoning, answer.calls)
        without = base.plus(replace(exchange, calls=()))
        refused = refuses_calls(base.plus(exchange), without, self.engine.tokenizer, self.request)
        self.conversation = without if refused else base.plus(exchange)
        self.figures = statline.Figures(answer.timings, self.session.length, self.session.context, self.seed,
                                        self._ending(answer))
        self.autosave_now()
        if answer.calls:
            names = ", ".join(call.name for call in answer.calls)
            self.screen.dim(f"(the model calls a tool, {names}, and waits for its result: this chat runs no tools)")
            if refused:
                self.screen.dim("(the chat template refuses such a call before a question: the model is not shown it "
                                "again)")
        elif not answer.text:
            self.screen.dim("(the model ended its answer at once)" if answer.reasoning is None else
                            "(thoughts, and no answer)")
        self.screen.dim(statline.line(self.figures, self.tiers()))
        if self._detailed:
            self.screen.dim(statline.block(self.figures, self.tiers(), self.paging()))
        if answer.error is not None:
            self.screen.error(answer.error)

    def _ending(self, answer: Answer) -> str:
        if answer.finish == "cancelled":
            ended = self.ending()
            return f"stopped by {ended.name if ended else 'Ctrl-C'}"
        if answer.finish == "length":
            why = "context full" if answer.context_full else f"max-tokens {self.params.max_tokens}"
            return f"length: {why}"
        return "stopped by an error" if answer.finish == "error" else ""

    def tiers(self) -> dict[str, float]:
        """Share of expert reads per tier, in percent."""
        return self.engine.stats().get("experts", {})

    def paging(self) -> dict[str, str]:
        """What the last answer read from disk, and how its guesses turned out."""
        report = self.engine.stats().get("offload")
        return sentences(report) if report else {}

    def autosave_now(self) -> None:
        """Save for --continue; a failure is told once, and never stops the chat."""
        try:
            if told := self.autosave.save(self.conversation, self.params):
                self.screen.say(told)
            self.autosave_failed = False
        except QmixError as e:
            if not self.autosave_failed:
                self.screen.say(f"the conversation is not saved for --continue: {e.message}")
            self.autosave_failed = True

    def start_over(self, conversation: Conversation) -> None:
        """Put another conversation in the place of this one."""
        self.conversation = conversation
        self.autosave.start_new()
        self.figures = None

    def set_system(self, text: str | None) -> None:
        self.check_system(text)
        self.conversation = replace(self.conversation, system=text or None)

    def check_system(self, text: str | None) -> None:
        """QmixError where the chat format refuses this system prompt."""
        if text:
            self.engine.tokenizer.encode_chat(Conversation("", text).messages("-"))

    def tell_loaded(self, saved: Conversation, lost: int) -> None:
        """Say which answers were said in other tokens, and which calls were left out."""
        if saved.model != self.conversation.model:
            self.screen.say(f"it was held with {saved.model}: all of it is tokenized again for this model")
        elif lost:
            self.screen.say(f"answers tokenized again: {lost} of {len(self.conversation)}; "
                            "their ids are unknown or another vocabulary's")
        left_out = sum(len(e.calls) for e in saved.exchanges) - sum(len(e.calls) for e in self.conversation.exchanges)
        if left_out:
            self.screen.say(f"tool calls left out, which this model cannot be shown: {left_out}")

    def set_params(self, params: SamplingParams) -> None:
        """A seed that becomes random is drawn now; one that was random already stays."""
        if params.seed is not None:
            self.seed = params.seed
        elif self.params.seed is not None:
            self.draw_seed()
        self.params = params

    def set_thinking(self, thinking: bool) -> None:
        """UsageError where the chat template has no switch for it."""
        self.engine.tokenizer.check_thinking_switch()
        self.request = replace(self.request, thinking=thinking)

    def thinking_text(self) -> str:
        return {None: "as the model does it", True: "on", False: "off"}[self.request.thinking]

    def set_effort(self, effort: str) -> None:
        """UsageError where the chat template has no place for it, or the word is not known."""
        self.engine.tokenizer.check_effort()
        self.request = replace(self.request, effort=effort)

    def effort_text(self) -> str:
        return self.request.effort or "as the model does it"

    def draw_seed(self) -> None:
        self.seed = self._draw()

    def seed_text(self) -> str:
        return f"{self.seed} (random)" if self.params.seed is None else str(self.seed)

"""An engine without a model, for the chat's tests: what it answers depends on the ids it was given,
and on nothing else, so a chat that feeds a session wrong ids gets a wrong answer.

Ids are 10 + a byte of UTF-8; below 10 are control ids. A prompt is
BOS [SYSTEM text] (USER text ASSISTANT text EOS)* USER text ASSISTANT.

Run as a script it opens a chat: python chat_fakes.py STATE_DIR [JSON of keyword arguments for run]
"""

from __future__ import annotations

import io
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from qmix.chat import run, savefile
from qmix.chat.repl import Chat
from qmix.chat.screen import Screen
from qmix.config import Cancel, SamplingParams
from qmix.errors import Interrupted, StoreError, UsageError
from qmix.speculation import Pace
from qmix.tokenizer import Message, Prompt, ReasoningSplitter, Request, StreamDecoder
from qmix.tokenizer.stream import SILENT, Piece

BOS, EOS, SYSTEM, USER, ASSISTANT, ANY_DIGIT, THINK, NOTHINK = 1, 2, 3, 4, 5, 6, 7, 8
VOCAB = 10 + 256


class FakeTokenizer:
    bos_id: int | None = BOS
    eos_ids = (EOS,)
    vocab_size = VOCAB
    template_name = "fake format"
    turn_stops: tuple[str, ...] = ()
    thinking_switch = takes_effort = takes_tools = False
    verbatim = True
    headers: Mapping[int, bool] = MappingProxyType({})

    def encode(self, text: str, bos: bool = True, limit: int | None = None) -> list[int]:
        return [BOS] * bos + [10 + byte for byte in text.encode()]

    def encode_chat(self, messages: Sequence[Message], limit: int | None = None) -> list[int]:
        marks = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
        ids = [BOS]
        for m in messages:
            if m.role == "system" and "refuse" in m.content:
                raise UsageError("the template refuses this system prompt")
            said = self.encode(m.content, bos=False) if m.ids is None else list(m.ids)
            ids += [marks[m.role], *said, *([EOS] if m.role == "assistant" else [])]
        return [*ids, ASSISTANT]

    def prompt(self, messages: Sequence[Message], limit: int | None = None, request: Request | None = None) -> Prompt:
        """Reasoning is dropped, as by a template that knows nothing of it. "opened" in a question: the prompt opens the
        reasoning; the switch, where there is one, closes it at once."""
        ids = self.encode_chat(messages, limit)
        if request is not None and request.thinking is False:
            self.check_thinking_switch()
            return Prompt([*ids, NOTHINK])
        opened = messages[-1].content.startswith("opened")
        return Prompt([*ids, THINK] if opened else ids, opened)

    def check_thinking_switch(self) -> None:
        if not self.thinking_switch:
            raise UsageError("no switch for thinking")

    def check_effort(self) -> None:
        if not self.takes_effort:
            raise UsageError("no place for effort")

    def answer_parser(self, prompt: Prompt) -> ReasoningSplitter:
        return ReasoningSplitter(prompt.in_reasoning)

    def decoder(self, continuing: bool = False, marked: bool = False) -> StreamDecoder:
        return StreamDecoder(self._piece, continuing=True)

    @staticmethod
    def _piece(token: int) -> Piece:
        if not 0 <= token < VOCAB:
            raise UsageError(f"token id: got {token}")
        return SILENT if token < 10 else Piece(bytes([token - 10]), whole=False)

    def decode(self, ids: Sequence[int], continuing: bool = False) -> str:
        decoder = self.decoder()
        return "".join(map(decoder.push, ids)) + decoder.finish()


def reply(ids: Sequence[int]) -> Iterator[int]:
    """The answer's ids, EOS included, to a prompt's ids."""
    asked = max(i for i, token in enumerate(ids) if token == USER)
    question = bytes(token - 10 for token in ids[asked + 1 :] if token >= 10).decode()
    system = bytes(token - 10 for token in ids[2 : ids.index(USER)]).decode() if ids[1] == SYSTEM else ""
    if question == "think forever":
        text: Iterator[str] = itertools.chain(["<think>"], (f"{n} " for n in itertools.count(1)))
    elif question == "count":
        text = (f"{n} " for n in itertools.count(1))
    elif question == "roll":
        return iter([ANY_DIGIT] * 12 + [EOS])
    else:
        text = iter(
            [
                {
                    "escape": "a\x1b[2Jb\x07c\x9bd",
                    "unicode": "né☃",
                    "nothing": "",
                    "lines": "  \n one\ntwo\n",
                    "system?": f"it is {system!r}",
                    "turns?": f"turn {sum(token == USER for token in ids)}",
                    "fail": "before the failure",
                    "think": "It is so." if ids[-1] == NOTHINK else "<think>\nhm, a\x1b[2J\n</think>\n\nIt is so.",
                    "opened": "\nhm\n</think>\n\nYes </think>.",
                    "only thoughts": "<think>hm",
                    "no thoughts": "<think>\n\n</think>\n\nAt once.",
                    "mention": "Write <think> and </think>.",
                    "tag": "<thin",
                }.get(question, f"You said: {question}")
            ]
        )
    return itertools.chain((10 + byte for piece in text for byte in piece.encode()), [EOS])


class FakeSession:
    """Positions are ids; logits choose the next id of reply(prompt), or any digit for ANY_DIGIT."""

    warm = True

    def __init__(self, context: int):
        self.context = context
        self.ids: list[int] = []
        self.computed: list[int] = []  # how many ids each prefill was given
        self.places: Sequence[int] | None = None  # to which it goes back; None for all
        self._answer_at = 0  # where the answer begins; drafts may hold any id
        self._rest: Iterator[int] = iter(())  # of the answer, what nobody has asked for; it may have no end
        self._answer: list[int] = []
        self._slow = self._fails = False

    @property
    def length(self) -> int:
        return len(self.ids)

    def reachable(self, length: int) -> int:
        return length if self.places is None else max(place for place in (0, *self.places) if place <= length)

    def trim(self, length: int) -> None:
        del self.ids[self.reachable(length):]

    def prefill(self, ids: Sequence[int], cancel: Cancel | None = None) -> torch.Tensor:
        assert ids and len(self.ids) + len(ids) <= self.context
        self.computed.append(len(ids))
        if self._asked("hang", [*self.ids, *ids]):
            while not cancel:
                time.sleep(0.002)
        if cancel:
            raise Interrupted("cancelled")
        self.ids.extend(ids)
        self._answer_at = self._start(self.ids)
        self._rest, self._answer = reply(self.ids[:self._answer_at]), []
        self._slow, self._fails = (self._asked(word, self.ids) for word in ("count", "fail"))
        return self._logits()

    def decode(self, token: int, cancel: Cancel | None = None) -> torch.Tensor:
        assert len(self.ids) < self.context
        if cancel:
            raise Interrupted("cancelled")
        if self._slow:
            time.sleep(0.002)  # a pace that a reader can interrupt
        if self._fails and len(self.ids) - self._answer_at > 6:
            raise StoreError("experts-00.safetensors: layer 0 expert 3: checksum differs")
        self.ids.append(token)
        return self._logits()

    def verify(self, ids: Sequence[int], cancel: Cancel | None = None) -> torch.Tensor:
        return torch.stack([self.decode(token, cancel) for token in ids])

    @staticmethod
    def _start(ids: list[int]) -> int:
        """Where the answer to the last question begins."""
        at = max(i for i, token in enumerate(ids) if token == ASSISTANT) + 1
        return at + (ids[at : at + 1] in ([THINK], [NOTHINK]))

    @staticmethod
    def _asked(word: str, ids: Sequence[int]) -> bool:
        """Whether the last question begins with `word`."""
        first = max(i for i, token in enumerate(ids) if token == USER) + 1
        return list(ids[first : first + len(word)]) == [10 + byte for byte in word.encode()]

    def _logits(self) -> torch.Tensor:
        at = len(self.ids) - self._answer_at
        while len(self._answer) <= at:
            self._answer.append(next(self._rest, EOS))
        chosen = self._answer[at]
        logits = torch.full((VOCAB,), -1e4)
        if chosen == ANY_DIGIT:
            logits[10 + ord("0") : 11 + ord("9")] = 0.0
        else:
            logits[chosen] = 0.0
        return logits


class Eager(Pace):
    """Tries every draft."""

    def length(self, match: int, most: int) -> int:
        return min(self.longest, most)


class FakeEngine:
    exact = False

    def __init__(self, context: int = 4096):
        self.tokenizer = FakeTokenizer()
        self.context = context
        self.sessions: list[FakeSession] = []

    def session(self) -> FakeSession:
        self.sessions.append(FakeSession(self.context))
        return self.sessions[-1]

    def pace(self, longest: int, say: Callable[[str], None]) -> Pace:
        return Eager(longest)

    def stats(self) -> dict[str, dict[str, float]]:
        return {"experts": {"ram": 100.0}}

    def reset_stats(self) -> None:
        pass


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Talk:
    """A Chat on string streams: say() takes a line, returns what it wrote on stdout and stderr."""

    def __init__(
        self,
        folder: Path,
        params: SamplingParams | None = None,
        *,
        system: str | None = None,
        resume: str | None = None,
        model: str = "fake",
        context: int = 4096,
        detailed: bool = False,
        draft: int = 0,
        thinking: bool | None = None,
        effort: str | None = None,
        term: str = "dumb",
        switch: bool = False,
    ):
        self.engine = FakeEngine(context)
        self.engine.tokenizer.thinking_switch = switch
        self.out, self.err = Terminal(), Terminal()
        seeds = itertools.count(100)
        clock = itertools.count()
        self.chat = Chat(
            self.engine,
            model,
            params or SamplingParams(),
            Screen(self.out, self.err, {"TERM": term}),
            savefile.Autosave(folder, model),
            detailed=detailed,
            draft=draft,
            thinking=thinking,
            effort=effort,
            draw=lambda: next(seeds),
            clock=lambda: next(clock) / 10,
        )
        self.chat.begin(system, resume)

    @property
    def session(self) -> FakeSession:
        return self.engine.sessions[0]

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(e.question, e.answer) for e in self.chat.conversation.exchanges]

    def say(self, line: str) -> tuple[str, str]:
        before = self.out.tell(), self.err.tell()
        self.chat.turn(line)
        return self.out.getvalue()[before[0] :], self.err.getvalue()[before[1] :]


def main(state_dir: str, options: str = "{}") -> None:
    given = {"model_name": "fake", "context": 4096, **json.loads(options)}
    if given.pop("ignore_hangup", False):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    engine = FakeEngine(given.pop("context"))
    params = SamplingParams(**given.pop("params", {}))
    sys.exit(run(engine, params=params, state_dir=Path(state_dir), **given))


if __name__ == "__main__":
    main(*sys.argv[1:])

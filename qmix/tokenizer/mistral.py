"""The chat format of Mixtral 8x7B Instruct, encoded segment by segment as Mistral does (tokenizer v1).

    <s> [INST] question [/INST] answer </s> [INST] question [/INST]

"[INST]" is plain text in this vocabulary. Each instruction and each answer is encoded alone, BOS comes once, EOS after
each answer. Rendering the conversation to one string and encoding that string would give other ids. The system text is
joined to the first user message by a blank line, and so are neighbours of the same role. Nothing is trimmed. Source and
oracle: mistral-common, InstructTokenizerV1 and InstructRequestNormalizer.

The model's template has priority over this format, unless it writes the same: "[INST] question [/INST]" and answers,
with a space or none at the borders, which is how Mistral's own templates differ from the segments. qmix tests this on
sample conversations when the model is loaded, and again on each conversation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from qmix.errors import UsageError
from qmix.tokenizer.files import TokenizerFiles
from qmix.tokenizer.message import Message, Prompt, Request, check_conversation, without_end
from qmix.tokenizer.template import TemplateFormat
from qmix.tokenizer.vocabulary import Vocabulary

PIECES = 32000
# SHA-256 of the vocabulary's pieces joined by newlines: the tokenizer that Mistral 7B v0.1 and v0.2 and
# Mixtral 8x7B share (their tokenizer.model has SHA-256 dadfd56d7667...). Llama 2 has 32000 others.
PIECES_SHA256 = "9667493c598ed599f14df3157cb9a6f373d49a1b2d99d98c79e937ff490d219b"


def may_be_mistral(files: TokenizerFiles) -> bool:
    """Whether conversations may be Mistral's segments, as far as is known without the vocabulary. Without any template,
    only a folder with "instruct" in its name or in config.json's `_name_or_path` is taken for one: the base
    model has the same vocabulary."""
    if files.template is not None:
        return "[INST]" in files.template
    return any("instruct" in Path(name).name.lower() for name in files.names)


def has_mistral_v1_pieces(vocabulary: Vocabulary) -> bool:
    """Whether the vocabulary is Mistral's first one, piece by piece."""
    if vocabulary.size < PIECES:
        return False
    pieces = "\n".join(vocabulary.token(i) for i in range(PIECES))
    return hashlib.sha256(pieces.encode("utf-8")).hexdigest() == PIECES_SHA256


def probes() -> list[list[Message]]:
    """Conversations that a template must write as the segments are."""
    user, answer = (lambda text, role=role: Message(role, text) for role in ("user", "assistant"))
    long = [user("one"), answer("two"), user(" three\n"), answer("four"), user("five?")]
    return [long[:1], long[2:3], long[:3], long, [Message("system", "Be brief."), user("one")]]


class TemplateBeside:
    """The checkpoint's own template, where it has one, beside the segments of a version ("v1")."""

    def __init__(self, version: str, vocabulary: Vocabulary, template: TemplateFormat | None,
                 say: Callable[[str], None]):
        assert vocabulary.bos_id is not None
        self._version, self._template, self._say = version, template, say
        self._bos = re.escape(vocabulary.token(vocabulary.bos_id))
        self._said = False

    def name(self, both: bool) -> str:
        """Of the format, for people. both: there are tokenizer.json and tokenizer.model."""
        why = "the checkpoint has no template" if self._template is None else "the checkpoint's template says the same"
        return f"Mistral {self._version} segments (built in; {why}{'; ids of tokenizer.model' if both else ''})"

    def writes(self, messages: Sequence[Message], turns: str) -> bool:
        """Whether it writes a conversation as the pattern `turns`, or there is none. One that refuses the conversation
        says nothing: Mistral's first templates take no system text."""
        if self._template is None:
            return True
        try:
            written = self._template.render(messages)
        except UsageError:
            return len(messages) != 1 or messages[0].role != "user"
        return re.fullmatch(f"(?:{self._bos})?{self._bos}{turns}\\s?", written) is not None

    def encode(self, messages: Sequence[Message], limit: int | None, request: Request | None) -> Prompt:
        """By the template, which `writes` it otherwise; said once."""
        assert self._template is not None
        if not self._said:
            self._said = True
            self._say(f"the checkpoint's template writes this conversation differently from Mistral {self._version} "
                      "segments: the template is used")
        return self._template.encode(messages, limit, request)


class MistralV1Format:
    """template: the checkpoint's own, where it has one. both: there are tokenizer.json and tokenizer.model."""

    turn_stops: tuple[str, ...] = ()
    takes_tools = thinking_switch = takes_effort = False

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int], template: TemplateFormat | None,
                 say: Callable[[str], None], *, both: bool = False):
        assert vocabulary.bos_id is not None and vocabulary.eos_id is not None  # pieces 1 and 2
        self._template = TemplateBeside("v1", vocabulary, template, say)
        self.name = self._template.name(both)
        self._vocabulary = vocabulary
        self._bos, self._eos = vocabulary.bos_id, vocabulary.eos_id
        self._ends = tuple(eos_ids)

    def fits_template(self) -> bool:
        """Whether the checkpoint's template, if any, writes the same as the segments are."""
        return all(self._same(probe) for probe in probes())

    def _same(self, messages: Sequence[Message]) -> bool:
        """Whether the template writes this conversation as the segments are, or refuses it."""
        eos = re.escape(self._vocabulary.token(self._eos))
        turns = (rf"\s?{re.escape(text)}" + (rf"\s?{eos}" if role == "assistant" else "")
                 for role, text, _ in _turns(messages))
        return self._template.writes(messages, "".join(turns))

    @property
    def turn_end(self) -> int:
        return self._eos

    def encode(self, messages: Sequence[Message], limit: int | None = None, request: Request | None = None) -> Prompt:
        check_conversation(messages)
        if not self._same(messages):
            return self._template.encode(messages, limit, request)
        self._vocabulary.check_length((text for _, text, _ in _turns(messages)), limit)
        ids = [self._bos]
        for role, text, generated in _turns(messages):
            # Every text is a segment of its own, so an instruction after an answer keeps its space too.
            ids += self._vocabulary.encode_text(text, start=True) if generated is None else \
                without_end(generated, self._ends)
            ids += [self._eos] if role == "assistant" else []
        return Prompt(ids)


def _turns(messages: Sequence[Message]) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    """(role, text as it is encoded, ids of an answer that are known) of each turn."""
    system = "\n\n".join(m.content for m in messages if m.role == "system" and m.content)
    turns = [(role, list(turn)) for role, turn in groupby(
        (m for m in messages if m.role != "system"), key=lambda m: m.role)]
    if turns[0][0] != "user":
        turns.insert(0, ("user", [Message("user", "")]))
    for i, (role, turn) in enumerate(turns):
        content = "\n\n".join(m.content for m in turn if m.content)
        if role == "user":
            lead = f"{system}\n\n" if i == 0 and system else ""
            yield role, f"[INST] {lead}{content} [/INST]", None
        else:
            yield role, content, turn[0].ids if len(turn) == 1 else None

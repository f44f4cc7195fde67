"""Text to ids, ids to text, conversations to prompts.

    tokenizer = load(folder)
    ids = tokenizer.encode_chat([Message("user", "Why is the sky blue?")])
    decoder = tokenizer.decoder()
    for token_id in generated: print(decoder.push(token_id), end="")

files.py reads what the folder says. hf.py and spm.py are the two kinds of vocabulary over vocabulary.py. stream.py
decodes. parts.py says what an answer consists of; reasoning.py (tags), calls.py (tags, and calls between tags: glm.py,
json_calls.py, xml_calls.py), gemma.py (a channel, and calls) and harmony.py (channels) find it. The chat formats are
mistral.py, mistral_v3.py, template.py (over sandbox.py and traced.py) and plain.py. No torch here; sentencepiece,
tokenizers and jinja2 are imported when needed.

If tokenizer.json exists, its ids are the reference, and the model's own template is the chat format. Mixtral's own
format is the one exception: if the template writes the same, conversations are encoded as Mistral does it, with
tokenizer.model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from qmix import render
from qmix.config import EFFORTS
from qmix.errors import ModelFileError, UsageError
from qmix.tokenizer import harmony_template
from qmix.tokenizer.files import TokenizerFiles, read_files
from qmix.tokenizer.gemma import gemma_format, gemma_stops
from qmix.tokenizer.glm import glm_format
from qmix.tokenizer.harmony import harmony_format, harmony_stops
from qmix.tokenizer.json_calls import json_format
from qmix.tokenizer.message import ROLES, ChatFormat, Message, Prompt, Request, ToolCall
from qmix.tokenizer.mistral import MistralV1Format, has_mistral_v1_pieces, may_be_mistral
from qmix.tokenizer.mistral_calls import mistral_calls_format
from qmix.tokenizer.mistral_v3 import MistralV3Format, has_mistral_v3_pieces
from qmix.tokenizer.parts import MARK, AnswerFormat, AnswerParser, Call, Divided, Part, divide
from qmix.tokenizer.plain import PlainFormat
from qmix.tokenizer.reasoning import THINK, ReasoningSplitter
from qmix.tokenizer.sandbox import Template
from qmix.tokenizer.stream import SILENT, Piece, StreamDecoder
from qmix.tokenizer.template import TemplateFormat
from qmix.tokenizer.vocabulary import Vocabulary
from qmix.tokenizer.xml_calls import xml_format

__all__ = ["ROLES", "AnswerParser", "Call", "Divided", "Message", "Part", "Prompt", "ReasoningSplitter",
           "Request", "StreamDecoder", "Tokenizer", "ToolCall", "divide", "load"]


class Tokenizer:
    """bos_id: None where the model has none. eos_ids: every id that ends an answer, by the config files,
    the vocabulary and the chat template. vocab_size: ids of the tokenizer, at most the model's, whose
    further rows are padding. template_name: which chat format is used, to be told to the user;
    has_template: whether it is the model's own format, and not a transcript made up for a base model.
    turn_stops: stop strings that this format needs besides eos_ids. thinking_switch: whether the template can turn the
    model's reasoning on and off; takes_effort: whether it can be told how much to reason; takes_tools: whether it has a
    place for tools. verbatim: whether the text of an answer is fit to be read as the model writes it.
    headers: the control tokens of an answer's headers, and whether text follows them."""

    def __init__(self, vocabulary: Vocabulary, chat: ChatFormat, eos_ids: Iterable[int], *,
                 rows: int | None = None, answers: AnswerFormat = THINK):
        self._vocabulary = vocabulary
        self._chat = chat
        self._answers = answers
        self._rows = vocabulary.size if rows is None else rows
        self.bos_id = vocabulary.bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.vocab_size = vocabulary.size
        self.template_name = chat.name
        self.has_template = not isinstance(chat, PlainFormat)
        self.turn_stops = chat.turn_stops
        self.thinking_switch = chat.thinking_switch
        self.takes_effort = chat.takes_effort
        self.verbatim = answers.verbatim
        self.headers = {i: i in answers.content for i in answers.marks}
        self.takes_tools = chat.takes_tools

    def encode(self, text: str, bos: bool = True, limit: int | None = None) -> list[int]:
        """ids of plain text; what spells a control token is text like any other. bos: with the start id in
        front, where the model's own tokenizer puts one there. limit: UsageError, at once, for a text that surely has
        more ids; one that has may still come back."""
        vocabulary = self._vocabulary
        self.check_length([text], limit)
        head = vocabulary.head if bos else ()
        return self._with_rows([*head, *vocabulary.encode_text(text, vocabulary.fresh_at_start)])

    def check_length(self, texts: Iterable[str], limit: int | None) -> None:
        """PromptTooLong where a prompt with all of these texts surely has more ids than `limit`."""
        self._vocabulary.check_length(texts, limit)

    def encode_more(self, text: str) -> list[int]:
        """ids of plain text that goes on from other text."""
        return self._with_rows(self._vocabulary.encode_text(text, False))

    def encode_chat(self, messages: Sequence[Message], limit: int | None = None,
                    request: Request | None = None) -> list[int]:
        """ids of a conversation, ending with the start of the next answer; never two BOS. limit: as of `encode`.

        UsageError where the last message is not the user's, the template refuses the conversation, or it has no place
        for what `request` asks."""
        return self.prompt(messages, limit, request).ids

    def prompt(self, messages: Sequence[Message], limit: int | None = None, request: Request | None = None) -> Prompt:
        """encode_chat, and whether the answer begins inside the model's reasoning."""
        if request is not None and request.thinking is not None:
            self.check_thinking_switch()
        if request is not None and request.effort is not None:
            self.check_effort()
        if not self.takes_tools and ((request is not None and request.tools) or any(
                message.role == "tool" or message.tool_calls for message in messages)):
            raise UsageError("this model's chat format has no place for tools", "leave them out, or use another model")
        prompt = self._chat.encode(messages, limit, request)
        self._with_rows(prompt.ids)
        return prompt

    def check_thinking_switch(self) -> None:
        """UsageError where nothing turns the model's reasoning on and off."""
        if not self.thinking_switch:
            raise UsageError("this model's chat template has no switch for thinking (enable_thinking)",
                             f"--reasoning {'|'.join(EFFORTS)} says how much it thinks" if self.takes_effort else
                             "leave it as the model does it")

    def check_effort(self) -> None:
        """UsageError where the model cannot be told how much to reason."""
        if not self.takes_effort:
            raise UsageError("this model's chat template has no place for how much it thinks (reasoning_effort)",
                             "--think and --no-think switch its thinking" if self.thinking_switch else
                             "leave it as the model does it")

    def answer_parser(self, prompt: Prompt) -> AnswerParser:
        """What finds the parts of an answer to `prompt` in its marked text."""
        begins, opening = self._answers.begins, ""
        if begins in prompt.ids:
            at = len(prompt.ids) - 1 - prompt.ids[::-1].index(begins)
            opening = "".join(map(self.decoder(marked=True).push, prompt.ids[at:]))
        return self._answers.parser(prompt, opening)

    def call_grammar(self, tools: Sequence[Mapping[str, Any]], name: str | None, parallel: bool) -> str:
        """The grammar of an answer that calls one of `tools`, or only the one of that name, and several where
        `parallel`. UsageError where the model's format of answers has none."""
        if self._answers.call_grammar is None:
            raise UsageError("tool_choice: with this model's format of answers, no call can be forced",
                             'leave the choice to the model ("auto")')
        return self._answers.call_grammar([tool for tool in tools if name in (None, tool["function"]["name"])],
                                          parallel)

    def _with_rows(self, ids: list[int]) -> list[int]:
        """ids, all of which the model has a row for; UsageError for a token that only the tokenizer knows."""
        if ids and max(ids) >= self._rows:
            raise UsageError(f"the text holds {self._vocabulary.token(max(ids))!r}, token {max(ids)}, for which the "
                             f"model has no row (it has {self._rows})", "write it differently")
        return ids

    def decoder(self, continuing: bool = False, marked: bool = False) -> StreamDecoder:
        """A decoder for one text. continuing: the text goes on from a prompt, so that the space in front
        of its first word belongs to it; an answer in a chat starts without it. marked: for an answer_parser, with
        MARK in front of the control tokens that give an answer its parts."""
        vocabulary = self._vocabulary
        return StreamDecoder(self._marked if marked and self._answers.marks else self._piece,
                             per_byte=vocabulary.per_byte, drop_all=vocabulary.drop_all, continuing=continuing)

    def decode(self, ids: Iterable[int], continuing: bool = False) -> str:
        """The text of ids; special tokens are silent but for those that give an answer its parts, bytes that are no
        UTF-8 become U+FFFD."""
        decoder = self.decoder(continuing)
        return "".join(map(decoder.push, ids)) + decoder.finish()

    def marker(self, text: str) -> int | None:
        """The id of an added token such as "<think>", which text that spells it never becomes."""
        return self._vocabulary.markers.get(text)

    def piece(self, token_id: int) -> Piece:
        """What an id adds to a text; nothing for control tokens and padding rows."""
        return self._piece(token_id)

    @property
    def rows(self) -> int:
        """Ids that the model has: those of the vocabulary, and rows of padding."""
        return self._rows

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id, for tables and traces."""
        return self._vocabulary.token(token_id) if 0 <= token_id < self.vocab_size else ""

    def _marked(self, token_id: int) -> Piece:
        text = self._answers.marks.get(token_id)
        return self._piece(token_id) if text is None else Piece((MARK + text).encode("utf-8", "surrogatepass"))

    def _piece(self, token_id: int) -> Piece:
        if token_id in self._answers.marks and token_id not in self.eos_ids:
            return Piece(self._answers.marks[token_id].encode())
        if 0 <= token_id < self.vocab_size:
            return self._vocabulary.piece(token_id)
        if 0 <= token_id < self._rows:
            return SILENT  # a padding row of the embedding, which no text stands behind
        raise UsageError(f"token id: got {token_id}, want 0 to {self._rows - 1}")


def load(folder: Path, vocab_size: int | None = None,
         now: Callable[[], datetime] = datetime.now, say: Callable[[str], None] = render.say) -> Tokenizer:
    """Read the tokenizer of a checkpoint or store. vocab_size: rows of the model's embedding, which bound
    the ids; now: the clock that a chat template may ask; say: takes a line that the user must know.

    ModelFileError names the file and the key at fault."""
    folder = Path(folder)
    files = read_files(folder)
    vocabulary, chat = _mistral(files, vocab_size, now, say) or (_vocabulary(files), None)
    eos = _end_ids(files, vocabulary, vocab_size)
    harmony, gemma = harmony_format(vocabulary, files.templates or None), gemma_format(vocabulary, files.templates)
    if harmony is not None:
        eos += harmony_stops(vocabulary)
    elif gemma is not None:
        eos += gemma_stops(vocabulary)
    if chat is None:
        chat = _own_template(vocabulary, files, eos, now, say)
    if chat is None and harmony is not None:
        built_in = Template(harmony_template.TEMPLATE, files.folder, now)
        chat = TemplateFormat(vocabulary, built_in, {}, eos, say, name=harmony_template.NAME)
    chat = chat or PlainFormat(vocabulary, eos)
    if chat.turn_end is not None:
        eos.append(chat.turn_end)
    return Tokenizer(vocabulary, chat, eos, rows=vocab_size, answers=harmony or gemma or _mistral_calls(
        vocabulary, chat, files.templates) or _tagged(files.templates))


def _mistral_calls(vocabulary: Vocabulary, chat: ChatFormat, templates: str) -> AnswerFormat | None:
    """Mistral's calls as a list, and not the later ones, whose arguments stand behind [ARGS]."""
    written = isinstance(chat, MistralV3Format) or ("[TOOL_CALLS]" in templates and "[ARGS]" not in templates)
    return mistral_calls_format(vocabulary) if written else None


def _tagged(templates: str) -> AnswerFormat:
    """The format of answers whose reasoning stands between tags, and their calls too where the templates have them."""
    return glm_format(templates) or xml_format(templates) or json_format(templates) or THINK


def _vocabulary(files: TokenizerFiles) -> Vocabulary:
    if files.json is not None:
        from qmix.tokenizer.hf import JsonVocabulary

        return JsonVocabulary(files.json, files)
    from qmix.tokenizer.spm import SentencePieceVocabulary

    assert files.spm is not None  # read_files found one of the two
    return SentencePieceVocabulary(files.spm, files)


def _mistral(files: TokenizerFiles, vocab_size: int | None, now: Callable[[], datetime],
             say: Callable[[str], None]) -> tuple[Vocabulary, ChatFormat] | None:
    """The vocabulary of tokenizer.model, where it is there, and Mistral's chat format, v1 or v3, where the model has
    it."""
    if not may_be_mistral(files):
        return None
    vocabulary = _vocabulary(replace(files, json=None) if files.spm is not None else files)
    kind = MistralV1Format if has_mistral_v1_pieces(vocabulary) else \
        MistralV3Format if has_mistral_v3_pieces(vocabulary) else None
    if kind is None:
        return None
    eos = _end_ids(files, vocabulary, vocab_size)
    template = _own_template(vocabulary, files, eos, now, say)
    chat = kind(vocabulary, eos, template, say, both=None not in (files.spm, files.json))
    return (vocabulary, chat) if chat.fits_template() else None


def _end_ids(files: TokenizerFiles, vocabulary: Vocabulary, vocab_size: int | None) -> list[int]:
    """The ids that end an answer by the files; ModelFileError where ids are beyond the model's."""
    if vocab_size is not None and not _fits(vocabulary, files, vocab_size):
        raise ModelFileError(
            f"{files.json or files.spm}: the tokenizer has {vocabulary.size} ids, added tokens included; the model's "
            f"vocab_size is {vocab_size}", "fetch the tokenizer files that belong to this model")
    rows = vocab_size or vocabulary.size
    eos = [i for i in (*files.eos_ids, vocabulary.eos_id) if i is not None]
    if wrong := [i for i in eos if i >= rows]:
        raise ModelFileError(f"{files.folder}: eos_token_id: got {wrong[0]}, want less than {rows}",
                             "correct config.json or generation_config.json")
    return eos


def _fits(vocabulary: Vocabulary, files: TokenizerFiles, rows: int) -> bool:
    """Whether the model has a row for all ids that a prompt needs. Fine-tuners add a padding token and leave the
    embedding as it was: added tokens may lie beyond, unless the template, BOS or EOS are among them."""
    for token_id in range(rows, vocabulary.size):
        text = vocabulary.token(token_id)
        if token_id in (vocabulary.bos_id, vocabulary.eos_id) or text in files.templates \
                or (text not in files.added and text not in vocabulary.markers):
            return False
    return True


def _own_template(vocabulary: Vocabulary, files: TokenizerFiles, eos: Sequence[int], now: Callable[[], datetime],
                  say: Callable[[str], None]) -> TemplateFormat | None:
    if files.template is None:
        return None
    assert files.template_file is not None
    named = dict(files.named)
    for name, token_id in (("bos_token", vocabulary.bos_id), ("eos_token", vocabulary.eos_id)):
        if token_id is not None:
            named.setdefault(name, vocabulary.token(token_id))
    tools = None if files.tool_template is None else Template(files.tool_template, files.tool_file or files.folder, now)
    return TemplateFormat(vocabulary, Template(files.template, files.template_file, now), named, eos, say, tools)

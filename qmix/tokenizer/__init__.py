"""Text to ids, ids to text, conversations to prompts.

    tokenizer = load(folder)
    ids = tokenizer.encode_chat([Message("user", "Why is the sky blue?")])
    decoder = tokenizer.decoder()
    for token_id in generated: print(decoder.push(token_id), end="")

files.py reads what the folder says; spm.py and hf.py are the two kinds of vocabulary over
vocabulary.py; stream.py decodes; mistral.py, template.py (over sandbox.py) and plain.py are the three
chat formats. No torch here; sentencepiece, tokenizers and jinja2 are imported when needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from qmix.errors import ModelFileError, UsageError
from qmix.tokenizer.files import TokenizerFiles, read_files
from qmix.tokenizer.message import ROLES, ChatFormat, Message
from qmix.tokenizer.mistral import MistralV1Format, is_mistral_v1
from qmix.tokenizer.plain import PlainFormat
from qmix.tokenizer.sandbox import Template
from qmix.tokenizer.stream import SILENT, Piece, StreamDecoder
from qmix.tokenizer.template import TemplateFormat
from qmix.tokenizer.vocabulary import Vocabulary

__all__ = ["ROLES", "Message", "StreamDecoder", "Tokenizer", "load"]


class Tokenizer:
    """bos_id: None where the model has none. eos_ids: every id that ends an answer, by the config files,
    the vocabulary and the chat template. vocab_size: ids of the tokenizer, at most the model's, whose
    further rows are padding. template_name: which chat format is used, to be told to the user;
    has_template: whether it is the model's own format, and not a transcript made up for a base model.
    turn_stops: stop strings that this format needs besides eos_ids."""

    def __init__(self, vocabulary: Vocabulary, chat: ChatFormat, eos_ids: Iterable[int], *, add_bos: bool,
                 rows: int | None = None):
        self._vocabulary = vocabulary
        self._chat = chat
        self._add_bos = add_bos
        self._rows = vocabulary.size if rows is None else rows
        self.bos_id = vocabulary.bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.vocab_size = vocabulary.size
        self.template_name = chat.name
        self.has_template = not isinstance(chat, PlainFormat)
        self.turn_stops = chat.turn_stops

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """ids of plain text; what spells a control token is text like any other. bos: with the start id in
        front, where the model has one and its config does not say `add_bos_token: false`."""
        first = [self.bos_id] if bos and self._add_bos and self.bos_id is not None else []
        return self._with_rows(first + self._vocabulary.encode_text(text))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """ids of a conversation, ending with the start of the next answer; never two BOS.

        UsageError where the last message is not the user's, or the template refuses the conversation."""
        return self._with_rows(self._chat.encode(messages))

    def _with_rows(self, ids: list[int]) -> list[int]:
        """ids, all of which the model has a row for; UsageError for a token that only the tokenizer knows."""
        if ids and max(ids) >= self._rows:
            raise UsageError(f"the text holds {self._vocabulary.token(max(ids))!r}, token {max(ids)}, for which the "
                             f"model has no row (it has {self._rows})", "write it differently")
        return ids

    def decoder(self, continuing: bool = False) -> StreamDecoder:
        """A decoder for one text. continuing: the text goes on from a prompt, so that the space in front
        of its first word belongs to it; an answer in a chat starts without it."""
        vocabulary = self._vocabulary
        return StreamDecoder(self._piece, per_byte=vocabulary.per_byte, drop_all=vocabulary.drop_all,
                             continuing=continuing)

    def decode(self, ids: Iterable[int], continuing: bool = False) -> str:
        """The text of ids; special tokens are silent, bytes that are no UTF-8 become U+FFFD."""
        decoder = self.decoder(continuing)
        return "".join(map(decoder.push, ids)) + decoder.finish()

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id, for tables and traces."""
        return self._vocabulary.token(token_id) if 0 <= token_id < self.vocab_size else ""

    def _piece(self, token_id: int) -> Piece:
        if 0 <= token_id < self.vocab_size:
            return self._vocabulary.piece(token_id)
        if 0 <= token_id < self._rows:
            return SILENT  # a padding row of the embedding, which no text stands behind
        raise UsageError(f"token id: got {token_id}, want 0 to {self._rows - 1}")


def load(folder: Path, vocab_size: int | None = None,
         now: Callable[[], datetime] = datetime.now) -> Tokenizer:
    """Read the tokenizer of a checkpoint or store. vocab_size: rows of the model's embedding, which bound
    the ids; now: the clock that a chat template may ask.

    ModelFileError names the file and the key at fault."""
    folder = Path(folder)
    files = read_files(folder)
    vocabulary = _vocabulary(files)
    if vocab_size is not None and not _fits(vocabulary, files, vocab_size):
        path = files.spm or files.json
        raise ModelFileError(
            f"{path}: the tokenizer has {vocabulary.size} ids, added tokens included; the model's "
            f"vocab_size is {vocab_size}", "fetch the tokenizer files that belong to this model")
    rows = vocab_size or vocabulary.size
    eos = [i for i in (*files.eos_ids, vocabulary.eos_id) if i is not None]
    if wrong := [i for i in eos if i >= rows]:
        raise ModelFileError(f"{folder}: eos_token_id: got {wrong[0]}, want less than {rows}",
                             "correct config.json or generation_config.json")
    chat = _chat_format(vocabulary, files, eos, now)
    if chat.turn_end is not None:
        eos.append(chat.turn_end)
    return Tokenizer(vocabulary, chat, eos, add_bos=files.add_bos, rows=vocab_size)


def _fits(vocabulary: Vocabulary, files: TokenizerFiles, rows: int) -> bool:
    """Whether the model has a row for all ids that a prompt needs. Fine-tuners add a padding token and leave the
    embedding as it was: added tokens may lie beyond, unless the template, BOS or EOS are among them."""
    for token_id in range(rows, vocabulary.size):
        text = vocabulary.token(token_id)
        if token_id in (vocabulary.bos_id, vocabulary.eos_id) or text in (files.template or "") \
                or (text not in files.added and text not in vocabulary.markers):
            return False
    return True


def _vocabulary(files: TokenizerFiles) -> Vocabulary:
    if files.spm is not None:
        from qmix.tokenizer.spm import SentencePieceVocabulary

        return SentencePieceVocabulary(files.spm, files)
    from qmix.tokenizer.hf import JsonVocabulary

    assert files.json is not None  # read_files found one of the two
    return JsonVocabulary(files.json, files)


def _chat_format(vocabulary: Vocabulary, files: TokenizerFiles, eos: Sequence[int],
                 now: Callable[[], datetime]) -> ChatFormat:
    if is_mistral_v1(vocabulary, files):
        return MistralV1Format(vocabulary, eos)
    if files.template is None:
        return PlainFormat(vocabulary, eos)
    assert files.template_file is not None
    named = dict(files.named)
    for name, token_id in (("bos_token", vocabulary.bos_id), ("eos_token", vocabulary.eos_id)):
        if token_id is not None:
            named.setdefault(name, vocabulary.token(token_id))
    return TemplateFormat(vocabulary, Template(files.template, files.template_file, now), named, eos)

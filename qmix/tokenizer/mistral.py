"""The chat format of Mixtral 8x7B Instruct, encoded segment by segment as Mistral does (tokenizer v1).

    <s> [INST] question [/INST] answer </s> [INST] question [/INST]

"[INST]" is plain text in this vocabulary. Each instruction and each answer is encoded alone, BOS
comes once, EOS after each answer; rendering the conversation to one string and encoding that gives
other ids. The system text is joined by a blank line to the first user message, and neighbours of the
same role are joined by a blank line. Nothing is trimmed. Source and oracle: mistral-common,
InstructTokenizerV1 and InstructRequestNormalizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from qmix.tokenizer.files import TokenizerFiles
from qmix.tokenizer.message import Message, check_conversation, without_end
from qmix.tokenizer.vocabulary import Segment, Splice, Vocabulary

PIECES = 32000
# SHA-256 of the vocabulary's pieces joined by newlines: the tokenizer that Mistral 7B v0.1 and v0.2 and
# Mixtral 8x7B share (their tokenizer.model has SHA-256 dadfd56d7667...). Llama 2 has 32000 others.
PIECES_SHA256 = "9667493c598ed599f14df3157cb9a6f373d49a1b2d99d98c79e937ff490d219b"


def is_mistral_v1(vocabulary: Vocabulary, files: TokenizerFiles) -> bool:
    """Whether conversations are Mistral's segments instead of the checkpoint's own template.

    The vocabulary must be Mistral's first one, piece by piece, and the template one of the
    "[INST]" kind (a fine-tune on this vocabulary may talk ChatML, or Llama 2's "<<SYS>>"). Without
    any template, only a folder with "instruct" in its name or in config.json's `_name_or_path` is
    taken for one: the base model has the same vocabulary.
    """
    if files.template is not None:
        if "[INST]" not in files.template or "<<SYS>>" in files.template:
            return False
    elif not any("instruct" in Path(name).name.lower() for name in files.names):
        return False
    if vocabulary.size < PIECES:
        return False
    pieces = "\n".join(vocabulary.token(i) for i in range(PIECES))
    return hashlib.sha256(pieces.encode("utf-8")).hexdigest() == PIECES_SHA256


class MistralV1Format:
    name = "Mistral v1 segments (built in, not the checkpoint's template)"
    turn_stops: tuple[str, ...] = ()

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int]):
        assert vocabulary.bos_id is not None and vocabulary.eos_id is not None  # pieces 1 and 2
        self._vocabulary = vocabulary
        self._bos, self._eos = vocabulary.bos_id, vocabulary.eos_id
        self._ends = tuple(eos_ids)

    @property
    def turn_end(self) -> int:
        return self._eos

    def encode(self, messages: Sequence[Message]) -> list[int]:
        check_conversation(messages)
        system = "\n\n".join(m.content for m in messages if m.role == "system" and m.content)
        segments: list[Segment] = [self._bos]
        turns = [(role, list(turn)) for role, turn in groupby(
            (m for m in messages if m.role != "system"), key=lambda m: m.role)]
        if turns[0][0] != "user":
            turns.insert(0, ("user", [Message("user", "")]))
        for i, (role, turn) in enumerate(turns):
            content = "\n\n".join(m.content for m in turn if m.content)
            if role == "user":
                lead = f"{system}\n\n" if i == 0 and system else ""
                segments.append(f"[INST] {lead}{content} [/INST]")
            elif len(turn) == 1 and turn[0].ids is not None:
                segments += [Splice(without_end(turn[0].ids, self._ends)), self._eos]
            else:
                segments += [content, self._eos]
        # Every text is a segment of its own, so an instruction after an answer keeps its space too.
        return [i for segment in segments for i in self._vocabulary.encode_segments([segment])]

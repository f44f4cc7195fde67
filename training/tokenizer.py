"""The tokenizer of the demo model: sentencepiece BPE with byte fallback, and the chat encoding.

The encoding of a conversation is fixed here, and the runtime of qmix uses the same: <s>, then for
each message the id of its role, the pieces of the stripped content (encoded alone) and </s>.
"""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

import sentencepiece
from corpus import Message, stream

ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(path: Path, seed: int, vocab_size: int, conversations: int) -> None:
    """Train on that many conversations and write a sentencepiece model to `path`."""
    texts = (m.content for chat in islice(stream(seed), conversations) for m in chat)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, model_type="bpe", vocab_size=vocab_size,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, split_digits=True,
        control_symbols=[f"<|{role}|>" for role in ROLES], character_coverage=0.9995,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        minloglevel=1,
    )
    path.write_bytes(model.getvalue())


def write_tokenizer_config(folder: Path) -> None:
    """Write what `transformers` needs to use the sentencepiece model of the folder."""
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "additional_special_tokens": [f"<|{role}|>" for role in ROLES],
        "clean_up_tokenization_spaces": False, "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class ChatEncoder:
    """Encodes conversations for training and for generation."""

    def __init__(self, model_path: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()
        self.roles = {role: self.pieces.piece_to_id(f"<|{role}|>") for role in ROLES}

    def encode(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """The token ids of a conversation, and for each whether the assistant wrote it."""
        ids, written = [self.bos], [False]
        for message in messages:
            content = self.pieces.encode(message.content.strip())
            ids += [self.roles[message.role], *content, self.eos]
            written += [False] + [message.role == "assistant"] * (len(content) + 1)
        return ids, written

    def prompt(self, messages: list[Message]) -> list[int]:
        """The ids after which the assistant's next answer begins."""
        return [*self.encode(messages)[0], self.roles["assistant"]]

    def decode(self, ids: list[int]) -> str:
        """The text of an answer, without its end mark."""
        return self.pieces.decode([i for i in ids if i != self.eos])

"""A sentencepiece vocabulary out of a GGUF file, as a tokenizer.model: a ModelProto in protobuf's wire format.

Of the many fields only those that decide ids are written (sentencepiece_model.proto): pieces with score and type; of
the trainer BPE, byte fallback and the ids with a role; of the normalizer none but the identity, the space in front of a
text and what becomes of further spaces.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from qmix.errors import ConfigError
from qmix.gguf.vocabulary import BYTE, UNKNOWN, Vocabulary

BPE = 2
# Fields, by their numbers in sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, VOCAB_SIZE, BYTE_FALLBACK, UNK_ID, BOS_ID, EOS_ID, PAD_ID = 3, 4, 35, 40, 41, 42, 43
UNK_PIECE, BOS_PIECE, EOS_PIECE = 45, 46, 47
NAME, DUMMY_PREFIX, EXTRA_SPACES = 1, 3, 4


def model_proto(vocabulary: Vocabulary, scores: Sequence[float], bos: int | None, eos: int | None, prefix_space: bool,
                remove_spaces: bool, where: str) -> bytes:
    """The bytes of a tokenizer.model. where: the key of the tokens' types."""
    unknown = [i for i, kind in enumerate(vocabulary.kinds) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise ConfigError(f"{where}: got {len(unknown)} unknown tokens (type {UNKNOWN}), want 1",
                          "give the model as safetensors with its own tokenizer.model")
    pieces = b"".join(
        _bytes(PIECES, _text(PIECE, text) + _float(SCORE, score) + _number(TYPE, kind))
        for text, score, kind in zip(vocabulary.texts, scores, vocabulary.kinds, strict=True))
    trainer = (_number(MODEL_TYPE, BPE) + _number(VOCAB_SIZE, len(vocabulary.texts))
               + _number(BYTE_FALLBACK, BYTE in vocabulary.kinds) + _text(UNK_PIECE, vocabulary.texts[unknown[0]])
               + _number(UNK_ID, unknown[0]) + _number(PAD_ID, -1))
    for token, id_field, piece_field in ((bos, BOS_ID, BOS_PIECE), (eos, EOS_ID, EOS_PIECE)):
        trainer += _number(id_field, -1 if token is None else token)
        trainer += b"" if token is None else _text(piece_field, vocabulary.texts[token])
    normalizer = _text(NAME, "identity") + _number(DUMMY_PREFIX, prefix_space) + _number(EXTRA_SPACES, remove_spaces)
    return pieces + _bytes(TRAINER, trainer) + _bytes(NORMALIZER, normalizer)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; a negative number as 64 bits."""
    value &= 2**64 - 1
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())

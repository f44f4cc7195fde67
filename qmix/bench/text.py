"""The text that is run. A token's experts depend on it, so random tokens would measure another model.

recorded.txt belongs to qmix: English prose on two subjects, Python, German, a letter, a list. Repetition i of a case
takes the i-th piece of it. So a warm cache has seen similar text but not this very piece, as in a conversation. If the
text ends, it starts again from its beginning, at another offset for every piece unless its length happens to be a
multiple of the piece's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qmix.errors import UsageError
from qmix.tokenizer import Tokenizer

RECORDED = Path(__file__).parent / "recorded.txt"


def recorded_text() -> str:
    return RECORDED.read_text(encoding="utf-8")


def encode(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(what every piece starts with: the BOS id where the tokenizer sets one, ids of the text without it)."""
    ids = tokenizer.encode(text, bos=True)
    plain = tokenizer.encode(text, bos=False)
    if not plain:
        raise UsageError("the text has no tokens", "name a longer one with -f")
    return ids[:len(ids) - len(plain)], plain


def piece(head: Sequence[int], ids: Sequence[int], number: int, length: int) -> list[int]:
    """`length` ids, `head` first, then the text from where piece number - 1 of that length ended.

    head [1], ids [5, 6, 7], length 3: number 0 -> [1, 5, 6], number 1 -> [1, 7, 5], number 2 -> [1, 6, 7]
    """
    head = list(head)[:length]
    body = length - len(head)
    return head + [ids[(number * body + i) % len(ids)] for i in range(body)]

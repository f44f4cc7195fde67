"""Cuts a text into windows, as Hugging Face's "Perplexity of fixed-length models" does for WikiText-2.

The text is tokenized once, as a whole, with the BOS token at its very start if the tokenizer sets one. Windows of
`window` ids begin every `stride` ids, and each is read from an empty context. A window scores the ids that no window
before it scored, but never its first id, which has no context. With stride = window every window of n ids thus scores
n - 1. With a smaller stride each id but the text's first is scored once, with at least window - stride ids before it.

    10 ids, window 4, stride 4:  [0 1 2 3] [4 5 6 7] [8 9]         scored 1 2 3, 5 6 7, 9
    10 ids, window 4, stride 2:  [0 1 2 3] [2 3 4 5] [4 5 6 7] ...  scored 1 2 3, 4 5, 6 7, ...
"""

from __future__ import annotations

from dataclasses import dataclass

from qmix.errors import UsageError


@dataclass(frozen=True, slots=True)
class Window:
    """ids[begin:end] are read, ids[first:end] scored; begin < first < end."""

    begin: int
    first: int
    end: int

    @property
    def scored(self) -> int:
        return self.end - self.first


def split_windows(ids: int, window: int, stride: int, most: int = -1) -> list[Window]:
    """The windows of a text of `ids` tokens, until `most` of them are scored, -1 = all; the last window may end early.

    UsageError where the numbers make no sense or nothing could be scored."""
    if window < 2:
        raise UsageError(f"--ctx-size {window}: a window has 2 tokens at least: one to read, one to predict")
    if not 1 <= stride <= window:
        raise UsageError(f"--stride {stride}: want 1 to {window}, the window",
                         "a larger one would skip tokens" if stride > window else None)
    if most == 0 or most < -1:
        raise UsageError(f"--max-tokens {most}: want -1 or at least 1")
    if ids < 2:
        raise UsageError(f"the text has {ids} token{'' if ids == 1 else 's'}: nothing to predict",
                         "name a longer one with -f")
    found: list[Window] = []
    done, left = 0, ids if most == -1 else most
    for begin in range(0, ids, stride):
        end = min(begin + window, ids)
        first = max(done, begin + 1)
        if first < end and left:
            found.append(Window(begin, first, min(end, first + left)))
            left -= found[-1].scored
        done = end
        if end == ids or not left:
            break
    return found

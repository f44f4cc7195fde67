"""Answers that a grammar allows (llguidance): JSON, JSON of a schema, Lark, regular expressions.

A Grammars is made once per model, a Grammar once per request, and each answer gets a GrammarConstraint of its own.

The first token of an answer may begin with a space that the decoder drops (sentencepiece). The grammar does not see
that space: such a token counts as the one without it. A model that may think first is let through until its reasoning
is closed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.serve.request import Format
from qmix.tokenizer import Tokenizer
from qmix.tokenizer.message import OPEN

LONGEST = 256 * 1024  # characters of a grammar or schema
OBJECT = '{"type": "object"}'


class Grammars:
    """For the vocabulary of one model. UsageError where llguidance is not installed, once a grammar is asked for."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def compile(self, wanted: Format) -> Grammar:
        """UsageError for what is no grammar, or one that is too large."""
        from llguidance import LLMatcher

        if len(wanted.text) > LONGEST:
            raise UsageError(f"the grammar has {len(wanted.text)} characters, want at most {LONGEST}")
        try:
            text = self._text(wanted)
            matcher = LLMatcher(self._vocabulary, text, log_level=0, limits=_limits())
        except (ValueError, RecursionError) as e:
            raise UsageError(f"the {_NAMES[wanted.kind]} cannot be used: {e!s:.300}") from None
        if matcher.is_error():
            raise UsageError(f"the {_NAMES[wanted.kind]} cannot be used: {_first_line(matcher.get_error())}")
        return Grammar(matcher, self._first, self._think)

    def _text(self, wanted: Format) -> str:
        from llguidance import LLMatcher

        if wanted.kind == "grammar":
            return LLMatcher.grammar_from_lark(wanted.text)
        if wanted.kind == "regex":
            return LLMatcher.grammar_from_regex(wanted.text)
        return LLMatcher.grammar_from_json_schema(wanted.text if wanted.kind == "schema" else OBJECT)

    @cached_property
    def _vocabulary(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer)), n_vocab=self._tokenizer.rows,
                           eos_token=list(self._tokenizer.eos_ids))

    @cached_property
    def _first(self) -> dict[int, int | None]:
        """The ids whose leading space is dropped at the start of an answer, with those that say the rest; None: it is
        empty. Those whose rest no id says are left out: they are not allowed there."""
        pieces = [self._tokenizer.piece(i) for i in range(self._tokenizer.rows)]
        by_text = {piece.data: i for i, piece in reversed(list(enumerate(pieces))) if piece.data and not piece.space}
        found: dict[int, int | None] = {}
        for i, piece in enumerate(pieces):
            if piece.space and (piece.data == b" " or piece.data[1:] in by_text):
                found[i] = by_text.get(piece.data[1:])
        return found

    @cached_property
    def _think(self) -> int | None:
        """The id that opens the reasoning, where one alone does."""
        if not self._tokenizer.thinking_switch or self._tokenizer.headers:
            return None
        return self._tokenizer.marker(OPEN)


_NAMES = {"object": "JSON format", "schema": "JSON schema", "grammar": "grammar", "regex": "regular expression"}


@dataclass(frozen=True, slots=True)
class Grammar:
    """Of one request. matcher: llguidance's, at its start; first, think: see Grammars."""

    matcher: Any
    first: dict[int, int | None]
    think: int | None

    def constraint(self) -> GrammarConstraint:
        """For one answer."""
        return GrammarConstraint(self.matcher.deep_copy(), self.first, self.think)


class GrammarConstraint:
    """A sampling.Constraint. It lets everything through until begin(); matcher: llguidance's, for this answer alone."""

    def __init__(self, matcher: Any, first: dict[int, int | None], think: int | None):
        self._matcher = matcher
        self._space = first
        self._think = think
        self._begun = False
        self._fresh = True  # no token of the answer came yet

    def begin(self) -> None:
        """What comes next is the answer."""
        self._begun = True

    @property
    def done(self) -> bool:
        return self._begun and not self._fresh and self._matcher.is_stopped()

    def allowed(self) -> Tensor | None:
        if not self._begun:
            return None
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        found = ((bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()
        self._check()
        if self._fresh:
            plain = found.clone()
            for token, rest in self._space.items():
                found[token] = rest is None or bool(plain[rest])
            if self._think is not None:
                found[self._think] = True
        return found

    def push(self, token_id: int) -> None:
        if not self._begun:
            return
        if self._fresh and token_id == self._think:
            self._begun, self._think = False, None
            return
        said = self._space.get(token_id) if self._fresh and token_id in self._space else token_id
        self._fresh = False
        if said is not None:
            self._matcher.consume_token(said)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"the grammar could not be followed: {_first_line(self._matcher.get_error())}",
                             "make it simpler")


class _Vocabulary:
    """As llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer):
        pieces = [tokenizer.piece(i).data for i in range(tokenizer.rows)]
        self.eos_token_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
        self.bos_token_id = tokenizer.bos_id
        # The marks that give an answer its parts have a text, but are no part of what a grammar describes.
        silent = {i for i, data in enumerate(pieces) if not data} | set(tokenizer.headers)
        self.tokens = [b"" if i in silent else data for i, data in enumerate(pieces)]
        self.special_token_ids = sorted(silent)
        self._encode: Callable[[str], list[int]] = tokenizer.encode_more

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits()


def _first_line(error: str) -> str:
    """What llguidance says first; its state follows."""
    return error.strip().partition("\n")[0][:300]

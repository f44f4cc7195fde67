"""Which sampled tokens say an answer's text: those of its reasoning, of headers and marks, and of a stop string are
left out of its log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qmix.generate import Token
from qmix.serve.events import TokenLog
from qmix.tokenizer import StreamDecoder, Tokenizer
from qmix.tokenizer.parts import Span


@dataclass(slots=True)
class TokenLogs:
    """push() each token, then take() those that say what has been said. decoder: of the answer, as generate has it."""

    tokenizer: Tokenizer
    decoder: StreamDecoder
    _decoded: int = 0  # characters
    _waiting: list[tuple[int, int, TokenLog]] = field(default_factory=list)  # the characters from, to

    def push(self, token: Token) -> None:
        if token.id is None or token.logprob is None:
            return
        begin = self._decoded
        self._decoded += len(self.decoder.push(token.id))
        if token.id not in self.tokenizer.eos_ids:
            # A token without a text of its own yet (part of a character) belongs to the character that comes next.
            self._waiting.append((begin, max(self._decoded, begin + 1), TokenLog(
                self.tokenizer.piece(token.id).data, token.logprob, tuple(
                    (self.tokenizer.piece(token_id).data, value) for token_id, value in token.likeliest), begin)))

    def take(self, spans: Sequence[Span], said: int) -> tuple[TokenLog, ...]:
        """Those of tokens within the first `said` characters that say something of the answer, which stands in `spans`.
        None of them where `spans` is empty: no run of characters is known to be the answer."""
        found = tuple(log for begin, end, log in self._waiting if begin < said and any(
            first < end and (last is None or begin < last) for first, last in spans))
        # What stands behind the last span may still become part of the answer.
        known = said if not spans or spans[-1][1] is None else min(said, spans[-1][1])
        self._waiting = [one for one in self._waiting if one[0] >= known]
        return found

    def clear(self) -> None:
        self._waiting.clear()

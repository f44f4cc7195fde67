"""What was said: an immutable list of exchanges, and how it becomes token ids.

An exchange is a question and its answer. A conversation grows and shrinks only by whole exchanges, so it is consistent
at every moment. An answer carries the ids that the model generated, and the next turn is encoded with these. Encoding
the answer's text again could give other ids, and then nothing of the KV cache would match. What the model thought
before an answer is kept apart from it: whether it stands in the next prompt is the chat template's decision. The tools
that an answer calls are kept too, and the template shows them to the model again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qmix.errors import QmixError, UsageError
from qmix.tokenizer import Call, Message, Request, Tokenizer, ToolCall


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer. ids: the answer's own token ids, without the end token; None where
    they are not known, then the text is encoded. reasoning: what the model thought before, None for nothing. calls:
    tools that the answer calls, as the model wrote them."""

    question: str
    answer: str
    ids: tuple[int, ...] | None = None
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls, as a template shows them again; none where the arguments of one are no JSON object: the model
        would see that it called some of the tools that it called."""
        found = [(call.name, _object(call.arguments)) for call in self.calls]
        shown = tuple(ToolCall(name, arguments) for name, arguments in found if arguments is not None)
        return shown if len(shown) == len(found) else ()

    @property
    def message(self) -> Message:
        """The answer. Beside calls it is encoded from its text: the template joins the two."""
        calls = self.tool_calls
        return Message("assistant", self.answer, None if calls else self.ids, self.reasoning, calls)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Exchanges with one model, oldest first, below an optional system prompt."""

    model: str
    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()

    def __len__(self) -> int:
        return len(self.exchanges)

    def plus(self, exchange: Exchange) -> Conversation:
        return replace(self, exchanges=(*self.exchanges, exchange))

    def undone(self) -> Conversation:
        """Without the last exchange; itself where there is none."""
        return replace(self, exchanges=self.exchanges[:-1])

    def messages(self, question: str | None = None) -> list[Message]:
        """As the tokenizer takes them, with a new question at the end if there is one."""
        said = [Message("system", self.system)] if self.system else []
        for exchange in self.exchanges:
            said += [Message("user", exchange.question), exchange.message]
        return said if question is None else [*said, Message("user", question)]

    def tokens(self, tokenizer: Tokenizer) -> int:
        """Positions taken at the end of the last answer, its reasoning aside; 0 for an empty conversation."""
        if not self.exchanges:
            return 0
        last = self.exchanges[-1]
        ids = tokenizer.encode(last.answer, bos=False) if last.ids is None else last.ids
        return len(tokenizer.encode_chat(self.undone().messages(last.question))) + len(ids)


def _object(text: str) -> dict[str, object] | None:
    """A JSON object, None where the text is none."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # "\\ud800" is JSON, but no text
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def adopted(conversation: Conversation, model: str, tokenizer: Tokenizer) -> tuple[Conversation, int]:
    """A saved conversation made this model's own, and how many answers will be encoded from their text:
    all of another model's, and those whose ids do not say their text (another vocabulary under the same
    name). Calls stay only where the model is the same and its template takes them: some refuse calls without
    results."""
    kept = []
    for exchange in conversation.exchanges:
        same = conversation.model == model and exchange.ids is not None and \
            says(exchange.ids, exchange.answer, tokenizer)
        calls = exchange.calls if conversation.model == model and tokenizer.takes_tools else ()
        kept.append(replace(exchange, ids=exchange.ids if same else None, calls=calls))
    lost = sum(e.ids is None for e in kept)
    own = replace(conversation, model=model, exchanges=tuple(kept))
    without = replace(own, exchanges=tuple(replace(e, calls=()) for e in kept))
    return without if refuses_calls(own, without, tokenizer) else own, lost


def refuses_calls(conversation: Conversation, without: Conversation, tokenizer: Tokenizer,
                  request: Request | None = None) -> bool:
    """Whether the chat format takes no further question after `conversation`, but takes one after the same without
    some calls: those would be in the way of every question to come."""
    return conversation != without and not _takes(conversation, tokenizer, request) and _takes(
        without, tokenizer, request)


def _takes(conversation: Conversation, tokenizer: Tokenizer, request: Request | None) -> bool:
    try:
        tokenizer.prompt(conversation.messages("-"), request=request)
    except QmixError:
        return False
    return True


def says(ids: Sequence[int], text: str, tokenizer: Tokenizer) -> bool:
    """Whether `ids` are this vocabulary's and decode to `text`."""
    try:
        return spoken_ids(ids, text, tokenizer) == tuple(ids)
    except UsageError:  # an id that the model does not have
        return False


def spoken_ids(ids: Sequence[int], text: str, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """The ids of an answer whose marked text is `text`: without end tokens, a stop string, or half a
    character after it. None where no run of them says exactly `text` (a stop string began inside a token).

    ids of "Hi", "!", "\\n", "User", ":"; text "Hi!"  ->  ids of "Hi", "!"
    """
    decoder, so_far = tokenizer.decoder(marked=True), ""
    if text == "":
        return ()
    for count, token in enumerate(ids, 1):
        so_far += decoder.push(token)
        if so_far == text:
            return tuple(ids[:count])
        if len(so_far) > len(text):
            return None
    # The last token ended in half a character, which became U+FFFD when the answer ended.
    return tuple(ids) if so_far + decoder.finish() == text else None

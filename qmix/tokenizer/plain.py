"""A plain transcript for base models, which have no chat template:

    <system text>

    User: <question>
    Assistant: <answer>
    User: <question>
    Assistant:

The text is encoded as one, with the ids of earlier answers spliced in; "\\nUser:" ends an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from qmix.tokenizer.message import Message, Prompt, Request, check_conversation, without_end
from qmix.tokenizer.vocabulary import Segment, Splice, Vocabulary

LABELS = {"user": "User:", "assistant": "Assistant:"}


class PlainFormat:
    name = "plain transcript (the model has no chat template)"
    turn_stops = ("\nUser:", "\nAssistant:")
    turn_end = None
    takes_tools = thinking_switch = takes_effort = False

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int]):
        self._vocabulary = vocabulary
        self._eos_ids = tuple(eos_ids)

    def encode(self, messages: Sequence[Message], limit: int | None = None, request: Request | None = None) -> Prompt:
        check_conversation(messages)
        self._vocabulary.check_length((message.content for message in messages), limit)
        segments: list[Segment] = []
        text = ""
        for message in messages:
            if message.role == "system":
                text += f"{message.content.strip()}\n\n"
            elif message.ids is None:
                text += f"{LABELS[message.role]} {message.content.strip()}\n"
            else:
                # No space after the label: the first generated piece brings its own.
                segments += [text + LABELS["assistant"], Splice(without_end(message.ids, self._eos_ids))]
                text = "\n"
        ids = self._vocabulary.encode_segments([*segments, text + LABELS["assistant"]])
        return Prompt([*self._vocabulary.head, *ids])

"""What can be wrong with a request is found here, before it waits in the queue and before an answer has begun: the
prompts are encoded, and the grammar is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qmix.errors import ModelFileError, PromptTooLong, UsageError
from qmix.serve.grammar import Grammar, Grammars
from qmix.serve.remembered import Remembered
from qmix.serve.request import Format, Generation, Text
from qmix.tokenizer import Message, Prompt, Tokenizer
from qmix.tokenizer.allowance import TooMuch


@dataclass(frozen=True, slots=True)
class Prepared:
    """A Generation with its prompts, all of which fit the context. raw: they are texts to be continued."""

    generation: Generation
    prompts: tuple[Prompt, ...]
    raw: bool
    grammar: Grammar | None = None


class Preparation:
    """For one model. exact: prompts depend on the request alone, so the ids of earlier answers are not taken."""

    def __init__(self, tokenizer: Tokenizer, context: int, remembered: Remembered, exact: bool):
        self.tokenizer = tokenizer
        self.context = context
        self._remembered = remembered
        self._exact = exact
        self._grammars = Grammars(tokenizer)

    def prepare(self, generation: Generation) -> Prepared:
        """PromptTooLong, or another UsageError that says what the model or its chat format does not take."""
        rows = self.tokenizer.rows
        if (wrong := next((i for i, _ in generation.params.logit_bias if i >= rows), None)) is not None:
            raise UsageError(f"logit_bias: token id {wrong}: want 0 to {rows - 1}")
        grammar = self._grammar(generation)
        if generation.texts:
            return Prepared(generation, tuple(map(self._text, generation.texts)), True, grammar)
        return Prepared(generation, (self._fitting(self._prompt(generation, self.context)),), False, grammar)

    def count(self, generation: Generation) -> int:
        """Tokens of a conversation as a prompt, whether they fit or not."""
        return len(self._prompt(generation, None).ids)

    def _prompt(self, generation: Generation, limit: int | None) -> Prompt:
        messages = list(generation.messages)
        if not self._exact:
            messages = self._remembered.recall(messages)
        try:
            return self.tokenizer.prompt(messages, limit, replace(generation.asked, tools=generation.tools))
        except ModelFileError as e:
            if isinstance(e.__context__, TooMuch):
                raise self._too_much(messages, e.__context__, limit) from None
            if not generation.tools and not any(message.tool_calls for message in messages):
                raise
            # Templates walk through schemas and arguments, and few are ready for any JSON there.
            raise UsageError("tools: the model's chat template cannot show these tools or calls",
                             "give plain JSON schemas: properties an object of objects, required a list") from None

    def _too_much(self, messages: Sequence[Message], why: TooMuch, limit: int | None) -> PromptTooLong:
        """What a client must shorten, although nobody knows how many tokens it has: the template did not come to an
        end. Where the messages alone have more than the context holds, the numbers say so."""
        try:
            self.tokenizer.check_length([message.content for message in messages], limit)
        except PromptTooLong as e:
            return e
        return PromptTooLong(f"the conversation is too long for the model's chat template, which {why}",
                             "shorten it, or leave out tools")

    def _text(self, text: Text) -> Prompt:
        if isinstance(text, str):
            return self._fitting(Prompt(self.tokenizer.encode(text, limit=self.context)))
        if wrong := next((i for i in text if not 0 <= i < self.tokenizer.rows), None):
            raise UsageError(f"prompt: token id {wrong}: want 0 to {self.tokenizer.rows - 1}")
        return self._fitting(Prompt(list(text)))

    def _fitting(self, prompt: Prompt) -> Prompt:
        if not prompt.ids:
            raise UsageError("the prompt is empty", "give at least one token of text")
        if len(prompt.ids) > self.context:
            raise PromptTooLong(f"the prompt has {len(prompt.ids)} tokens, the context holds {self.context}",
                                "shorten it, or start the server with a larger --ctx-size")
        return prompt

    def _grammar(self, generation: Generation) -> Grammar | None:
        choice = generation.tool_choice
        if choice == "required" or choice.startswith("tool:"):
            if generation.format is not None:
                raise UsageError("tool_choice and response_format both say what the answer must be", "give one of them")
            name = choice.removeprefix("tool:") if choice != "required" else None
            return self._grammars.compile(Format("grammar", self.tokenizer.call_grammar(
                generation.asked.tools, name, generation.parallel)))
        return None if generation.format is None else self._grammars.compile(generation.format)

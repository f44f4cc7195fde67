"""One request, as every API maps to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qmix.config import SamplingParams
from qmix.tokenizer import Message, Request

Text = str | tuple[int, ...]  # to be continued: a text, or its ids


@dataclass(frozen=True, slots=True)
class Format:
    """What the answer must be. kind "object": any JSON object; "schema": JSON of that JSON schema; "grammar": a text of
    that grammar in llguidance's dialect of Lark; "regex"."""

    kind: Literal["object", "schema", "grammar", "regex"]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """messages: a conversation to answer, or texts: to continue each of them; the other is empty.

    asked: tools, and how much to reason. choices: answers to each prompt, with seeds that count up from params.seed.
    top_logprobs: None for no log probabilities, else how many of the likeliest tokens each has beside it. tool_choice:
    "auto", "none" (no tools are shown), "required", or a tool's name after "tool:"; parallel: whether an answer may
    call more than one.
    """

    messages: tuple[Message, ...] = ()
    texts: tuple[Text, ...] = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    asked: Request = field(default_factory=Request)
    choices: int = 1
    top_logprobs: int | None = None
    format: Format | None = None
    tool_choice: str = "auto"
    parallel: bool = True

    @property
    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """Those that the model is shown."""
        return () if self.tool_choice == "none" else self.asked.tools


def overridden(defaults: SamplingParams, **values: Any) -> SamplingParams:
    """The server's sampling, with what a request says of it; None: nothing. A top_p of 0 is greedy, as in OpenAI's API;
    a negative top_k is off. ConfigError names what is out of range."""
    if values.get("top_p") == 0:
        values |= {"top_p": None, "temperature": 0.0}
    if values.get("top_k") is not None:
        values["top_k"] = max(0, values["top_k"])
    if values.get("seed") is not None:
        values["seed"] %= 2**63
    if values.get("stop") is not None:
        stops = [values["stop"]] if isinstance(values["stop"], str) else values["stop"]
        values["stop"] = tuple(stop for stop in stops if stop)
    return replace(defaults, **{name: value for name, value in values.items() if value is not None})

"""docs/serve.md names every key that a schema takes, in the section of its API, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from qmix.serve.anthropic import schema as anthropic
from qmix.serve.ollama import schema as ollama
from qmix.serve.openai import responses_schema as responses
from qmix.serve.openai import schema as openai

PAGE = (Path(__file__).parents[1] / "docs" / "serve.md").read_text()
# Values, routes and kinds of parts that stand in code too.
WORDS = {"input", "x-qmix-left-out", ":latest", "cache_read_input_tokens", "/api/tags", "/api/ps", "/api/show",
         "/api/version", "/api/chat", "/api/generate", "context_length_exceeded"}
REFUSED = {"functions", "modalities", "prediction", "web_search_options"}


def section(title: str) -> str:
    return re.split(r"^#{2,3} ", PAGE.split(f"### {title}\n")[1], flags=re.M)[0]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def keys(*schemas: type[BaseModel]) -> set[str]:
    return {field.alias or name for schema in schemas for name, field in schema.model_fields.items()}


@pytest.mark.parametrize(("title", "schemas", "besides"), [
    ("OpenAI chat completions", (
        openai.ChatRequest, openai.ChatMessage, openai.TemplateArguments, openai.StreamOptions), {
            "name", "description", "strict", "cache_control"} | REFUSED),
    ("OpenAI responses", (responses.ResponsesRequest,), {
        "effort", "format", "summary", "generate_summary", "verbosity"} | WORDS),
    ("Anthropic messages and count_tokens", (anthropic.MessagesRequest, anthropic.AnthropicTool), {
        "effort", "format", "budget_tokens", "display", "disable_parallel_tool_use", "citations", "signature"} | WORDS),
    ("ollama", (ollama.OllamaChat, ollama.OllamaGenerate, ollama.Options), {"options", *WORDS}),
])
def test_each_key_is_in_the_table_of_its_api(title: str, schemas: tuple[type[BaseModel], ...],
                                             besides: set[str]) -> None:
    text = named(section(title))
    own = {"name", "type", "description", "input_schema"}  # a tool's own keys, which no table needs
    assert keys(*schemas) - text - own == set(), "keys that the page lacks"
    assert text - keys(*schemas) - besides == set(), "keys that no schema has"


def test_completions_are_named_too() -> None:
    text = named(section("OpenAI completions"))
    assert keys(openai.CompletionRequest) - keys(openai.Sampling, openai.Ignored) - text == set()


@pytest.mark.parametrize("key", sorted(REFUSED | {"audio"}))
def test_what_is_said_to_be_refused_is_no_key(key: str) -> None:
    assert key not in keys(openai.ChatRequest) and key in named(section("OpenAI chat completions"))

"""A folder with a tokenizer of GLM-4.5's kind: the published special tokens, pre-tokenizer, flags and features, over a
vocabulary that is trained here, with a template in words of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizer_families import CORPUS, LLAMA3

# In the order of their ids, from 151329 on in the published vocabulary.
SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>")
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>",
         "</arg_key>", "<arg_value>", "</arg_value>")
QUIET = "/nothink"  # the last token, declared special
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
PADDING = 191  # rows of the embedding beyond the tokenizer's ids

TEMPLATE = """[gMASK]<sop>
{%- if tools -%}
<|system|>
# Functions

These functions may be called:
<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>

A call is written like this:
<tool_call>NAME
<arg_key>ARGUMENT</arg_key>
<arg_value>VALUE</arg_value>
</tool_call>
{%- endif -%}
{%- macro words(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- else -%}
        {%- for part in content or [] if part is mapping and part.type == 'text' -%}{{- part.text }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set asked = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set asked.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' -%}
<|user|>
{{ words(message.content) }}
        {{- '/nothink' if enable_thinking is defined and not enable_thinking
            and not words(message.content).endswith('/nothink') else '' -}}
    {%- elif message.role == 'assistant' -%}
<|assistant|>
        {%- set thoughts, said = '', words(message.content) %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set thoughts = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > asked.last and thoughts -%}
            {{ '\\n<think>' + thoughts.strip() + '</think>' }}
        {%- else -%}
            {{ '\\n<think></think>' }}
        {%- endif -%}
        {%- if said.strip() -%}{{ '\\n' + said.strip() }}{%- endif -%}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>' + call.name + '\\n' }}
            {%- for key, value in call.arguments.items() %}
                {{- '<arg_key>' ~ key ~ '</arg_key>\\n<arg_value>' }}
                {{- value if value is string else value | tojson(ensure_ascii=False) }}
                {{- '</arg_value>\\n' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + words(message.content) + '\\n</tool_response>' }}
    {%- elif message.role == 'system' -%}
<|system|>
{{ words(message.content) }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{- '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' -}}
{%- endif -%}
"""


def glm(path: Path, template: str = TEMPLATE, head: bool = False, quiet_special: bool = True, **config: Any) -> Path:
    """A folder as Zhipu publishes it: no BOS, three ids that end an answer. head: the post-processor puts the prefix of
    the template in front of a plain text too, as in the tokenizers of older GLMs."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    add = tokenizer.add_special_tokens if quiet_special else tokenizer.add_tokens
    add([AddedToken(QUIET, special=quiet_special, normalized=False)])
    ids = {text: tokenizer.token_to_id(text) for text in (*SPECIAL, *PLAIN, QUIET)}
    byte_level = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    tokenizer.post_processor = byte_level if not head else processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B",
        special_tokens=[(text, ids[text]) for text in ("[gMASK]", "<sop>")])
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {str(i): {flag: getattr(token, flag) for flag in flags}
             for i, token in tokenizer.get_added_tokens_decoder().items()}
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": added, "additional_special_tokens": list(SPECIAL),
        "clean_up_tokenization_spaces": False, "do_lower_case": False, "eos_token": "<|endoftext|>",
        "extra_special_tokens": {}, "model_max_length": 128000, "pad_token": "<|endoftext|>", "padding_side": "left",
        "remove_space": False, "tokenizer_class": "PreTrainedTokenizerFast", **config}))
    (path / "chat_template.jinja").write_text(template)
    (path / "config.json").write_text(json.dumps({
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "pad_token_id": ids["<|endoftext|>"],
        "vocab_size": tokenizer.get_vocab_size() + PADDING, "eos_token_id": [ids[text] for text in STOPS]}))
    (path / "generation_config.json").write_text(json.dumps({
        "_from_model_config": True, "do_sample": True, "eos_token_id": [ids[text] for text in STOPS],
        "pad_token_id": ids["<|endoftext|>"]}))
    return path

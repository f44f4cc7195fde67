"""A folder with a tokenizer of gpt-oss's kind: the published special tokens, pre-tokenizer, flags and features, over a
vocabulary that is trained here, with a template in words of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizer_families import CORPUS

# Words of one script's case, with what English puts behind them; numbers of three digits; the rest as GPT-4's.
_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = "|".join((
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_TAIL}", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_TAIL}",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"))
# In the order of their ids, from 199998 on in the published vocabulary.
SPECIAL = (
    "<|startoftext|>", "<|endoftext|>", "<|reserved_200000|>", "<|reserved_200001|>", "<|return|>", "<|constrain|>",
    "<|reserved_200004|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|reserved_200009|>",
    "<|reserved_200010|>", "<|reserved_200011|>", "<|call|>", "<|endofprompt|>")
PADDING = 1069  # rows of the embedding beyond the tokenizer's ids: 201088 - 200019

TEMPLATE = """
{#- knows reasoning_effort and model_identity -#}
{%- macro kind(spec, depth=0) -%}
    {%- if depth > 3 -%}{{- "any" -}}
    {%- elif spec.type == "array" -%}
        {%- if "items" in spec -%}{{- kind(spec["items"], depth + 1) + "[]" -}}{%- else -%}{{- "any[]" -}}{%- endif -%}
    {%- elif spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") -}}
    {%- elif spec.enum -%}
        {{- '"' + spec.enum | join('" | "') + '"' -}}
    {%- elif spec.type == "object" and spec.properties -%}
        {{- "{\\n" -}}
        {%- for name, inner in spec.properties.items() -%}
            {{- name -}}{{- "" if name in (spec.required or []) else "?" -}}{{- ": " -}}
            {{ kind(inner, depth + 1) }}{{- "" if loop.last else ", " -}}
        {%- endfor -%}
        {{- "}" -}}
    {%- else -%}
        {{- {"integer": "number"}.get(spec.type, spec.type or "any") -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro functions(tools) -%}
    {{- "## functions\\n\\nnamespace functions {\\n\\n" }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- "// " + (tool.description or "") + "\\ntype " + tool.name + " = " }}
        {%- if not (tool.parameters and tool.parameters.properties) %}
            {{- "() => any;\\n\\n" }}
            {%- continue %}
        {%- endif %}
        {{- "(_: {\\n" }}
        {%- for name, spec in tool.parameters.properties.items() %}
            {%- if spec.description %}{{- "// " + spec.description + "\\n" }}{%- endif %}
            {{- name + ("" if name in (tool.parameters.required or []) else "?") + ": " + kind(spec) + "," }}
            {%- if spec.default is defined %}
                {{- " // default: " + (spec.default if spec.enum else spec.default | tojson) }}
            {%- endif %}
            {{- "\\n" }}
        {%- endfor %}
        {{- "}) => any;\\n\\n" }}
    {%- endfor %}
    {{- "} // namespace functions" }}
{%- endmacro -%}
{%- macro head() -%}
    {%- if model_identity is not defined %}{%- set model_identity = "You are a test." %}{%- endif %}
    {{- model_identity + "\\nCurrent date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
    {{- "Reasoning: " + reasoning_effort + "\\n\\n# Valid channels: analysis, commentary, final." }}
    {%- if tools %}{{- "\\nCalls go to the commentary channel: 'functions'." }}{%- endif %}
{%- endmacro -%}
{{- "<|start|>system<|message|>" + head() + "<|end|>" }}
{%- if messages[0].role in ["system", "developer"] %}
    {%- set told, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set told, turns = "", messages %}
{%- endif %}
{%- if told or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if told %}{{- "# Instructions\\n\\n" + told + "\\n\\n" }}{%- endif %}
    {%- if tools %}{{- "# Tools\\n\\n" + functions(tools) }}{%- endif %}
    {{- "<|end|>" }}
{%- endif %}
{%- set called = namespace(name=none) %}
{%- for message in turns %}
    {%- if message.role == "assistant" %}
        {%- for key in ("content", "thinking") if "<|channel|>" in (message[key] or "") %}
            {{- raise_exception("a channel in the text of an answer") }}
        {%- endfor %}
        {%- if "tool_calls" in message %}
            {%- set later = namespace(answered=false) %}
            {%- for other in turns[loop.index:] %}
                {%- if other.role == "assistant" and "tool_calls" not in other %}
                    {%- set later.answered = true %}
                    {%- break %}
                {%- endif %}
            {%- endfor %}
            {%- set call = message.tool_calls[0].function %}
            {%- if message.thinking and not later.answered %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {%- if message.content %}
                {{- "<|start|>assistant<|channel|>commentary<|message|>" + message.content + "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary <|constrain|>json<|message|>" }}
            {{- call.arguments | tojson + "<|call|>" }}
            {%- set called.name = call.name %}
        {%- else %}
            {%- generation %}
            {%- set last = loop.last and not add_generation_prompt %}
            {%- if last and message.thinking is defined %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
            {{- "<|return|>" if last else "<|end|>" }}
            {%- endgeneration %}
            {%- set called.name = none %}
        {%- endif %}
    {%- elif message.role == "tool" %}
        {%- if called.name is none %}{{- raise_exception("a result without its call") }}{%- endif %}
        {{- "<|start|>functions." + called.name + " to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson + "<|end|>" }}
    {%- elif message.role == "user" %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""


def harmony(path: Path, template: str | None = TEMPLATE, **config: Any) -> Path:
    """A folder as OpenAI publishes gpt-oss: the template in a file of its own, three ids that end an answer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(O200K), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    ids = {text: tokenizer.token_to_id(text) for text in SPECIAL}
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {str(i): {flag: getattr(token, flag) for flag in flags}
             for i, token in tokenizer.get_added_tokens_decoder().items()}
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": added, "bos_token": "<|startoftext|>", "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>", "extra_special_tokens": {}, "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656, "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast", **config}))
    (path / "special_tokens_map.json").write_text(json.dumps({
        "bos_token": {"content": "<|startoftext|>"}, "eos_token": {"content": "<|return|>"},
        "pad_token": {"content": "<|endoftext|>"}}))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    (path / "config.json").write_text(json.dumps({
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size() + PADDING, "eos_token_id": ids["<|return|>"],
        "pad_token_id": ids["<|endoftext|>"]}))
    (path / "generation_config.json").write_text(json.dumps({
        "bos_token_id": ids["<|startoftext|>"], "do_sample": True, "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]]}))
    return path

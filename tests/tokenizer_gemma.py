"""A folder with a tokenizer of Gemma 4's kind: the published control tokens, flags and features, over a vocabulary that
is trained here, with a template in words of our own that writes what the published one writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizer_families import pieces

# In the order of their ids in the published vocabulary.
FIRST = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
CONTROL = ("<|think|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
           '<|"|>', "<|channel>", "<channel|>", "<|turn>", "<turn|>", "<|image|>", "<|audio|>")
STOPS = ("<eos>", "<turn|>", "<|tool_response>")
PADDING = 64  # rows of the embedding beyond the tokenizer's ids

VALUES = """
{%- macro value(x, quoted=true) -%}
    {%- if x is none -%}null
    {%- elif x is string -%}<|"|>{{ x }}<|"|>
    {%- elif x is boolean -%}{{ 'true' if x else 'false' }}
    {%- elif x is mapping -%}
        {{- '{' }}
        {%- for name, inner in x | dictsort -%}
            {{- ',' if not loop.first }}
            {{- '<|"|>' + name + '<|"|>' if quoted else name }}:{{ value(inner, quoted) }}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif x is sequence -%}
        [{%- for inner in x -%}{{ ',' if not loop.first }}{{ value(inner, quoted) }}{%- endfor -%}]
    {%- else -%}{{ x }}
    {%- endif -%}
{%- endmacro -%}
{%- macro fields(x) -%}
    {{- '{' }}{%- for name, inner in x | dictsort -%}
        {{- ',' if not loop.first }}{{ name }}:{{ value(inner, false) }}
    {%- endfor -%}{{ '}' -}}
{%- endmacro -%}
{%- macro schema(properties) -%}
    {%- for name, one in properties | dictsort -%}
        {{- ',' if not loop.first }}{{ name }}:{
        {%- if one.description -%}description:{{ value(one.description) }},{%- endif -%}
        {%- if one.enum -%}enum:{{ value(one.enum) }},{%- endif -%}
        {%- if one['items'] is mapping and one['items'].type is string -%}
            items:{type:{{ value(one['items'].type | upper) }}},
        {%- endif -%}
        type:{{ value(one.type | upper if one.type is string else one.type | map('upper') | list) }}}
    {%- endfor -%}
{%- endmacro -%}
{%- macro tool_text(tool) -%}
    {%- set f = tool.function or tool -%}
    declaration:{{ f.name }}{description:{{ value(f.description or '') }}
    {%- if f.parameters -%}
        ,parameters:{properties:{ {{- schema(f.parameters.properties or {}) -}} }
        {%- if f.parameters.required -%},required:{{ value(f.parameters.required) }}{%- endif -%}
        ,type:{{ value(f.parameters.type | upper) }}}
    {%- endif -%}
    }
{%- endmacro -%}
{%- macro without_channels(text) -%}
    {%- set kept = namespace(text='') -%}
    {%- for piece in text.split('<channel|>') -%}
        {%- set kept.text = kept.text + (piece.split('<|channel>')[0] if '<|channel>' in piece else piece) -%}
    {%- endfor -%}
    {{- kept.text | trim -}}
{%- endmacro -%}
"""
TURNS = """
{{- bos_token }}
{%- set rest = messages %}
{%- set first = messages[0] if messages and messages[0].role in ('system', 'developer') else none %}
{%- if first or tools or enable_thinking | default(false) %}
    {{- '<|turn>system\\n' }}
    {{- '<|think|>\\n' if enable_thinking | default(false) }}
    {%- if first %}{{- first.content | trim }}{%- set rest = messages[1:] %}{%- endif %}
    {%- for tool in tools or [] %}{{- '<|tool>' }}{{ tool_text(tool) | trim }}{{ '<tool|>' }}{%- endfor %}
    {{- '<turn|>\\n' }}
{%- endif %}
{%- set asked = namespace(last=-1) %}
{%- for message in rest %}{%- if message.role == 'user' %}{%- set asked.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- set was = namespace(role=none, kind=none) %}
{%- for message in rest if message.role != 'tool' %}
    {%- set was.kind = none %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {%- set at = rest.index(message) %}
    {{- '<|turn>' + role + '\\n' if not (role == 'model' and was.role == 'model') }}
    {%- if message.get('reasoning_content') and at > asked.last %}
        {{- '<|channel>thought\\n' + message.reasoning_content + '\\n<channel|>' }}
    {%- endif %}
    {%- set open = namespace(results=true) %}
    {%- for call in message.get('tool_calls') or [] %}
        {{- '<|tool_call>call:' + call.function.name }}{{ fields(call.function.arguments) }}{{ '<tool_call|>' }}
        {%- set was.kind = 'call' %}
    {%- endfor %}
    {%- for result in rest[at + 1:] if message.get('tool_calls') %}
        {%- set open.results = open.results and result.role == 'tool' %}
        {%- if open.results %}
            {{- '<|tool_response>response:' + (result.get('name') or 'unknown') + '{value:' }}
            {{- value(result.content) }}{{ '}<tool_response|>' }}
            {%- set was.kind = 'result' %}
        {%- endif %}
    {%- endfor %}
    {%- set said %}{{ without_channels(message.content) if role == 'model' else message.content | trim }}{% endset %}
    {{- said }}
    {%- if was.kind == 'call' %}{{- '<|tool_response>' }}
    {%- elif role == 'model' and (rest[at + 1:] | rejectattr('role', 'equalto', 'tool') | list)[:1]
        | selectattr('role', 'equalto', 'assistant') | list %}
    {%- elif was.kind != 'result' or said %}{{- '<turn|>\\n' }}
    {%- endif %}
    {%- set was.role = role %}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- if was.kind is none %}{{- '<|turn>model\\n' }}
        {{- '<|channel>thought\\n<channel|>' if enable_thinking is defined and not enable_thinking }}
    {%- elif was.kind == 'result' and enable_thinking | default(false) %}{{- '<|channel>thought\\n' }}
    {%- endif %}
{%- endif %}
"""
TEMPLATE = VALUES + TURNS


def gemma(path: Path, template: str = TEMPLATE, **config: Any) -> Path:
    """A folder as Google publishes it: BPE with bytes for what it lacks, spaces as U+2581, none in front; three ids
    that end an answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    trained, merges = pieces()
    words = [piece for piece in trained if piece not in ("<unk>", "<s>", "</s>")]
    vocabulary = {text: i for i, text in enumerate((*FIRST, *CONTROL, *words))}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in (*FIRST, *CONTROL)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])])
    named = {"sot_token": "<|turn>", "eot_token": "<turn|>", "soc_token": "<|channel>", "eoc_token": "<channel|>",
             "think_token": "<|think|>", "escape_token": '<|"|>', "stc_token": "<|tool_call>",
             "etc_token": "<tool_call|>", "str_token": "<|tool_response>", "etr_token": "<tool_response|>"}
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False, "model_max_length": 10**30, "padding_side": "left",
        "tokenizer_class": "GemmaTokenizer", "extra_special_tokens": [], "model_specific_special_tokens": named,
        **named, **config}))
    (path / "chat_template.jinja").write_text(template)
    eos = [vocabulary[text] for text in STOPS]
    (path / "config.json").write_text(json.dumps({
        "model_type": "gemma4", "eos_token_id": eos[:2], "text_config": {
            "model_type": "gemma4_text", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
            "vocab_size": len(vocabulary) + PADDING}}))
    (path / "generation_config.json").write_text(json.dumps({
        "bos_token_id": 2, "do_sample": True, "eos_token_id": eos, "pad_token_id": 0, "temperature": 1.0, "top_k": 64,
        "top_p": 0.95}))
    return path

"""Folders with tokenizers of Qwen3's and OLMoE's kinds: the published special tokens, ids, flags and features, over a
vocabulary that is trained here, with templates in words of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizer_families import CORPUS, QWEN

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_pad|>")
PLAIN = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<tool_response>", "</tool_response>", "<think>", "</think>")
PADDING = 267  # rows of the embedding beyond the tokenizer's ids: 151936 - 151669

TOOLS_BLOCK = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Functions\\n\\nThese may be called:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nCall like this:\\n<tool_call>\\n{\\"name\\": NAME, \\"arguments\\": OBJECT}\\n" }}
    {{- "</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
"""
LAST_QUESTION = """
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not (
           message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
"""
TURNS = """
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}
            {{- call.name }}
            {{- '", "arguments": ' }}
            {%- if call.arguments is string %}
                {{- call.arguments }}
            {%- else %}
                {{- call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
"""
ASK = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
SWITCH = "{%- if enable_thinking is defined and enable_thinking is false %}" \
         "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
HYBRID = TOOLS_BLOCK + LAST_QUESTION + TURNS + ASK + SWITCH + "{%- endif %}"  # 30B-A3B, 235B-A22B
THINKING = TOOLS_BLOCK + LAST_QUESTION + TURNS + ASK + "{{- '<think>\\n' }}{%- endif %}"  # Thinking-2507
CODER = """
{%- macro others(object, handled) %}
    {%- for key in object if key not in handled %}
        {%- if object[key] is mapping or (object[key] is sequence and object[key] is not string) %}
            {{- '\\n<' ~ key ~ '>' ~ (object[key] | tojson | safe) ~ '</' ~ key ~ '>' }}
        {%- else %}
            {{- '\\n<' ~ key ~ '>' ~ (object[key] | string) ~ '</' ~ key ~ '>' }}
        {%- endif %}
    {%- endfor %}
{%- endmacro %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = [] %}{%- endif %}
{%- if system is defined %}
    {{- "<|im_start|>system\\n" + system }}
{%- elif tools is iterable and tools | length > 0 %}
    {{- "<|im_start|>system\\nYou write programs." }}
{%- endif %}
{%- if tools is iterable and tools | length > 0 %}
    {{- "\\n\\n# Functions\\n\\n<tools>" }}
    {%- for tool in tools %}
        {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
        {{- "\\n<function>\\n<name>" ~ tool.name ~ "</name>" }}
        {%- if tool.description is defined %}
            {{- '\\n<description>' ~ (tool.description | trim) ~ '</description>' }}
        {%- endif %}
        {{- '\\n<parameters>' }}
        {%- if tool.parameters is mapping and tool.parameters.properties is mapping %}
            {%- for name, fields in tool.parameters.properties | items %}
                {{- '\\n<parameter>\\n<name>' ~ name ~ '</name>' }}
                {%- if fields.type is defined %}{{- '\\n<type>' ~ (fields.type | string) ~ '</type>' }}{%- endif %}
                {{- others(fields, ['name', 'type', 'description']) }}
                {{- '\\n</parameter>' }}
            {%- endfor %}
        {%- endif %}
        {{- others(tool.parameters, ['type', 'properties']) }}
        {{- '\\n</parameters>\\n</function>' }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\n<tool_call>\\n<function=NAME>\\n</function>\\n</tool_call>" }}
{%- endif %}
{%- if system is defined or (tools is iterable and tools | length > 0) %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in turns %}
    {%- if message.role == "assistant" and message.tool_calls is defined and message.tool_calls is iterable
           and message.tool_calls | length > 0 %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content is defined and message.content is string and message.content | trim | length > 0 %}
            {{- '\\n' + message.content | trim + '\\n' }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n<function=' + call.name + '>\\n' }}
            {%- for name, value in call.arguments | items %}
                {{- '<parameter=' + name + '>\\n' }}
                {%- set value = value | tojson | safe if value is mapping or (
                       value is sequence and value is not string) else value | string %}
                {{- value }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role in ["user", "system", "assistant"] %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{- '<|im_start|>user\\n' }}{%- endif %}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>\\n' }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
""" + ASK + "{%- endif %}"
# Qwen3.5 and 3.6: what is said may come in parts, is trimmed, and reasoning opens the answer unless it is switched off.
QWEN36 = """
{%- macro said(content, by_system=false) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for part in content %}
            {%- if 'image' in part and by_system %}{{- raise_exception('a picture') }}
            {%- elif 'image' in part %}{{- '<|vision_pad|>' }}
            {%- elif 'text' in part %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- elif content is none or content is undefined %}{{- '' }}
    {%- else %}{{- raise_exception('what is this') }}
    {%- endif %}
{%- endmacro %}
{%- if not messages %}{{- raise_exception('nothing was said') }}{%- endif %}
{%- if tools and tools is iterable and tools is not mapping %}
    {{- '<|im_start|>system\n# Functions\n\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools>\n\n<tool_call>\n<function=NAME>\n<parameter=WHAT>\nVALUE\n</parameter>\n</function>\n' }}
    {{- '</tool_call>' }}
    {%- if messages[0].role == 'system' %}{{- '\n\n' + said(messages[0].content, true) | trim }}{%- endif %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + said(messages[0].content, true) | trim + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(asked=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set text = said(message.content) | trim %}
        {%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
            {%- set ns.asked = loop.index0 %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if ns.asked < 0 %}{{- raise_exception('nobody asked') }}{%- endif %}
{%- for message in messages %}
    {%- set text = said(message.content) | trim %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{- raise_exception('a system message comes first') }}{%- endif %}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\n' + text + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in text %}
            {%- set thoughts = text.split('</think>')[0].split('<think>')[-1] %}
            {%- set text = text.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if (preserve_thinking is defined and preserve_thinking is true) or loop.index0 > ns.asked %}
            {{- '<think>\n' + thoughts | trim + '\n</think>\n\n' }}
        {%- endif %}
        {{- text }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- ('\n\n' if text else '') if loop.first else '\n' }}
            {{- '<tool_call>\n<function=' + call.name + '>\n' }}
            {%- for name, value in call.arguments | items %}
                {{- '<parameter=' + name + '>\n' }}
                {{- value | string if value is string else value | tojson | safe }}
                {{- '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + text + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- else %}{{- raise_exception('who is this') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
OLMOE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\\n' + message['content'] + '\\n' }}{% else %}"
    "{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}")

FUNCTION = {
    "type": "function",
    "function": {
        "name": "weather", "description": " The \"weather\" of a place, \u00e9t\u00e9 < hiver & 'so on'.\n",
        "parameters": {
            "type": "object", "required": ["place"],
            "properties": {"place": {"type": "string", "description": "a town"},
                           "unit": {"type": "string", "enum": ["C", "F"], "default": None},
                           "days": {"type": ["integer", "null"], "minimum": 1}}}}}


def _byte_level(specials: tuple[str, ...], plain: tuple[str, ...], pre: Any, normalizer: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


def _added(tokenizer: Any) -> dict[str, dict[str, Any]]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {str(i): {flag: getattr(token, flag) for flag in flags}
            for i, token in tokenizer.get_added_tokens_decoder().items()}


def qwen3(path: Path, template: str = HYBRID, **config: Any) -> Path:
    """A folder as Qwen publishes it. Ids of <think> and </think> come last; the model has more rows than ids."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tokenizer = _byte_level(SPECIAL, PLAIN, split, normalizers.NFC())
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": _added(tokenizer),
        "additional_special_tokens": list(SPECIAL[1:]), "bos_token": None, "chat_template": template,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None, **config}))
    end, im_end = (tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|im_end|>"))
    rows = tokenizer.get_vocab_size() + PADDING
    (path / "config.json").write_text(json.dumps({
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": rows, "bos_token_id": end,
        "eos_token_id": im_end}))
    (path / "generation_config.json").write_text(json.dumps({
        "bos_token_id": end, "pad_token_id": end, "do_sample": True, "eos_token_id": [im_end, end], "temperature": 0.6,
        "top_k": 20, "top_p": 0.95}))
    return path


def olmoe(path: Path) -> Path:
    """A folder as OLMoE-1B-7B-0924-Instruct comes: GPT-NeoX's tokenizer, <|endoftext|> begins and ends a text, and
    the tags of the roles are plain text."""
    from tokenizers import normalizers, pre_tokenizers

    tokenizer = _byte_level(("<|endoftext|>", "<|padding|>"), ("  ", "   ", "|||EMAIL_ADDRESS|||"),
                            pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": _added(tokenizer), "bos_token": "<|endoftext|>", "chat_template": OLMOE,
        "clean_up_tokenization_spaces": True, "eos_token": "<|endoftext|>", "pad_token": "<|padding|>",
        "model_max_length": 1000000000000000019884624838656, "tokenizer_class": "GPTNeoXTokenizer",
        "unk_token": None}))
    (path / "config.json").write_text(json.dumps({
        "model_type": "olmoe", "vocab_size": tokenizer.get_vocab_size() + 24,
        "eos_token_id": tokenizer.token_to_id("<|endoftext|>")}))
    return path

"""What the tests of chat formats share: messages, texts, and a tokenizer of Mixtral's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from tokenizer_files import write_folder

from qmix.tokenizer import Message, Tokenizer, load

MIXTRAL = (  # as in Mixtral-8x7B-Instruct-v0.1's tokenizer_config.json
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

texts = st.text(max_size=20) | st.text(alphabet="ab \n[INST]/<s>é🦊", max_size=20)


def system(text: str) -> Message:
    return Message("system", text)


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str, *ids: int) -> Message:
    return Message("assistant", text, ids or None)


def mistral_v1() -> Any:
    """mistral-common's tokenizer of the format; the test skips where it is not installed."""
    return pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer.v1()


def mistral_tokenizer(path: Path) -> Tokenizer:
    """Ours, over the same tokenizer.model and with Mixtral's template."""
    model = mistral_v1().instruct_tokenizer.tokenizer.file_path.read_bytes()
    return load(write_folder(path, model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=MIXTRAL),
                vocab_size=32000)

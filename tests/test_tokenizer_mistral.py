"""Mixtral's own chat format, held against mistral-common; and when a template of the model is used instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_chats import MIXTRAL, answer, mistral_tokenizer, mistral_v1, system, texts, user
from tokenizer_files import CHATML, LLAMA, byte_level_json, spm_model, write_folder

from qmix.tokenizer import Message, Tokenizer, load
from qmix.tokenizer.sandbox import Template


@pytest.fixture(scope="module")
def v1():
    return mistral_v1()


@pytest.fixture(scope="module")
def v1_model(v1) -> bytes:
    return v1.instruct_tokenizer.tokenizer.file_path.read_bytes()


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return mistral_tokenizer(tmp_path_factory.mktemp("mixtral"))


def common_ids(v1, messages: list[Message]) -> list[int]:
    """The ids that mistral-common gives."""
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    return v1.encode_chat_completion(ChatCompletionRequest(
        messages=[kinds[m.role](content=m.content) for m in messages])).tokens


CONVERSATIONS = [
    [user("Hello")],
    [system("You are terse."), user("Hi"), answer("Hello."), user("And now?")],
    [user("one"), answer("two"), user("three"), answer("four"), user("five")],
    [system("Sois bref. 🦊"), user("Ça va? 你好 \u200d"), answer("Oui 👩‍👩‍👧"), user("naïve — €")],
    [user("say [INST] x [/INST] and </s><s> and <unk>"), answer("[/INST] </s> ok"), user("<<SYS>> [INST]")],
    [user("  spaces around  \n"), answer("  kept \n\n"), user("\ttab ")],
    [system("a"), system("b"), user("two system texts")],
    [system("  "), user("blank system text")],
    [system(""), user("empty system text")],
    [user("two"), user("in a row"), answer("ok"), user("x"), user("y"), user("z")],
    [user("two"), answer("answers"), answer("in a row"), user("x")],
    [answer("the model begins"), user("x")],
    [user("")],
    [system("s"), user("")],
    [user("line\nbreaks\r\n\x00 and NUL")],
]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_ids_are_those_of_mistral_common(v1, mistral: Tokenizer, messages: list[Message]) -> None:
    assert mistral.encode_chat(messages) == common_ids(v1, messages)


@settings(max_examples=60, deadline=None)
@given(first=texts, turns=st.lists(st.tuples(texts, texts.filter(bool)), max_size=3), last=texts)
def test_ids_of_any_conversation_are_those_of_mistral_common(v1, mistral, first, turns, last) -> None:
    messages = [system(first)] + [m for q, a in turns for m in (user(q), answer(a))] + [user(last)]
    assert mistral.encode_chat(messages) == common_ids(v1, messages)


def test_mistral_says_its_name(mistral: Tokenizer) -> None:
    assert mistral.template_name == "Mistral v1 segments (built in; the checkpoint's template says the same)"
    assert (mistral.bos_id, mistral.eos_ids, mistral.turn_stops) == (1, (2,), ())


@pytest.mark.parametrize("ids", [(5, 6, 7), (5, 6, 7, 2)])
def test_mistral_splices_generated_ids(mistral: Tokenizer, ids: tuple[int, ...]) -> None:
    asked = mistral.encode_chat([user("a")])
    again = mistral.encode_chat([user("a"), answer("whatever", *ids), user("b")])
    assert again == [*asked, 5, 6, 7, 2, *mistral.encode_chat([user("b")])[1:]]


@pytest.mark.parametrize(("template", "name", "mistral"), [
    (MIXTRAL, "model", True),
    (CHATML, "mixtral-instruct", False),  # a fine-tune with a format of its own
    (LLAMA.replace("[INST] ", "[INST] <<SYS>>"), "model", False),
    (None, "Mixtral-8x7B-v0.1", False),  # the base model
    (None, "Mixtral-8x7B-Instruct-v0.1", True),
])
def test_when_mistrals_segments_are_used(template, name: str, mistral: bool, v1_model: bytes,
                                         tmp_path: Path) -> None:
    config = {} if template is None else {"chat_template": template}
    tokenizer = load(write_folder(tmp_path / name, v1_model, **config))
    assert tokenizer.template_name.startswith("Mistral v1") == mistral


SPACED = (  # as Mistral wrote it later: spaces at the borders, and a place for the system text
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}{% if m.role == 'user' %}"
    "{% if loop.first and system is defined %}{{ ' [INST] ' + system + '\n\n' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' [INST] ' + m.content + ' [/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}")


@pytest.mark.parametrize(("template", "mistral"), [
    (SPACED, True),
    (LLAMA, True),
    (MIXTRAL.replace("'[INST] '", "'[INST] Answer in French. '"), False),
    (MIXTRAL.replace("'[INST] '", "'[INST]'"), False),  # no space, as later vocabularies want it
    (MIXTRAL.replace("message['content'] + ' [/INST]'", "message['content'].strip() + ' [/INST]'"), False),
    (MIXTRAL.replace("{{ bos_token }}", ""), False),
    (MIXTRAL.replace("{{ bos_token }}", "{{ bos_token }}You are a pirate. "), False),
    (SPACED.replace("system + '\n\n'", "'<<' + system + '>>'"), False),  # its own place for a system text
    (MIXTRAL.replace("message['content'] + eos_token", "message['content']"), False),  # no end of an answer
    (MIXTRAL + "{% if add_generation_prompt %}Sure: {% endif %}", False),
])
def test_the_models_template_wins_unless_it_says_the_same(template: str, mistral: bool, v1_model: bytes,
                                                          tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "Mixtral-Instruct", v1_model, bos_token="<s>", eos_token="</s>",
                          chat_template=template)
    tokenizer = load(folder)
    assert tokenizer.template_name.startswith("Mistral v1") == mistral
    if not mistral:
        assert tokenizer.template_name == "the checkpoint's template"
        shown = Template(template, folder).render([{"role": "user", "content": "Hello"}],
                                                  {"bos_token": "", "eos_token": ""}, True)
        assert tokenizer.decode(tokenizer.encode_chat([user("Hello")])).lstrip() == shown.lstrip()


def test_a_conversation_that_the_template_writes_otherwise_is_the_templates(v1_model: bytes, mistral: Tokenizer,
                                                                            tmp_path: Path) -> None:
    """What a template does to a word that no probe holds is seen when the word comes, and said."""
    template = MIXTRAL.replace(
        "'[INST] ' + ", "('[INST] Briefly. ' if '/quick' in message['content'] else '[INST] ') + ")
    said: list[str] = []
    tokenizer = load(write_folder(tmp_path, v1_model, bos_token="<s>", eos_token="</s>", chat_template=template),
                     say=said.append)
    assert tokenizer.encode_chat([user("Hello")]) == mistral.encode_chat([user("Hello")]) and said == []
    for _ in range(2):
        assert tokenizer.decode(tokenizer.encode_chat([user("Why? /quick")])) == "[INST] Briefly. Why? /quick [/INST]"
    assert len(said) == 1 and "the template is used" in said[0]


def test_mistrals_segments_keep_the_ids_of_tokenizer_model(v1, v1_model: bytes, tmp_path: Path) -> None:
    """Beside a tokenizer.json, which is the reference otherwise; the chat format says so."""
    folder = write_folder(tmp_path, v1_model, json_text=byte_level_json(), bos_token="<s>", eos_token="</s>",
                          chat_template=MIXTRAL)
    tokenizer = load(folder)
    talk = [user("one"), answer("two"), user("three")]
    assert tokenizer.encode_chat(talk) == common_ids(v1, talk)
    assert tokenizer.template_name.endswith("ids of tokenizer.model)")


def test_another_vocabulary_with_mistrals_template_uses_the_template(tmp_path: Path) -> None:
    tokenizer = load(write_folder(tmp_path, spm_model(), chat_template=MIXTRAL))
    assert tokenizer.template_name == "the checkpoint's template"

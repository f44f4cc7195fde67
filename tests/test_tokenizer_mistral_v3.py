"""Tokenizer v3 (Mixtral 8x22B, Mistral 7B v0.3), tools included, held against mistral-common; and the same vocabulary
as a tokenizer.json with a template, held against transformers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_chats import MIXTRAL, answer, system, texts, user
from tokenizer_files import CHATML, write_folder
from tokenizer_qwen3 import FUNCTION

from qmix.errors import UsageError
from qmix.tokenizer import Message, Request, Tokenizer, ToolCall, load

V3 = (  # in the manner of the published one: the system text joins the last question, turns must alternate
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}")
CALL = ToolCall("weather", {"place": "K\u00f6ln", "days": 3}, "call00001")
RESULT = Message("tool", '{"celsius": 21}', tool_call_id="call00001", name="weather")


def calls(*found: ToolCall) -> Message:
    return Message("assistant", "", tool_calls=found)


@pytest.fixture(scope="module")
def v3() -> Any:
    return pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer.v3()


@pytest.fixture(scope="module")
def model(v3: Any) -> bytes:
    return v3.instruct_tokenizer.tokenizer.file_path.read_bytes()


@pytest.fixture(scope="module", params=[V3, None], ids=["template", "none"])
def mistral(request: pytest.FixtureRequest, model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("x") / "Mixtral-8x22B-Instruct-v0.1"
    config = {} if request.param is None else {"chat_template": request.param}
    return load(write_folder(folder, model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **config), 32768)


def common_ids(v3: Any, messages: list[Message], tools: tuple[Any, ...] = ()) -> list[int]:
    """The ids that mistral-common gives."""
    from mistral_common.protocol.instruct import messages as kinds
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool
    from mistral_common.protocol.instruct.tool_calls import ToolCall as Call

    def one(m: Message) -> Any:
        if m.role == "tool":
            return kinds.ToolMessage(content=m.content, tool_call_id=m.tool_call_id, name=m.name)
        if m.role == "assistant":
            found = [Call(id=call.id or "null", function=FunctionCall(
                name=call.name, arguments=json.dumps(call.arguments))) for call in m.tool_calls]
            return kinds.AssistantMessage(content=m.content or None, tool_calls=found or None)
        return {"system": kinds.SystemMessage, "user": kinds.UserMessage}[m.role](content=m.content)

    request = ChatCompletionRequest(messages=[one(m) for m in messages], tools=[
        Tool(function=Function(**tool["function"])) for tool in tools] or None)
    return v3.encode_chat_completion(request).tokens


CONVERSATIONS = [
    [user("Hello")],
    [system("You are terse."), user("Hi"), answer("Hello.  "), user("And now?")],
    [user("one"), answer("two"), user("three"), answer("four"), user("five")],
    [system("Sois bref. \U0001f98a"), user("\u00c7a va? \u4f60\u597d"), answer("Oui"), user("na\u00efve \u20ac")],
    [user("say [INST] x [/INST] and </s><s> [TOOL_CALLS]"), answer("[/INST] </s> ok"), user("[AVAILABLE_TOOLS]")],
    [system("a"), system("b"), user("two"), user("in a row"), answer("ok"), answer("ok"), user("y")],
    [answer("the model begins"), user("x")], [user("")], [user("line\nbreaks\r\n")],
]
TOOLED = [
    [user("weather?")],
    [system("Be brief."), user("weather?"), calls(CALL), RESULT],
    [user("weather?"), calls(CALL, ToolCall("f", {}, "call00002")), RESULT,
     Message("tool", "no \"JSON\"", tool_call_id="call00002", name="f")],
    [user("a"), calls(CALL), RESULT, answer("21 degrees"), user("and there?"), calls(CALL), RESULT],
    [system("s"), user("a"), calls(CALL), RESULT, answer("21"), user("b")],
]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_ids_are_those_of_mistral_common(v3: Any, mistral: Tokenizer, messages: list[Message]) -> None:
    assert mistral.encode_chat(messages) == common_ids(v3, messages)


@pytest.mark.parametrize("tools", [(), (FUNCTION,), (FUNCTION, {"type": "function", "function": {
    "name": "f", "parameters": {}}})], ids=len)
@pytest.mark.parametrize("messages", TOOLED, ids=range(len(TOOLED)))
def test_ids_with_tools_are_those_of_mistral_common(v3: Any, mistral: Tokenizer, messages: list[Message],
                                                    tools: tuple[Any, ...]) -> None:
    ids = mistral.encode_chat(messages, request=Request(tools))
    assert ids == common_ids(v3, messages, tools)
    assert (6 in ids) == bool(tools) and (5 in ids) == any(m.tool_calls for m in messages)


@settings(max_examples=40, deadline=None)
@given(first=texts.filter(bool), turns=st.lists(st.tuples(texts, texts.filter(bool)), max_size=3), last=texts)
def test_ids_of_any_conversation_are_those_of_mistral_common(v3: Any, mistral: Tokenizer, first: str, turns: Any,
                                                             last: str) -> None:
    messages = [system(first)] + [m for q, a in turns for m in (user(q), answer(a))] + [user(last)]
    assert mistral.encode_chat(messages) == common_ids(v3, messages)


def test_its_name_and_its_end(mistral: Tokenizer) -> None:
    assert mistral.template_name.startswith("Mistral v3 segments (built in; the checkpoint")
    assert (mistral.bos_id, mistral.eos_ids, mistral.turn_stops, mistral.vocab_size) == (1, (2,), (), 32768)
    assert mistral.takes_tools and not mistral.thinking_switch


@pytest.mark.parametrize("ids", [(1200, 1201), (1200, 1201, 2)])
def test_generated_ids_are_spliced(mistral: Tokenizer, ids: tuple[int, ...]) -> None:
    asked = mistral.encode_chat([user("a")])
    assert mistral.encode_chat([user("a"), answer("whatever", *ids), user("b")]) == [
        *asked, 1200, 1201, 2, *mistral.encode_chat([user("b")])[1:]]


def test_what_the_format_has_no_place_for(mistral: Tokenizer) -> None:
    with pytest.raises(UsageError, match="text and tool calls"):
        mistral.encode_chat([user("a"), Message("assistant", "x", tool_calls=(CALL,)), RESULT])
    with pytest.raises(UsageError, match="tool_call_id: missing"):
        mistral.encode_chat([user("a"), calls(CALL), Message("tool", "x")])
    with pytest.raises(UsageError, match="tools: got"):
        mistral.encode_chat([user("a")], request=Request(({"name": "f"},)))


@pytest.mark.parametrize(("template", "name", "segments"), [
    (CHATML, "x-instruct", False), (MIXTRAL, "x", True), (V3.replace("'[INST] '", "'[INST] Be brief. '"), "x", False),
    (V3.replace("loop.last", "loop.first"), "x", False), (None, "Mixtral-8x22B-v0.1", False)])
def test_the_models_template_wins_unless_it_says_the_same(template: str | None, name: str, segments: bool, model: bytes,
                                                          tmp_path: Path) -> None:
    config = {} if template is None else {"chat_template": template}
    tokenizer = load(write_folder(tmp_path / name, model, bos_token="<s>", eos_token="</s>", **config))
    assert tokenizer.template_name.startswith("Mistral v3") == segments


# ---- as a tokenizer.json

@cache
def bpe(model: bytes) -> str:
    """A tokenizer.json of a sentencepiece BPE, as transformers converts one: the merges are the pairs of pieces that
    make a piece, in the order of the pieces' scores."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    spm = SentencePieceProcessor(model_proto=model)
    vocab = {spm.id_to_piece(i): i for i in range(spm.vocab_size())}
    merges = []
    for piece, i in vocab.items():
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if {piece[:at], piece[at:]} <= vocab.keys()]
        merges += [(-spm.get_score(i), vocab[left], vocab[right], left, right) for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab, [pair[3:] for pair in sorted(merges)], unk_token="<unk>", fuse_unk=True,
                                     byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in list(vocab)[:10]])
    return tokenizer.to_str()


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_tokenizer_json_is_that_of_transformers(version: str, v3: Any, tmp_path: Path) -> None:
    """Mistral 7B and both Mixtrals come with tokenizer.json alone, too."""
    transformers = pytest.importorskip("transformers")
    file = v3.instruct_tokenizer.tokenizer.file_path
    file = file if version == "v3" else file.with_name("tokenizer.model.v1")
    template = (V3 if version == "v3" else MIXTRAL).replace("'[INST] '", "'[INST] Be brief. '")
    made = write_folder(tmp_path / "x", json_text=bpe(file.read_bytes()), bos_token="<s>", eos_token="</s>",
                        unk_token="<unk>", tokenizer_class="PreTrainedTokenizerFast", chat_template=template)
    ours, theirs = load(made), transformers.AutoTokenizer.from_pretrained(made)
    assert ours.template_name == "the checkpoint's template"
    assert ours.vocab_size == len(theirs) == {"v1": 32000, "v3": 32768}[version]
    for text in ("Hello", " two  spaces ", "\u4f60\u597d \U0001f98a", "line\n\nbreak"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
        ids = ours.encode(text, bos=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        messages = [user("a"), answer("b"), user(text)]
        assert ours.encode_chat(messages) == theirs.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages], add_generation_prompt=True, return_dict=False)


def test_segments_are_the_same_from_a_tokenizer_json(model: bytes, mistral: Tokenizer, tmp_path: Path) -> None:
    """Without tokenizer.model, where the template says the same."""
    made = load(write_folder(tmp_path / "x", json_text=bpe(model), bos_token="<s>", eos_token="</s>",
                             unk_token="<unk>", chat_template=V3))
    assert made.template_name.startswith("Mistral v3")
    for messages in CONVERSATIONS[:4]:
        assert made.encode_chat(messages) == mistral.encode_chat(messages)

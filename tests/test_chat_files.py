"""Conversations and their files: saved, loaded, undone, continued; nothing is lost on the way."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chat_fakes import FakeTokenizer, Talk
from hypothesis import given, settings
from hypothesis import strategies as st

from qmix.chat import savefile
from qmix.chat.conversation import Conversation, Exchange, adopted, spoken_ids
from qmix.chat.prompt import open_history
from qmix.config import SamplingParams
from qmix.errors import QmixError, UsageError
from qmix.tokenizer import Call, ToolCall

TOKENIZER = FakeTokenizer()


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    return Talk(tmp_path)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
seen = st.builds(
    lambda q, a, known, calls: Exchange(q, a, tuple(TOKENIZER.encode(a, bos=False)) if known else None, None, calls),
    texts,
    texts,
    st.booleans(),
    st.lists(st.builds(Call, texts.filter(bool), texts), max_size=2).map(tuple),
)
conversations = st.builds(Conversation, texts, st.none() | texts, st.lists(seen, max_size=4).map(tuple))
params = st.builds(
    SamplingParams,
    st.floats(0, 100),
    st.floats(0.01, 1),
    st.integers(0, 100),
    st.floats(0, 1),
    st.floats(0.01, 100),
    st.none() | st.integers(0, 2**63 - 1),
    st.just(-1) | st.integers(1, 9),
    st.lists(texts.filter(bool), max_size=2).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(conversations, params)
def test_what_is_saved_is_loaded(conversation: Conversation, sampling: SamplingParams) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.json"
        savefile.save(path, conversation, sampling)
        assert savefile.load(path) == (conversation, sampling)
        assert path.stat().st_mode & 0o777 == 0o600 and [path] == list(Path(folder).iterdir())
    own, lost = adopted(conversation, conversation.model, TOKENIZER)
    assert own == without_calls(conversation) and lost == sum(e.ids is None for e in conversation.exchanges)
    other, lost = adopted(conversation, conversation.model + "x", TOKENIZER)
    assert lost == len(conversation) and all(e.ids is None for e in other.exchanges)
    assert other.tokens(TOKENIZER) == own.tokens(TOKENIZER)


def without_calls(conversation: Conversation) -> Conversation:
    """As a model is shown it whose chat format has no place for tools."""
    return replace(conversation, exchanges=tuple(replace(e, calls=()) for e in conversation.exchanges))


def test_calls_that_are_no_objects_stay_in_the_file_and_are_not_shown_again() -> None:
    calls = tuple(Call("f", text) for text in ("{}", "[]", "{", '{"a": NaN}', '{"a": "\\ud800"}', '{"b": "é"}'))
    exchange = Exchange("q", "a", (5,), None, calls)
    for some in (calls, *((calls[0], call) for call in calls[1:5])):  # one that cannot be shown hides all
        message = Exchange("q", "a", (5,), None, some).message
        assert (message.tool_calls, message.ids) == ((), (5,))
    exchange = Exchange("q", "a", (5,), None, (calls[0], calls[5]))
    assert exchange.tool_calls == (ToolCall("f", {}), ToolCall("f", {"b": "é"}))
    assert exchange.message.ids is None and exchange.message.content == "a"


@pytest.mark.parametrize("calls", ['3', '[3]', '[{}]', '[{"name": "f"}]', '[{"name": "f", "arguments": {}}]',
                                   '[{"name": 3, "arguments": "{}"}]'])
def test_damaged_calls_are_named(calls: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    savefile.save(path, Conversation("m", None, (Exchange("q", "a", None, None, (Call("f", "{}"),)),)),
                  SamplingParams())
    raw = json.loads(path.read_text())
    raw["messages"][1]["calls"] = json.loads(calls)
    path.write_text(json.dumps(raw))
    with pytest.raises(QmixError, match=r"messages\[1\]\.calls"):
        savefile.load(path)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["a", "turns?", "/undo", "/regen", "save and load", "continue"]), max_size=8))
def test_any_mix_of_undo_regen_save_and_load_agrees_with_a_plain_list(steps: list[str]) -> None:
    said: list[tuple[str, str]] = []

    def answer(question: str, before: int) -> tuple[str, str]:
        return question, {"turns?": f"turn {before + 1}"}.get(question, f"You said: {question}")

    with tempfile.TemporaryDirectory() as folder:
        talk = Talk(Path(folder))
        for number, step in enumerate(steps):
            if step == "/undo":
                talk.say(step)
                said = said[:-1]
            elif step == "/regen":
                talk.say(step)
            elif step == "save and load":
                talk.say(f"/save {folder}/{number}.json")
                talk.say("a")
                talk.say(f"/load {folder}/{number}.json")
            elif step == "continue":
                talk = Talk(Path(folder), resume="" if said else None)
            else:
                talk.say(step)
                said.append(answer(step, len(said)))
            assert talk.said == said


def test_spoken_ids() -> None:
    ids = TOKENIZER.encode("Hi!\nUser: é", bos=False)
    assert spoken_ids(ids, "Hi!", TOKENIZER) == tuple(ids[:3])
    assert spoken_ids([*ids, 2], "Hi!\nUser: é", TOKENIZER) == tuple(ids)
    assert spoken_ids(ids[:-1], "Hi!\nUser: \ufffd", TOKENIZER) == tuple(ids[:-1])
    assert spoken_ids(ids[:-1], "Hi!\nUser: ", TOKENIZER) == tuple(ids[:-2])
    assert spoken_ids(ids, "Hi?", TOKENIZER) is None
    assert spoken_ids([2], "", TOKENIZER) == ()


def test_save_refuses_to_overwrite(talk: Talk, tmp_path: Path) -> None:
    talk.say("one")
    path = tmp_path / "my talk.json"
    assert talk.say(f"/save {path}")[1] == f"saved 1 exchange in {path}\n"
    before = path.read_bytes()
    talk.say("two")
    _, err = talk.say(f"/save {path}")
    assert err == f"error: {path}: exists\n  /save! {path} replaces it\n" and path.read_bytes() == before
    talk.say(f'/save! "{path}"')
    assert len(json.loads(path.read_text())["messages"]) == 4


def test_load_replaces_conversation_system_prompt_and_parameters(tmp_path: Path) -> None:
    talk = Talk(tmp_path, SamplingParams(temperature=0.25, seed=5), system="be kind")
    talk.say("one")
    talk.say(f"/save {tmp_path}/a.json")
    other = Talk(tmp_path / "other")
    other.say("something else")
    _, err = other.say(f"/load {tmp_path}/a.json")
    assert err.startswith(f"loaded 1 exchange from {tmp_path}/a.json\n") and "temp 0.25" in err
    assert other.said == talk.said and other.chat.params == talk.chat.params and other.chat.seed == 5
    assert other.chat.conversation == talk.chat.conversation
    assert other.say("system?")[0] == "it is 'be kind'\n"


def test_load_of_another_models_conversation_says_so(tmp_path: Path) -> None:
    talk = Talk(tmp_path, model="one/model")
    talk.say("hello")
    talk.say(f"/save {tmp_path}/a.json")
    other = Talk(tmp_path, model="another")
    _, err = other.say(f"/load {tmp_path}/a.json")
    assert "held with one/model: all of it is tokenized again" in err
    assert other.chat.conversation.exchanges[0].ids is None and other.say("turns?")[0] == "turn 2\n"
    saved = json.loads((tmp_path / "a.json").read_text())
    saved["model"] = "another"
    (tmp_path / "a.json").write_text(json.dumps(saved))
    assert "tokenized again" not in other.say(f"/load {tmp_path}/a.json")[1]
    for foreign in (ord("?") + 10, 10**6):  # another piece, and an id that this vocabulary does not have
        saved["messages"][1]["ids"][0] = foreign
        (tmp_path / "a.json").write_text(json.dumps(saved))
        _, err = other.say(f"/load {tmp_path}/a.json")
        assert "answers tokenized again: 1 of 1" in err and other.say("turns?")[0] == "turn 2\n"


GOOD = {
    "format": "qmix-conversation",
    "version": 1,
    "model": "fake",
    "system": None,
    "parameters": {},
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "ids": None}],
}


def broken() -> Iterator[tuple[str, bytes]]:
    yield "no JSON", b"\x00\xff\xfe"
    yield "no JSON", b'{"format": "qmix-conv'
    yield "no JSON", b"[" * 100_000
    yield "no qmix conversation", b"[]"
    yield "no qmix conversation", b'{"messages": []}'
    for message, change in [
        ("version: got 2", {"version": 2}),
        ("model: want a text", {"model": 3}),
        ("system: want a text", {"system": []}),
        ("messages: want a list", {"messages": None}),
        ("messages: want a list", {"messages": ["a"]}),
        ("messages: want user and assistant", {"messages": GOOD["messages"][:1]}),
        ("messages: want user and assistant", {"messages": GOOD["messages"][::-1]}),
        (
            "messages[0].content: half a surrogate",
            {"messages": [{"role": "user", "content": "\ud800"}, GOOD["messages"][1]]},
        ),
        ("messages[1].content: want a text", {"messages": [GOOD["messages"][0], {"role": "assistant"}]}),
        (
            "messages[1].ids: want token ids",
            {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "ids": [1, "2"]}]},
        ),
        (
            "messages[1].ids: want token ids",
            {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "ids": [-1]}]},
        ),
        ("parameters: want an object", {"parameters": []}),
        ("parameters.hot: no such", {"parameters": {"hot": 1}}),
        ("parameters.temperature: got 'x'", {"parameters": {"temperature": "x"}}),
        ("parameters.temperature: got 1000", {"parameters": {"temperature": 1000}}),
        ("parameters.top_k: got True", {"parameters": {"top_k": True}}),
        ("parameters.stop: want a text", {"parameters": {"stop": [1]}}),
    ]:
        yield message, json.dumps({**GOOD, **change}).encode()


@pytest.mark.parametrize("message, content", broken())
def test_a_corrupt_file_gives_one_line_and_loses_nothing(
    talk: Talk, tmp_path: Path, message: str, content: bytes
) -> None:
    talk.say("one")
    before = talk.chat.conversation, talk.chat.params, list(talk.session.ids)
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    _, err = talk.say(f"/load {path}")
    assert err.startswith(f"error: {path}: {message}") and err.endswith(
        "\n  the conversation here is unchanged\n"
    )
    assert err.count("\n") == 2
    assert (talk.chat.conversation, talk.chat.params, talk.session.ids) == before
    path.write_text(json.dumps(GOOD))
    assert "loaded 1 exchange" in talk.say(f"/load {path}")[1]


def test_load_reads_regular_files_only(talk: Talk, tmp_path: Path) -> None:
    assert "not a regular file" in talk.say("/load /dev/zero")[1]
    assert "not a regular file" in talk.say(f"/load {tmp_path}")[1]


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(QmixError, match="cannot save"):
        savefile.save(path, Conversation("m"), SamplingParams())
    assert [path] == list(tmp_path.iterdir())


def test_continue_takes_up_the_last_conversation(tmp_path: Path) -> None:
    first = Talk(tmp_path, system="be kind")
    first.say("one")
    first.say("two")
    first.say("/undo")
    second = Talk(tmp_path, SamplingParams(temperature=0.1), resume="")
    assert second.chat.conversation == first.chat.conversation
    err = second.err.getvalue()
    assert (
        "continuing 1 exchange, the last question was “one”" in err and "not the saved ones: temp 0.7" in err
    )
    assert second.say("turns?")[0] == "turn 2\n" and second.say("system?")[0] == "it is 'be kind'\n"
    third = Talk(tmp_path, system="be short", resume="")
    assert "--system replaces" in third.err.getvalue() and third.say("system?")[0] == "it is 'be short'\n"


def test_continue_knows_models_apart_and_says_when_there_is_nothing(tmp_path: Path) -> None:
    for model in ("a/b", "a_b", "a b"):
        talk = Talk(tmp_path, model=model, resume="")
        assert "no saved conversation" in talk.err.getvalue()
        talk.say(f"I am {model}")
    assert Talk(tmp_path, model="a_b", resume="").said[0][0] == "I am a_b"


def test_continue_of_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.say("one")
    assert talk.chat.autosave.path is not None
    talk.chat.autosave.path.write_text("{")
    with pytest.raises(UsageError, match="no JSON") as caught:
        Talk(tmp_path, resume="")
    assert str(talk.chat.autosave.path) in caught.value.message and "--continue" in caught.value.cure


def test_a_state_folder_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    talk = Talk(tmp_path / "file")
    assert "not saved for --continue" in talk.say("one")[1]
    out, err = talk.say("two")
    assert out == "You said: two\n" and "not saved" not in err


def test_a_history_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    problems: list[str] = []
    open_history(tmp_path / "new" / "history", problems.append).append_string("one")
    assert problems == [] and (tmp_path / "new" / "history").stat().st_mode & 0o777 == 0o600
    open_history(tmp_path, problems.append).append_string("one")
    assert str(tmp_path) in problems[0]
    history = open_history(tmp_path / "new" / "history", problems.append)
    assert list(history.load_history_strings()) == ["one"]
    (tmp_path / "new" / "history").unlink()
    (tmp_path / "new" / "history").mkdir()
    history.append_string("two")
    history.append_string("three")
    assert len(problems) == 2 and "not added" in problems[1]

"""What of an answer is told and remembered: log probabilities, stop strings, single calls, cancelled choices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ScriptedEngine, says, serving, spelled
from test_serve_tools import FAMILIES
from tokenizer_files import demo_folder
from tokenizer_harmony import harmony

from qmix.serve.answering import Answering, Asked
from qmix.serve.arguments import arguments_object
from qmix.serve.engine_thread import EngineThread, Job, NotReady, Options
from qmix.serve.events import Called, Ended, Event, Failed, Finished
from qmix.serve.request import Generation
from qmix.tokenizer import Message, Tokenizer, load
from qmix.tokenizer.mistral_calls import MARKED, MistralParser

ANSWER = "One,\n\ntwo \u00e9\u4e16 four five."
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(demo_folder(tmp_path_factory.mktemp("demo")))


def test_what_a_stop_string_cut_off_is_not_shown_to_the_model_again(demo: Tokenizer) -> None:
    seen: list[str] = []

    def script(ids: Sequence[int]) -> list[int]:
        seen.append(demo.decode(ids))
        return spelled(demo, "one two three four")

    with serving(lambda: ScriptedEngine(demo, script)) as running:
        for stop in (["three"], ["wo th"], ["hree"], [" three", "two three"]):
            body = {**ASK, "stop": stop}
            said = httpx.post(running.url + CHAT, json=body).json()["choices"][0]["message"]["content"]
            assert said == "one two three four"[:"one two three four".index(min(stop, key="one two three four".index))]
            httpx.post(running.url + CHAT, json={"messages": [
                *ASK["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": "Go on"}]})
            assert said.rstrip() in seen[-1] and "three" not in seen[-1]


@pytest.mark.parametrize("name", [*FAMILIES, "harmony"])
@pytest.mark.parametrize("stop", [[], ["\n\nUser"], ["five"]])
def test_logprobs_are_of_the_answers_tokens(name: str, stop: list[str], tmp_path: Path) -> None:
    thought = {"qwen3": "<think>\nhm\n</think>\n\n", "thinking": "hm\n</think>\n\n", "coder": "<think>hm</think>",
               "glm": "\n<think>hm</think>\n", "gemma": "<|channel>thought\nhm<channel|>", "harmony":
               "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"}[name]
    tokenizer = load((harmony if name == "harmony" else FAMILIES[name].folder)(tmp_path))
    with serving(lambda: ScriptedEngine(tokenizer, says(tokenizer, thought + ANSWER))) as running:
        body = {**ASK, "logprobs": True, "stop": stop}
        choice = httpx.post(running.url + CHAT, json=body).json()["choices"][0]
        tokens = [bytes(log["bytes"]) for log in choice["logprobs"]["content"]]
        said, content = b"".join(tokens).decode(), choice["message"]["content"]
        assert content == ANSWER[:ANSWER.index("five") if stop == ["five"] else None]
        assert choice["message"]["reasoning_content"] == "hm"
        if stop == ["five"]:  # the last token may say the begin of the stop string too
            assert said.startswith(content) and len(b"".join(tokens[:-1]).decode()) < len(content)
        else:
            assert said == content


def test_offsets_count_characters_of_the_text(demo: Tokenizer) -> None:
    text = "a \u4e16\u00e9\U0001f600 b"
    with serving(lambda: ScriptedEngine(demo, says(demo, text))) as running:
        got = httpx.post(running.url + "/v1/completions", json={"prompt": "x", "logprobs": 0, "stop": ["zzz"]}).json()
        logs = got["choices"][0]["logprobs"]
        said = got["choices"][0]["text"]
        for token, at in zip(logs["tokens"], logs["text_offset"], strict=True):
            assert said[at:].startswith(token) or "\ufffd" in token
        assert logs["text_offset"][-1] == len(said) - 1


def test_of_mistrals_list_only_the_first_call_is_told_where_one_is_asked_for(demo: Tokenizer) -> None:
    text = f'{MARKED}[{{"name": "f", "arguments": {{}}}}, {{"name": "g", "arguments": {{}}}}]'
    prompt = demo.prompt([Message("user", "Hi")])
    answering = Answering(demo, Asked(0, prompt, Generation().params, one_call=True))
    parser = MistralParser(prompt)
    told = list(answering._parts(parser.push(text) + parser.finish(), parser))
    assert [event.call.name for event in told if isinstance(event, Called)] == ["f"]


def test_a_job_that_is_cancelled_between_two_choices_fails(demo: Tokenizer) -> None:
    scripted: Any = ScriptedEngine(demo, says(demo, "one"))
    engine = EngineThread(lambda: scripted, Options())
    engine.start()
    while engine.state == "loading":
        pass
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, Ended):
            job.cancel.set()

    job = Job(engine.ready().prepare(Generation(messages=(Message("user", "Hi"),), choices=2)), "me", emit)
    engine.submit(job)
    while not events or not isinstance(events[-1], Failed | Finished):
        pass
    engine.stop()
    assert engine.join(30) and isinstance(events[-1], Failed) and isinstance(events[-1].error, NotReady)


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": 1e999}', '{"a": NaN}', "[1]", "{",
                                       '{"a":' * 99 + "1" + "}" * 99])
def test_arguments_that_no_client_can_read_stand_under_one_key(arguments: str, tmp_path: Path) -> None:
    assert arguments_object(arguments) == {"arguments": arguments}
    tokenizer = load(FAMILIES["qwen3"].folder(tmp_path))
    call = "<tool_call>\n" + json.dumps({"name": "f", "arguments": arguments}) + "\n</tool_call>"
    function = {"name": "f", "parameters": {"type": "object"}}
    with serving(lambda: ScriptedEngine(tokenizer, says(tokenizer, call))) as running:
        for stream in (False, True):
            got = httpx.post(running.url + "/v1/messages", json={
                **ASK, "model": "demo", "max_tokens": 9999, "stream": stream,
                "tools": [{"name": "f", "input_schema": {"type": "object"}}]})
            assert got.status_code == 200 and "error" not in got.text and "tool_use" in got.text
            got = httpx.post(running.url + "/api/chat", json={
                **ASK, "model": "demo", "stream": stream, "tools": [{"type": "function", "function": function}]})
            assert got.status_code == 200 and "error" not in got.text
            calls = json.loads(got.text.splitlines()[0])["message"]["tool_calls"]
            assert calls[0]["function"]["arguments"] == {"arguments": arguments}
            got = httpx.post(running.url + "/v1/responses", json={
                "input": "Hi", "stream": stream, "tools": [{"type": "custom", "name": "f"}]})
            assert got.status_code == 200 and "failed" not in got.text and "custom_tool_call" in got.text
        back = [*ASK["messages"], {"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": arguments}}]}, {"role": "tool", "content": "r"}]
        assert httpx.post(running.url + CHAT, json={"messages": back}).status_code == 200


def test_a_line_is_a_line_for_every_client(demo: Tokenizer) -> None:
    """httpx, and so ollama's client, takes U+2028 and others for the end of one."""
    text = "a\u2028b\u2029c\x85d\u00e9"
    with serving(lambda: ScriptedEngine(demo, says(demo, text))) as running:
        got = httpx.post(running.url + "/api/chat", json={**ASK, "model": "demo"})
        assert "".join(json.loads(line)["message"]["content"] for line in got.text.splitlines()) == text

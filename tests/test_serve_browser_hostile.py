"""What a model or a server writes into the page, in a headless Chromium: hostile text, reasoning, errors, refusals.
Skipped as test_serve_browser_chats.py is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import Running, ScriptedEngine, says, serving
from tokenizer_files import demo_folder

from qmix.tokenizer import Tokenizer
from qmix.tokenizer import load as load_tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
from browser_tabs import HOSTILE, Tab  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(demo_folder(tmp_path_factory.mktemp("demo")))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer, says(tokenizer, "the first answer", "the second answer", "the third answer"))


@pytest.fixture
def running(engine: ScriptedEngine) -> Iterator[Running]:
    with serving(lambda: engine) as running:
        yield running


def test_what_a_model_writes_is_inert(tokenizer: Tokenizer, tabs: Callable[..., Tab]) -> None:
    engine = ScriptedEngine(tokenizer, says(tokenizer, HOSTILE))
    with serving(lambda: engine) as running:
        tab = tabs(running)
        page = tab.page
        tab.ask("<b>bold?</b>")
        tab.wait()
        answer = page.locator("li.assistant > .text")
        playwright.expect(answer.locator("table td").first).to_have_text("1")
        assert page.evaluate("window.hacked") is None
        assert answer.locator("script, img, iframe, svg, style, details, [style], [id], [name], [onerror]").count() == 0
        assert page.locator("li.user > .text").inner_text() == "<b>bold?</b>"
        assert "onerror" in answer.inner_text()  # shown, not run
        hrefs = [link.get_attribute("href") for link in answer.locator("a").all()]
        assert "https://good.example/a" in hrefs and not [one for one in hrefs if one and "javascript" in one]
        assert {link.get_attribute("rel") for link in answer.locator("a").all()} == {"noopener noreferrer nofollow"}
        assert answer.locator(".code pre").inner_text().strip() == "<script>window.hacked = 4</script>"
        assert answer.locator("strong").inner_text() == "bold" and answer.locator("h3").first.inner_text() == "Title"


def chunks(*deltas: dict[str, str], end: str = "data: [DONE]\n\n") -> str:
    said = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return ": ping\n\n" + "".join(f"data: {json.dumps(one)}\n\n" for one in said) + end


def test_reasoning_is_folded_and_sent_back(running: Running, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running)
    page = tab.page
    bodies: list[Any] = []

    def answer(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        route.fulfill(content_type="text/event-stream", body=chunks(
            {"reasoning_content": "Let me *think*"}, {"reasoning_content": " more."}, {"content": "Forty-"},
            {"content": "two."}))

    page.route("**/v1/chat/completions", answer)
    tab.ask("What is it?")
    tab.wait()
    tab.until(["What is it?", "Forty-two."])
    thought = page.get_by_text("Let me think more.")
    playwright.expect(thought).to_be_hidden()
    page.locator("li.assistant summary").click()
    playwright.expect(thought).to_be_visible()
    tab.ask("Sure?")
    tab.wait()
    assert bodies[1]["messages"][1] == {"role": "assistant", "content": "Forty-two.",
                                        "reasoning_content": "Let me *think* more."}


@pytest.mark.parametrize(("end", "said"), [
    ("", "The connection broke before the answer was complete."),
    ('data: {"error": {"message": "the grammar cannot go on"}}\n\ndata: [DONE]\n\n', "the grammar cannot go on")])
def test_what_had_come_before_an_error_stays(running: Running, tabs: Callable[..., Tab], end: str, said: str) -> None:
    tab = tabs(running)
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream", body=chunks({"content": "Half an"}, end=end)))
    tab.ask("Hello")
    tab.wait()
    tab.until(["Hello", "Half an"])
    playwright.expect(tab.page.locator("li.assistant .trouble")).to_have_text(said)


def test_what_the_server_refuses_is_told(tokenizer: Tokenizer, tabs: Callable[..., Tab]) -> None:
    engine = ScriptedEngine(tokenizer, says(tokenizer, "one"), context=16)
    with serving(lambda: engine) as running:
        tab = tabs(running)
        tab.ask("far too long " * 30)
        tab.wait()
        playwright.expect(tab.page.locator("li.assistant .trouble")).to_contain_text("the context holds 16")
        assert len(tab.errors) == 1 and "400" in tab.errors.pop()


def test_the_policy_stands_behind(running: Running, tabs: Callable[..., Tab]) -> None:
    """Even where a script of the page would put a text of a model into the page as HTML."""
    tab = tabs(running)
    with pytest.raises(playwright.Error, match="TrustedHTML"):
        tab.page.evaluate("document.body.innerHTML = '<img src=x onerror=alert(1)>'")
    with pytest.raises(playwright.Error, match="Failed to fetch"):
        tab.page.evaluate("fetch('https://evil.example/')")
    assert any("connect-src" in line for line in tab.errors)
    tab.errors.clear()
    tab.elsewhere.clear()

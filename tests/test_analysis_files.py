"""`qmix stats -f` as a user meets it: the coloured text, the plots and files, and figures of trained models."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from test_analysis import SUBJECT, fed, random_tokens
from test_cli import qmix, refused

from qmix import render
from qmix.analysis import plots
from qmix.analysis.folder import PLOTS, STATS, TABLE, TEXT, prepare, write
from qmix.analysis.report import Document, document
from qmix.analysis.texts import names
from qmix.analysis.view import View, coloured, colours, page, plain
from qmix.config import QuantConfig
from qmix.demo import demo_store
from qmix.engine import Engine, load
from qmix.errors import UsageError
from qmix.kernels.table import native_block
from qmix.render import wants_color

VIEW = View("<b>", ["", "<script>alert(1)</script>", " &amp;", "\x1b[2J\n", "x"],
            [(0, 1), (3, 1), (3, 2), (3, 0), (5, 7)], 9)
TEXTS = ("The fox carries a lantern through the wood. " * 8, "What is a Mixture-of-Experts model? It has routers. " * 8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_store(tmp_path_factory.mktemp("analysis") / "demo", lambda line: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, text in zip(("fox.txt", "moe.txt"), TEXTS, strict=True):
        (folder / name).write_text(text)
    return [folder / "fox.txt", folder / "moe.txt"]


class Page(HTMLParser):
    """Tags with their attributes, and the text inside of those that carry experts."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "data-e" in dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        self.text += data if self._inside else ""


def test_the_page_shows_the_text_and_nothing_in_it_becomes_markup() -> None:
    found = Page(page("<i>model", 8, [VIEW]))
    assert found.text == "<script>alert(1)</script> &amp;\u241b[2J\nx"
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not {"b", "i"} & {tag for tag, _ in found.tags}
    tokens = [attrs for _, attrs in found.tags if "data-e" in attrs]
    assert [attrs["data-e"] for attrs in tokens] == ["3,1", "3,2", "3,0", "5,7"]
    assert [attrs["data-n"] for attrs in tokens] == ["1", "2", "0", "7"]  # layer 1 is shown at first
    assert [attrs["title"] for attrs in tokens] == [f"expert {n}" for n in (1, 2, 0, 7)]
    assert sum(tag == "option" for tag, _ in found.tags) == 2


def test_the_page_needs_nothing_else_and_says_what_it_leaves_out() -> None:
    source = page("m", 8, [VIEW])
    assert not re.search(r"https?:|src=|@import|url\(", source) and "5 of 9 tokens" in source
    assert page("m", 8, [VIEW]) == source


@pytest.mark.parametrize("experts", [1, 8, 64])
def test_colours_differ_and_black_letters_are_legible_on_them(experts: int) -> None:
    found = colours(experts)
    assert len(set(found)) == experts

    def luminance(colour: str) -> float:  # WCAG 2.2
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    assert all((luminance(colour) + 0.05) / 0.05 > 7 for colour in found)


def test_without_colours_the_numbers_stand_in_the_text() -> None:
    assert plain(VIEW, 0) == "[3]<script>alert(1)</script> &amp;\u241b[2J\n[5]x"


def test_with_colours_each_expert_has_its_own() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False)
    console.print(coloured(VIEW, 0, 8))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    backgrounds = dict(re.findall(r"\x1b\[30;48;2;(\d+;\d+;\d+)m (\d) ", out))
    assert len(backgrounds) == 8 and "\x1b[2J" not in out
    assert re.search(r"48;2;([\d;]+)mx", out).group(1) == next(  # type: ignore[union-attr]
        colour for colour, expert in backgrounds.items() if expert == "5")


@pytest.mark.parametrize(("no_color", "terminal", "coloured"),
                         [("", True, True), ("1", True, False), ("", False, False)])
def test_colours_only_where_they_are_wanted(store: Path, files: list[Path], no_color: str, terminal: bool,
                                            coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr(render, "wants_color", lambda stream, environ: wants_color(Terminal(), environ))
    done = qmix("stats", store, "-f", files[0], "--view", 2, "-t", 1, NO_COLOR=no_color, TERM="xterm-256color",
                COLORTERM="", FORCE_COLOR="")
    assert done.returncode == 0, done.stderr
    assert ("\x1b[" in done.stdout) == coloured
    assert bool(re.search(r"\[\d\]The", done.stdout)) == (not coloured)
    assert "fox, layer 2, " in done.stdout


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    pytest.importorskip("matplotlib")
    return plots.draw(report())


def report() -> Document:
    figures = [(name, fed([random_tokens(60, seed=layer + 10 * number) for layer in range(3)]))
               for number, name in enumerate(("a", "_b $x$", "c<&"))]
    return document(SUBJECT, figures)


def test_plots_are_drawn(drawn: dict[str, str]) -> None:
    assert sorted(drawn) == sorted(PLOTS)
    for name, source in drawn.items():
        assert source.startswith("<?xml") and "<dc:date>" not in source
        Page(source)
        assert "c&lt;&amp;" in source and "_b $x$" in source, name


def test_plots_have_no_colour_and_texts_differ_without_it(drawn: dict[str, str]) -> None:
    for name, source in drawn.items():
        for colour in re.findall(r"#([0-9a-f]{6})\b", source):
            assert colour[:2] == colour[2:4] == colour[4:], (name, colour)
    bars, lines = [plots.bar_style(n) for n in range(24)], [plots.line_style(n) for n in range(24)]
    for styles in (bars, lines):
        assert len({json.dumps(style) for style in styles}) == 24
    assert len({style["hatch"] for style in bars[:8]}) == 8
    assert len({style["marker"] for style in lines[:8]}) == 8
    assert all(a["facecolor"] != b["facecolor"] for a, b in pairwise(bars))


def test_a_missing_matplotlib_is_said_before_anything_is_loaded(store: Path, files: list[Path], tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = qmix("stats", store, "-f", files[0], "--plot", tmp_path / "out")
    refused(done, 1, "matplotlib", "pip install 'qmix[plots]'")
    assert not (tmp_path / "out").exists()
    assert qmix("stats", store, "-f", files[0], "-t", 1).returncode == 0  # nothing else needs it


def test_the_whole_command(store: Path, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "out"
    args = ("stats", store, "-f", files[0], "-f", files[1], "-c", 64, "-t", 1)
    done = qmix(*args, "--json", "--plot", out)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == sorted([STATS, TABLE, TEXT, *PLOTS])
    found = json.loads(done.stdout)
    assert found == json.loads((out / STATS).read_text())
    assert [text["text"] for text in found["texts"]] == ["fox", "moe"] and found["window"] == 64
    for text, words in zip(found["texts"], TEXTS, strict=True):
        for row in text["by_layer"]:
            assert sum(row["chosen"]) == 2 * text["tokens"] == 2 * sum(row["chosen_first"])
            assert row["pairs"] == text["tokens"] - -(-text["tokens"] // 64)
            assert (row["recall"]["ahead"] is None) == (row["layer"] == 0)
        assert words.strip() in Page((out / TEXT).read_text()).text
    table = (out / TABLE).read_text()
    assert list(csv.DictReader(io.StringIO(table)))[-1]["text"] == "moe"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = qmix(*args, "--csv", "--plot", out)
    assert again.returncode == 0 and again.stdout == table
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before  # plots too are the same twice


def test_a_text_is_cut_only_with_a_word(store: Path, files: list[Path]) -> None:
    done = qmix("stats", store, "-f", files[0], "-n", 20, "--json", "-t", 1)
    assert json.loads(done.stdout)["texts"][0]["tokens"] == 20 and "fox: the first 20 of" in done.stderr


def test_flags_that_make_no_sense_are_refused(store: Path, files: list[Path], tmp_path: Path) -> None:
    refused(qmix("stats", store, "--plot", tmp_path / "out"), 2, "--plot", "-f")
    refused(qmix("stats", store, "--view", 0), 2, "--view", "-f")
    refused(qmix("stats", store, "-f", files[0], "--json", "--csv"), 2, "--json", "--csv")
    refused(qmix("stats", store, "-f", files[0], "--view", 6), 2, "--view 6", "0 to 5")
    refused(qmix("stats", store, "-f", files[0], "--reset"), 2, "--reset")
    refused(qmix("stats", store, "-f", tmp_path / "none"), 2, "none")


def test_foreign_files_are_never_overwritten(store: Path, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "hits.svg").write_text("mine")
    refused(qmix("stats", store, "-f", files[0], "--plot", tmp_path), 2, "hits.svg", "another folder")
    assert (tmp_path / "hits.svg").read_text() == "mine"
    (tmp_path / "file").write_text("")
    refused(qmix("stats", store, "-f", files[0], "--plot", tmp_path / "file"), 2, "file")
    for content in ("[]", "{}", "not json", "[" * 100_000):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / STATS).write_text(content)
        with pytest.raises(UsageError, match=STATS):
            prepare(tmp_path / "out")


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    prepare(tmp_path)
    write(tmp_path, {STATS: '{"qmix_routing": 1}', TABLE: "a"})
    prepare(tmp_path)
    write(tmp_path, {STATS: '{"qmix_routing": 1}', TABLE: "b"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "notes.txt": "mine", STATS: '{"qmix_routing": 1}', TABLE: "b"}


def test_texts_have_names_of_their_own() -> None:
    assert names([Path("x/a.txt"), Path("y/b.txt")]) == ["a", "b"]
    assert names([Path("a.txt"), Path("a.md")]) == ["a.txt", "a.md"]
    assert names([Path("x/a.txt"), Path("y/a.txt")]) == ["x/a.txt", "y/a.txt"]
    assert len(set(names([Path("a"), Path("a")]))) == 2
    assert "chance" not in names([Path("chance.txt")])
    assert names([Path(os.fsdecode(b"\xff\x1b"))]) == ["?\u241b"]


class Every:
    """A recorder that keeps everything."""

    guess_prompts = True

    def __init__(self) -> None:
        self.kept: list[tuple[int, list[list[int]], list[list[int]] | None]] = []

    def drop_pass(self) -> None: ...

    def add(self, layer: int, ids: list[list[int]], weights: object, ahead: list[list[int]] | None) -> None:
        self.kept.append((layer, ids, ahead))

    def end_pass(self, phase: str, sequence: object) -> None: ...


def walked(store: Path, decode: bool) -> list[list[tuple[list[int], list[int] | None]]]:
    """By layer and token: the choices, and the guesses for the next layer."""
    recorder = Every()
    with load(store, threads=1, context=128, trace=recorder) as engine:
        ids, session = engine.tokenizer.encode(TEXTS[0])[:100], engine.session()
        for start in range(0, len(ids), 1 if decode else 100):
            if decode:
                session.decode(ids[start])
            else:
                session.prefill(ids[start:start + 100])
        layers = engine.model.num_layers
    found: list[list[tuple[list[int], list[int] | None]]] = [[] for _ in range(layers)]
    for layer, chosen, ahead in recorder.kept:
        found[layer] += zip(chosen, ahead or [None] * len(chosen), strict=True)
    return found


def test_a_prompt_is_guessed_as_decoding_guesses_it(store: Path) -> None:
    """Other kernels compute a prompt, so a choice on the edge may fall otherwise; nearly all are the same."""
    prompt, decoded = walked(store, decode=False), walked(store, decode=True)
    assert all(ahead is None for _, ahead in prompt[-1])
    for layer in range(len(prompt) - 1):
        same = [a == b for a, b in zip(prompt[layer], decoded[layer], strict=True)]
        assert len(same) > 80 and sum(same) >= 0.9 * len(same), layer
        assert all(ahead is not None and len(ahead) == 2 for _, ahead in prompt[layer])


def test_recording_changes_no_logits(store: Path) -> None:
    def logits(engine: Engine) -> list[float]:
        return engine.session().prefill(engine.tokenizer.encode(TEXTS[0])[:100]).tolist()

    with load(store, threads=1, context=128) as plain, load(store, threads=1, context=128, trace=Every()) as watched:
        assert logits(plain) == logits(watched)


@pytest.mark.models  # its 20,000 tokens take half a minute; the figures of small models have naive counts
def test_the_table_of_the_trained_model_is_reproduced(wiki_moe: Path, tmp_path: Path) -> None:
    """Its README has these figures of the checkpoint by another program, on the first 79 windows of 256 tokens of
    held-out text, experts looked up in turn. int4 moves each by less than 0.003."""
    from qmix.checkpoint import Checkpoint
    from qmix.quantize import quantize_checkpoint

    with Checkpoint.open(wiki_moe) as checkpoint:
        quantize_checkpoint(checkpoint, tmp_path / "store", QuantConfig(method="rtn", block=native_block()))
    text = wiki_moe.parents[1] / "data" / "wikitext2-test.txt"
    done = qmix("stats", tmp_path / "store", "-f", text, "-c", 256, "-n", 79 * 256, "--json", "-t", 1)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]*) ?\| ([\d.]+) \| ([\d.]+) \|$",
                      (wiki_moe / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 8
    for row, (_, *known) in zip(json.loads(done.stdout)["texts"][0]["by_layer"], rows, strict=True):
        found = (row["repeat_first"], row["repeat_any"], max(row["share"]), row["recall"]["ahead"],
                 row["lru_hit_in_turn"][3], row["lru_hit_in_turn"][1])
        assert [value for value in found if value is not None] == pytest.approx(
            [float(value) for value in known if value], abs=0.01), row["layer"]



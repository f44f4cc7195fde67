"""The report as pictures, in SVG, readable without colour: each text has its own hatch, or its own line and marker.

The same report gives the same bytes. matplotlib (extra `plots`) is used without pyplot, so it needs neither a display
nor process-wide state.

E experts, L layers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from types import MappingProxyType
from typing import Any

from qmix.analysis.measures import SOURCES
from qmix.analysis.report import Document
from qmix.errors import QmixError

# Dots come last: each is drawn as a path, 60 kB in all.
HATCHES = ("", "////", "xxxx", "\\\\\\\\", "---", "+++", "|||", "..")
GREYS = ("0.85", "1.0", "0.65")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*")
INKS = ("0.0", "0.35", "0.6")
FEW = 16  # experts up to which numbers fit into the fields of a heat map
RULES = MappingProxyType({"svg.hashsalt": "qmix", "svg.fonttype": "none", "font.size": 8, "hatch.linewidth": 0.5,
                          "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True})


def check() -> None:
    """QmixError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise QmixError("--plot: matplotlib is not installed", "pip install 'qmix[plots]'") from None


def draw(report: Document) -> dict[str, str]:
    """{file name: SVG} of all plots."""
    found = {"shares.svg": shares(report), "repeats.svg": repeats(report), "hits.svg": hits(report),
             "lookahead.svg": lookahead(report)}
    return found | ({"together.svg": together(report)} if report["chosen"] > 1 else {})


def shares(report: Document, layers: Sequence[int] | None = None) -> str:
    """Figure 7: the share of all choices that fell on each expert, a panel for each of `layers` (default all), a bar
    for each text, and the line of an even router."""
    layers = range(report["layers"]) if layers is None else layers
    texts, experts = report["texts"], report["experts"]
    width, columns = 0.85 / len(texts), 2 if len(layers) > 3 else 1
    with _figure(max(6, 0.2 * experts) * columns, 1.5 * -(-len(layers) // columns) + 0.6) as (figure, text):
        panels = _panels(figure, len(layers), columns)
        for panel, layer in zip(panels, layers, strict=True):
            for number, one in enumerate(texts):
                at = [expert + (number - (len(texts) - 1) / 2) * width for expert in range(experts)]
                panel.bar(at, [100 * share for share in one["by_layer"][layer]["share"]], width, edgecolor="black",
                          linewidth=0.4, label=_safe(one["text"]), **bar_style(number))
            panel.axhline(100 / experts, color="black", linestyle="--", linewidth=0.8, label="even")
            panel.set(title=f"layer {_number(report, layer)}", ylabel="% of choices",
                      xticks=range(0, experts, 1 if experts <= 32 else 8))
        _legend(figure, panels[0])
        return text(figure)


def repeats(report: Document) -> str:
    """Table 5 over all layers: how often the next token keeps the first choice, and any choice."""
    with _figure(8, 3.2) as (figure, text):
        panels = _panels(figure, 2, 2)
        for panel, metric, title in zip(panels, ("repeat_first", "repeat_any"),
                                        ("first choice repeats", "first or second choice repeats"
                                         if report["chosen"] == 2 else "any choice repeats"), strict=True):
            _by_layer(panel, report, [[row[metric] for row in one["by_layer"]] for one in report["texts"]])
            panel.axhline(100 * report["chance"][metric], color="black", linestyle=(0, (1, 3)), label="chance")
            panel.set(title=title, ylabel="% of neighbouring tokens")
        _legend(figure, panels[0])
        return text(figure)


def hits(report: Document) -> str:
    """The hit rate of an LRU cache by its slots in each layer: of each text, and of each layer over all texts."""
    slots = range(report["chosen"], report["experts"] + 1)
    with _figure(8, 3.6) as (figure, text):
        left, right = _panels(figure, 2, 2)
        for number, one in enumerate(report["texts"]):
            left.plot(slots, [100 * fmean(row["lru_hit"][s - 1] for row in one["by_layer"]) for s in slots],
                      label=_safe(one["text"]), **line_style(number))
        for layer in range(report["layers"]):
            line = [100 * fmean(one["by_layer"][layer]["lru_hit"][s - 1] for one in report["texts"]) for s in slots]
            right.plot(slots, line, label=f"layer {_number(report, layer)}", **line_style(layer))
        for panel, title in ((left, "mean of all layers"), (right, "each layer, mean of all texts")):
            panel.plot(slots, [100 * s / report["experts"] for s in slots], color="black", linestyle=(0, (1, 3)),
                       label="chance")
            panel.set(title=title, xlabel="slots per layer", ylabel="hits, %", ylim=(0, 102))
            panel.legend(frameon=False, fontsize=6, ncols=1 + report["layers"] // 12)
        return text(figure)


def lookahead(report: Document) -> str:
    """How many of a layer's choices were foretold one layer before, a panel for each source of guesses."""
    with _figure(9, 3.2) as (figure, text):
        panels = _panels(figure, 3, 3)
        for panel, source, title in zip(panels, SOURCES, ("its router asked early", "transition statistics",
                                                          "most used experts"), strict=True):
            _by_layer(panel, report, [[row["recall"][source] for row in one["by_layer"]] for one in report["texts"]])
            panel.axhline(100 * report["chance"]["recall"], color="black", linestyle=(0, (1, 3)), label="chance")
            panel.set(title=title, ylabel="choices foretold, %", ylim=(0, 102))
        _legend(figure, panels[0])
        return text(figure)


def together(report: Document) -> str:
    """Which experts are chosen together: tokens over what their popularity explains, in the first, middle and last
    layer, a row for each text."""
    layers = sorted({0, report["layers"] // 2, report["layers"] - 1})
    texts, experts = report["texts"], report["experts"]
    with _figure(2.6 * len(layers) + 0.8, 2.4 * len(texts)) as (figure, text):
        panels = _panels(figure, len(layers) * len(texts), len(layers))
        places = [(one, layer) for one in texts for layer in layers]
        for panel, (one, layer) in zip(panels, places, strict=True):
            grid = [[float("nan")] * experts for _ in range(experts)]
            for pair in one["by_layer"][layer]["together"]:
                a, b = pair["a"], pair["b"]
                lift = pair["tokens"] / pair["expected"] if pair["expected"] else float("nan")
                grid[a][b] = grid[b][a] = lift
                if experts <= FEW and lift == lift:
                    for x, y in ((a, b), (b, a)):
                        panel.text(x, y, f"{lift:.1f}", ha="center", va="center", fontsize=5,
                                   color="white" if lift > 1.3 else "black")
            image = panel.imshow(grid, cmap="Greys", vmin=0, vmax=2, interpolation="nearest")
            panel.set(title=f"{_safe(one['text'])}, layer {_number(report, layer)}", xlabel="expert", ylabel="expert")
        figure.colorbar(image, ax=panels, shrink=0.6, label="times as often as by popularity")
        return text(figure)


def bar_style(number: int) -> dict[str, Any]:
    """Different for 24 texts."""
    return {"hatch": HATCHES[number % len(HATCHES)], "facecolor": GREYS[number % len(GREYS)]}


def line_style(number: int) -> dict[str, Any]:
    """Different for 24 lines."""
    return {"linestyle": LINES[number % len(LINES)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4,
            "color": INKS[number % len(INKS)], "linewidth": 1, "markerfacecolor": "white"}


def _number(report: Document, at: int) -> int:
    """The model's number of the layer that is the at-th with experts."""
    number: int = report["texts"][0]["by_layer"][at]["layer"]
    return number


def _by_layer(panel: Any, report: Document, values: Sequence[Sequence[float | None]]) -> None:
    """A line for each text, of its values by layer; layers without one are left out."""
    for number, (one, shares) in enumerate(zip(report["texts"], values, strict=True)):
        known = [(_number(report, at), 100 * share) for at, share in enumerate(shares) if share is not None]
        panel.plot([layer for layer, _ in known], [share for _, share in known], label=_safe(one["text"]),
                   **line_style(number))
    panel.set(xlabel="layer")


def _panels(figure: Any, count: int, columns: int) -> list[Any]:
    rows = -(-count // columns)
    return [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _legend(figure: Any, panel: Any) -> None:
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)


def _safe(name: str) -> str:
    """A name as it is: matplotlib would read formulas between dollars, and hide what begins with an underscore."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Callable[[Any], str]]]:
    """(a figure of that size in inches, what turns it into SVG)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    def text(figure: Any) -> str:
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
        return out.getvalue()

    with rc_context(dict(RULES)):  # type: ignore[arg-type]
        yield Figure(figsize=(width, height)), text

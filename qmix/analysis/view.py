"""A text coloured by the expert that each token chose first (figure 8): as a page, and for a terminal.

Nothing is shown by colour alone: on the page every token has its expert's number, in the terminal a legend names the
colours, and without colours the numbers stand in the text.
"""

from __future__ import annotations

import colorsys
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from qmix.render import clean

# Light enough for black letters; the first eight after Okabe and Ito's palette for the colour-blind.
PALETTE = ("#f7c66b", "#9bd4f5", "#7fd1b0", "#f6ee86", "#8fb4e6", "#f0a07c", "#e3aed0", "#cfcfcf")

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>First choices of {model}</title>
<style>
body {{ font: 16px/1.9 Georgia, serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #000;
 background: #fff }}
header, h2 {{ font-family: sans-serif; line-height: 1.4 }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere }}
[data-n]::before {{ content: attr(data-n); font: 9px sans-serif; vertical-align: super; margin-right: 1px }}
{colours}
</style></head><body>
<header><h1>First choices of {model}</h1>
<p><label>Layer <select id="layer">{options}</select></label></p>
<p>Each token has the colour and the small number of the expert that its router chose first: {legend}</p>
<noscript><p>Without scripts only layer {shown} can be shown.</p></noscript></header>
{texts}
<script>
const chooser = document.getElementById("layer");
function paint() {{
  for (const token of document.querySelectorAll("[data-e]")) {{
    const expert = token.dataset.e.split(",")[chooser.value];
    token.className = "e" + expert;
    token.dataset.n = expert;
    token.title = "expert " + expert;
  }}
}}
chooser.addEventListener("change", paint);
paint();
</script></body></html>
"""


@dataclass(frozen=True, slots=True)
class View:
    """The first tokens of a text. pieces: their texts, joined the text itself; firsts: for each, its first choice by
    layer; tokens: how many the text has in all."""

    name: str
    pieces: Sequence[str]
    firsts: Sequence[Sequence[int]]
    tokens: int

    def limit(self) -> str:
        """What is shown of it."""
        return f"{len(self.pieces):,} of {self.tokens:,} tokens" if len(self.pieces) < self.tokens else \
            f"{self.tokens:,} tokens"


def colours(experts: int) -> list[str]:
    """A light colour for each expert, as #rrggbb; beyond those of PALETTE hues by the golden angle."""
    found = list(PALETTE[:experts])
    for n in range(len(found), experts):
        rgb = colorsys.hls_to_rgb(n * 0.381966 % 1, (0.72, 0.8, 0.87)[n % 3], 0.7)
        found.append("#" + "".join(f"{round(255 * part):02x}" for part in rgb))
    return found


def page(model: str, experts: int, views: Sequence[View], numbers: Sequence[int] = ()) -> str:
    """All views as one HTML page that needs nothing else, with a chooser for the layer. numbers: what the layers are
    called, () for 0, 1, 2..."""
    numbers = numbers or range(len(views[0].firsts[0]))
    shown = len(numbers) // 2
    names = [(e, colour) for e, colour in enumerate(colours(experts))]
    legend = " ".join(f'<span class="e{e}">&nbsp;{e}&nbsp;</span>' for e, _ in names)
    options = "".join(f'<option value="{layer}"{" selected" if layer == shown else ""}>{number}</option>'
                      for layer, number in enumerate(numbers))
    texts = "\n".join(f'<h2>{html.escape(view.name)} <small>({view.limit()})</small></h2>\n'
                      f'<div class="text">{"".join(_spans(view, shown))}</div>' for view in views)
    return PAGE.format(model=html.escape(model), options=options, legend=legend, shown=numbers[shown], texts=texts,
                       colours="\n".join(f".e{e} {{ background: {colour} }}" for e, colour in names))


def _spans(view: View, shown: int) -> Iterator[str]:
    for piece, firsts in zip(view.pieces, view.firsts, strict=True):
        if piece:  # silent tokens, and parts of a character whose rest follows
            expert = firsts[shown]
            yield (f'<span class="e{expert}" data-n="{expert}" title="expert {expert}" '
                   f'data-e="{",".join(map(str, firsts))}">{html.escape(clean(piece))}</span>')


def plain(view: View, layer: int) -> str:
    """The text with the expert in brackets wherever it changes: "[3]The fox[5] sat"."""
    return "".join(f"[{expert}]{run}" for expert, run in _runs(view, layer))


def coloured(view: View, layer: int, experts: int) -> object:
    """The same in colours, as a rich Text, with the legend in front."""
    from rich.text import Text

    palette, text = colours(experts), Text()
    for expert in range(experts):
        text.append(f" {expert} ", f"black on {palette[expert]}").append(" ")
    text.append("\n")
    for expert, run in _runs(view, layer):
        text.append(run, f"black on {palette[expert]}")
    return text


def _runs(view: View, layer: int) -> Iterator[tuple[int, str]]:
    """(expert, text) of neighbouring tokens with the same first choice."""
    tokens = [(firsts[layer], clean(piece)) for piece, firsts in zip(view.pieces, view.firsts, strict=True) if piece]
    for expert, run in groupby(tokens, lambda token: token[0]):
        yield expert, "".join(piece for _, piece in run)

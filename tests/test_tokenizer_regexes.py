"""Regular expressions of tokenizer.json: published ones are taken, and those that could try for hours refused."""

from __future__ import annotations

import random
import re

import pytest

from qmix.gguf.bpe import CUTS
from qmix.tokenizer.regexes import MAX_LENGTH, why_slow

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUBLISHED = {
    **{name: cut.pattern for name, cut in CUTS.items() if cut.pattern is not None},
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "han": "[一-龥぀-ゟ゠-ヿ]+", "digits": r"\p{N}{1,3}", "lines": r"[\r\n]", "spaces": " {2,}", "start": "^▁+",
    "words": r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿ]+", "thousands": r"(?=(?:\d{3})+(?!\d))", "in class": " ?[^(\\s|[.,!?…])]+",
    "marks": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    "without": rf"[\p{{Han}}]+|[\p{{Lu}}\p{{Lo}}&&[^\p{{Han}}]]*[\p{{Ll}}\p{{Lo}}&&[^\p{{Han}}]]+{ENDINGS}?"}
SLOW = {
    "(x+x+)+y": "repetition of what", r"(?:a|aa)+$": "repetition of what", r"(?:a?){20}a{20}": "repetition of what",
    r"(?:.{0,3000}){0,3000}X": "repetition of what", "(?:ab?)*c": "repetition of what",
    r"(?:\p{L}|\s)*X": "repetition of what", r".*.*.*X": "more than one", "(?:a*)?b*c": "more than one",
    r"(?=.*.*X)a": "more than one", "a{0,99}b{0,99}c": "more than one", r"[\s\S]*\x{10FFFF}": "whole texts",
    r"[^\n]*X": "whole texts", r"(?=.*X)a": "whole texts", r"\p{Any}*X": "whole texts", r"(?:\w\s)*X": "whole texts",
    "a?" * 20 + "b": "1048576 ways", "a{0,9}" * 3 + "b": "1000 ways", r"(a)\1": r"\\1", "(?<n>a\\g<n>?)": "group",
    "(?~abc)": "group", "(*FAIL)": "callout", "(?i:a": "bracket", "a)": "bracket", "[a": "class",
    "a**": "of a repetition", "a{2}{3}": "of a repetition", "a{0,9}+b": "of a repetition", "*a": "of nothing",
    "a*(?i)b|c*d": "option", "(" * 99: "groups in groups",
    "a" * (MAX_LENGTH + 1): "characters", "a{9999999}": "999999", r"\X": "cost"}


def matches(atom: str, character: str) -> bool:
    """As Python's expressions have it, with a stand-in for Unicode's properties."""
    atom = re.sub(r"\\x\{\w+\}", "~", re.sub(r"\\p\{Any\}", r"[\\s\\S]", atom))
    return re.fullmatch(re.sub(r"\\[pP]\{\^?\w+\}", "e", atom), character) is not None


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ones_are_taken(name: str) -> None:
    assert why_slow(PUBLISHED[name], lambda atom, c: c == "e") is None


@pytest.mark.parametrize("pattern", SLOW, ids=lambda pattern: pattern[:20])
def test_slow_ones_are_refused(pattern: str) -> None:
    assert re.search(SLOW[pattern], why_slow(pattern, matches) or "is taken")


def tries(items: list[tuple[str, int, int]], text: str, at: int) -> tuple[int, int | None]:
    """(tries of a match by hand, where it ends) of a sequence of (character, least, most) with backtracking."""
    if not items:
        return 1, at
    (c, least, most), *rest = items
    run = 0
    while run < most and text[at + run:at + run + 1] == c:
        run += 1
    count = run
    for length in range(run, least - 1, -1):
        inner, end = tries(rest, text, at + length)
        count += inner
        if end is not None:
            return count, end
    return count + 1, None


@pytest.mark.parametrize("seed", range(60))
def test_no_match_takes_more_tries_than_the_count_says(seed: int) -> None:
    """Sequences of repeated characters: those that are taken stay linear in the text, by a matcher that counts."""
    dice = random.Random(seed)
    items = [(dice.choice("ab"), *dice.choice([(1, 1), (0, 1), (0, 3), (0, 999), (1, 999)]))
             for _ in range(dice.randrange(1, 6))]
    marks = {(1, 1): "", (0, 1): "?", (0, 3): "{0,3}", (0, 999): "*", (1, 999): "+"}
    pattern = "".join(c + marks[least, most] for c, least, most in items)
    if why_slow(pattern, matches) is None:
        for text in ("a" * 40, "b" * 40, "ab" * 20, "a" * 20 + "b" * 20):
            # Each of 64 ways costs a try an item, and a run through the text.
            assert tries(items, text, 0)[0] <= 64 * (len(items) + 1) * (len(text) + 1), pattern

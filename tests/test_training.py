"""The demo model's training text: the same from the same seed, whole sentences, and true to the request."""

from __future__ import annotations

import importlib
import re
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

TRAINING = Path(__file__).parents[1] / "training"


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    return load("corpus")


def load(name: str) -> ModuleType:
    """A module of training/, whose scripts find each other as they do when run from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRAINING))
        return importlib.import_module(name)


def test_the_seed_decides(corpus: ModuleType) -> None:
    first, again, other = (list(islice(corpus.stream(seed), 50)) for seed in (1, 1, 2))
    assert first == again != other


def test_conversations_are_whole(corpus: ModuleType) -> None:
    for messages in islice(corpus.stream(7), 500):
        roles = [m.role for m in messages if m.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) != []
        assert all(m.role != "system" for m in messages[1:])
        for m in messages:
            assert m.content == m.content.strip() != ""
        for answer in (m.content for m in messages if m.role == "assistant"):
            assert not re.search(r"[{}]|  |\bNone\b| [.,!?]", answer), answer
            # A name or a title may stand alone; whatever is longer is a sentence.
            assert len(answer.split()) <= 8 or re.search(r"[.!?`\"]$", answer), answer


def test_a_story_has_what_was_wished_for() -> None:
    stories = load("stories")
    rng = Random(5)
    for _ in range(300):
        wish = stories.random_wish(rng)
        story = stories.tell(wish, rng)
        assert 40 <= len(story.text.split()) <= 200, story.text
        for wanted in (wish.kind, wish.name, wish.thing and wish.thing.noun):
            assert not wanted or wanted in story.text, (wanted, story.text)
        assert stories.ask_story(wish, rng).strip()

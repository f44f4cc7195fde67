"""Short exercises in copying, for the first minutes of the training.

A small model learns its phrases within minutes, but it takes very long to find out that the
fox of the request belongs into the story: in a long text that signal is weak. In these
conversations nearly every word of the answer stands in the request, so the attention heads that
copy come about early, and the stories can build on them.
"""

from __future__ import annotations

from random import Random

from corpus import Message
from stories import random_wish, story_fields, subject

_REQUESTS = ("Tell me a story about {s}", "a story about {s} please", "story about {s}",
             "Can you tell me a story about {s}?", "write a story about {s}", "{s}")
_TALES = (
    "{Hero} was {a_hero} who lived {where}. {Hero} had {a_thing}. {Helper} was {a_helper}.",
    "{Where} lived {a_hero} called {Hero}. {Helper} the {helper} gave {Hero} {a_thing}.",
    "{Hero} the {kind} found {a_thing} {spot}. {Helper} the {helper} wanted the {thing} too.",
    "There was once {a_hero} named {Hero}. {She} and {Helper} the {helper} lived {where}. The "
    "{thing} of {Hero} {trait}.",
)
_QUESTIONS = (
    ("What was the {kind}'s name?", "The {kind}'s name was {Hero}."),
    ("what was the {helper} called", "The {helper} was called {Helper}."),
    ("Who is {Hero}?", "{Hero} is {a_kind}."),
    ("who was {Helper}?", "{Helper} is {a_helper}."),
    ("What did {Hero} have?", "{She} had {a_thing}."),
    ("Where did {Hero} live?", "{Hero} lived {where}."),
    ("What happened?", "{Hero} the {kind} met {Helper} the {helper}. They had {a_thing}."),
)


def drill(rng: Random) -> list[Message]:
    """A request, a tiny tale with what was requested, and up to two questions about it."""
    wish = random_wish(rng)
    fields = story_fields(wish, rng)
    about = subject(wish, rng) or "anything"
    request = rng.choice(_REQUESTS).format(s=about)
    if rng.random() < 0.4:
        request = request.lower()
    messages = [Message("user", request),
                Message("assistant", rng.choice(_TALES).format_map(fields))]
    for question, answer in rng.sample(_QUESTIONS, rng.randint(0, 2)):
        messages.append(Message("user", question.format_map(fields)))
        messages.append(Message("assistant", answer.format_map(fields)))
    return messages


def echo(rng: Random, vocab_size: int, first: int) -> list[int]:
    """Random token ids from `first` on, 3 to 12 of them: to be said once more, word for word."""
    return [rng.randrange(first, vocab_size) for _ in range(rng.randint(3, 12))]

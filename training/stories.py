"""Stories: choose a cast, tell a plot, word the request for it, and answer questions about it.

A `Wish` holds what the user asked for; `None` means "anything". `cast` fills the gaps, `tell`
writes the story, `ask_story` words the request. The story always uses what was wished for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import words
from plots import MOODS, OPENINGS, PLOTS, Plot
from words import Place, Thing, article, capital, owned, plural


@dataclass(frozen=True)
class Wish:
    """What a request names. Every field that is None is free."""

    kind: str | None = None
    adjective: str | None = None
    name: str | None = None
    female: bool | None = None
    thing: Thing | None = None
    place: Place | None = None
    helper: str | None = None
    friend: tuple[str, bool] | None = None  # the helper's name, and whether it is a she
    mood: str | None = None
    plot: Plot | None = None
    theme: str | None = None
    verb: str | None = None


@dataclass(frozen=True)
class Story:
    """A told story: its text, the wish that it came from, and the fields of its templates."""

    text: str
    wish: Wish
    plot: Plot
    fields: dict[str, str]

    def fill(self, template: str) -> str:
        """The template with this story's names and pronouns in it."""
        return template.format_map(self.fields)


def gender(kind: str, rng: Random) -> bool:
    """Whether a character of this kind is a she: fixed for some kinds, a coin toss for the rest."""
    if kind in words.FEMALE_KINDS:
        return True
    return kind not in words.MALE_KINDS and rng.random() < 0.5


def pick_name(female: bool, rng: Random, other_than: str = "") -> str:
    """A first name, never the one given as `other_than`; now and then one of no list."""
    if rng.random() < 0.04:
        return words.capital(words.made_up(rng))
    names = words.FEMALE_NAMES if female else words.MALE_NAMES
    return rng.choice([name for name in names if name != other_than])


def random_wish(rng: Random) -> Wish:
    """A wish with a random set of constraints, from "any story" to a full cast."""
    kind = rng.choice(words.KINDS) if rng.random() < 0.85 else None
    if kind and rng.random() < 0.06:
        kind = words.rare_noun(rng)
    wish = Wish(kind=kind)
    if rng.random() < 0.55:
        thing = rng.choice(words.THINGS)
        if rng.random() < 0.06:
            thing = replace(thing, noun=words.rare_noun(rng))
        wish = replace(wish, thing=thing)
    if rng.random() < 0.25:
        wish = replace(wish, place=rng.choice(words.PLACES))
    if rng.random() < 0.2:
        wish = replace(wish, mood=rng.choice([m for group in MOODS for m in group]))
    if kind and rng.random() < 0.15:
        wish = replace(wish, adjective=rng.choice(words.ADJECTIVES))
    if kind and rng.random() < 0.12:
        female = gender(kind, rng)
        wish = replace(wish, name=pick_name(female, rng), female=female)
    if kind and rng.random() < 0.2:
        wish = replace(wish, helper=rng.choice([k for k in words.KINDS if k != kind]))
    if wish.thing and kind and not wish.helper and rng.random() < 0.3:
        plot = rng.choice(PLOTS)
        wish = replace(wish, plot=plot, verb=rng.choice(plot.verbs))
    elif rng.random() < 0.1:
        plot = rng.choice(PLOTS)
        wish = replace(wish, plot=plot, theme=rng.choice(plot.themes))
    return wish


def story_fields(wish: Wish, rng: Random) -> dict[str, str]:
    """Every template field of a story that keeps to the wish."""
    free = [k for k in words.KINDS if k != wish.helper]
    kind = wish.kind or rng.choice(free)
    female = wish.female if wish.female is not None else gender(kind, rng)
    hero = wish.name or pick_name(female, rng)
    helper = wish.helper or rng.choice([k for k in words.KINDS if k != kind])
    hers = gender(helper, rng)
    friend, hers = wish.friend or (pick_name(hers, rng, other_than=hero), hers)
    thing = wish.thing or rng.choice(words.THINGS)
    place = wish.place or rng.choice(words.PLACES)
    adjective = wish.adjective or rng.choice(words.PLAIN_ADJECTIVES)
    a_hero = article(f"{adjective} {kind}")
    she, her, obj = ("she", "her", "her") if female else ("he", "his", "him")
    return {
        "Hero": hero, "kind": kind, "a_hero": a_hero, "a_kind": article(kind),
        "she": she, "her": her, "obj": obj, "self": obj + "self",
        "She": capital(she), "Her": capital(her),
        "Helper": friend, "helper": helper, "a_helper": article(helper),
        "A_helper": capital(article(helper)), "hshe": "she" if hers else "he",
        "thing": thing.noun, "a_thing": article(thing.noun), "trait": thing.trait,
        "place": place.noun, "where": place.where, "Where": capital(place.where),
        "spot": place.spot,
    }


def tell(wish: Wish, rng: Random) -> Story:
    """A story that keeps to the wish: opening, beats, and what the mood adds."""
    fields = story_fields(wish, rng)
    plot = wish.plot or rng.choice(PLOTS)
    beats = [rng.choice(beat) for beat in plot.beats]
    mood = next((MOODS[group] for group in MOODS if wish.mood in group), None)
    if mood:
        middle, end = mood
        which = rng.randrange(len(middle))  # the two sentences belong together
        beats.insert(plot.mood_at, middle[which])
        beats.append(end[which])
    text = " ".join([rng.choice(OPENINGS), *beats]).format_map(fields)
    return Story(text, wish, plot, fields)


def same_cast(story: Story, rng: Random) -> Wish:
    """A wish for another story with the hero of this one."""
    others = [plot for plot in PLOTS if plot is not story.plot]
    return Wish(
        kind=story.fields["kind"], name=story.fields["Hero"],
        female=story.fields["she"] == "she", plot=rng.choice(others),
    )


def exact(story: Story) -> Wish:
    """The wish that fixes everything of this story, so that it can be told once more."""
    fields = story.fields
    thing = Thing(fields["thing"], fields["trait"])
    place = Place(fields["place"], fields["where"], fields["spot"])
    return replace(
        same_cast(story, Random(0)), thing=thing, place=place, plot=story.plot,
        helper=fields["helper"], mood=story.wish.mood,
        friend=(fields["Helper"], fields["hshe"] == "she"),
    )


def subject(wish: Wish, rng: Random) -> str:
    """The wish as the object of "about": "a brave fox and a lantern in the forest"."""
    parts = []
    if wish.kind:
        full = f"{wish.adjective} {wish.kind}" if wish.adjective else wish.kind
        many = not wish.name and not wish.thing and not wish.helper and rng.random() < 0.15
        parts.append(plural(full) if many and not wish.adjective else article(full))
        if wish.name:
            parts.append(rng.choice(["called", "named", "with the name"]) + " " + wish.name)
    if wish.helper:
        joint = rng.choice(["and", "and", "who meets", "with"])
        parts.append(f"{joint} {article(wish.helper)}")
        if wish.thing and not wish.name and rng.random() < 0.4:
            parts[-2:] = [f"{parts[-2]}, {article(wish.helper)}"]
    if wish.thing:
        noun = article(wish.thing.noun)
        if wish.verb:
            if not wish.helper:
                parts.append("who" if not wish.verb.startswith(("is", "can")) else "that")
                if rng.random() < 0.3:
                    noun = rng.choice(["the ", "an old " if rng.random() < 0.5 else "a new "])
                    noun += wish.thing.noun
            parts.append(f"{wish.verb} {noun}")
        elif parts:
            parts.append(rng.choice(["and", "and", "and", "with", "who has"]) + " " + noun)
        else:
            parts.append(noun)
    if wish.theme:
        parts.append(("and " if parts else "") + wish.theme)
    if wish.place:
        if parts:
            lead = "that takes place " if rng.random() < 0.08 else ""
            parts.append(lead + wish.place.where)
        else:
            parts.append("life " + wish.place.where if rng.random() < 0.3
                         else ("the " if wish.place.noun != "space" else "") + wish.place.noun)
    text = " ".join(parts)
    if rng.random() < 0.08:  # some people leave out the articles
        text = text.removeprefix("a ").removeprefix("an ").replace(" a ", " ").replace(" an ", " ")
    return text


_WITH_SUBJECT = (
    "Tell me a{m} story about {s}", "Tell me a{m} story about {s}", "Tell a{m} story about {s}",
    "Can you tell me a{m} story about {s}?", "Could you tell me a{m} story about {s}?",
    "I want a{m} story about {s}", "I would like a{m} story about {s}", "I'd like to hear a{m} "
    "story about {s}", "Write a{m} story about {s}", "Write me a{m} story about {s}",
    "Write a short{m} story about {s}", "Please write a{m} tale about {s}", "A{m} story about {s}",
    "a{m} story about {s} please", "Make up a{m} story about {s}", "Invent a{m} story about {s}",
    "Do you know a{m} story about {s}?", "Do you have a{m} story about {s}?",
    "How about a{m} story about {s}?", "Give me a{m} story about {s}", "story about {s}",
    "Story: {s}", "Can I have a{m} story about {s}?", "Let's hear a{m} story about {s}",
    "Tell me something{m} about {s}", "Tell me about {s}", "Tell us a{m} tale about {s}",
    "I need a{m} story about {s} for my daughter", "My son wants a{m} story about {s}",
    "Create a{m} story about {s}", "Can you write a{m} story about {s}?", "Now one about {s}",
    "Can you make a{m} story with {s}?", "a{m} tale of {s}", "once upon a time there was {s}",
    "Tell me a{m} story with {s} in it", "Please tell me a{m} bedside story about {s}",
    "Will you tell me a{m} story about {s}?", "Could you write something{m} about {s}?",
    "I'm in the mood for a{m} story about {s}", "i wanna hear a{m} story about {s}",
)

_WITHOUT_SUBJECT = (
    "Tell me a{m} story", "Tell me a{m} story", "Can you tell me a{m} story?", "A{m} story, please",
    "I want a{m} story", "Write a{m} story", "Do you know a{m} story?", "Story!", "Tell a{m} story",
    "Tell me something{m}", "Make up a{m} story for me", "I would like to hear a{m} story",
    "Could you tell me a{m} tale?", "Give me a{m} story", "Tell me any{m} story you like",
    "I'm bored, tell me a{m} story", "I can't sleep, tell me a{m} story", "Entertain me",
    "Let's have a{m} story", "How about a{m} story?", "story time", "write me a{m} short story",
    "Surprise me with a{m} story", "please tell me a{m} story for my kids",
)


def ask_story(wish: Wish, rng: Random) -> str:
    """The user's words for a wish."""
    about = subject(wish, rng)
    mood = f" {wish.mood}" if wish.mood else ""
    if not mood and rng.random() < 0.25:
        mood = rng.choice([" short", " little", " nice", " good"])
    bare = tuple(t for t in _WITH_SUBJECT if "{m}" in t) if wish.mood else _WITH_SUBJECT
    text = rng.choice(bare if about else _WITHOUT_SUBJECT).format(m=mood, s=about)
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}").replace("A " + vowel, "An " + vowel)
    return text.replace(" an unicorn", " a unicorn")


def ask_again(wish: Wish, rng: Random) -> str:
    """The user's words for a next story with this wish ("Another one about a bear")."""
    about = subject(wish, rng)
    if not about:
        return rng.choice((
            "Another one, please", "Another one", "One more", "Tell me another story", "again",
            "More", "Another story please", "Can I have another one?", "And another one",
            "one more story", "Do you know another one?", "next story", "a different story please",
        ))
    return rng.choice((
        "Another one about {s}", "Now one about {s}", "Now a story about {s}", "And one about {s}?",
        "Tell me another one, about {s}", "One more, but with {s}", "Can you do one about {s}?",
        "The next one should be about {s}", "Same, but about {s}", "what about {s}?",
        "And now with {s}, please",
    )).format(s=about)


__all__ = ["Story", "Wish", "ask_again", "ask_story", "exact", "owned", "random_wish",
           "same_cast", "subject", "tell"]

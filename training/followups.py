"""Questions about the story that was just told, and their answers.

Each entry is (questions, answers). Both use the template fields of the story; besides those a
question may use `{they}` and `{them}`, a pronoun as the user guesses it, and `{who}`, one of the
ways to point at the hero.
"""

from __future__ import annotations

from random import Random

from stories import Story, exact, same_cast, tell

_NAME = (
    ("What was {who}'s name?", "What is {who} called?", "What was the name of {who}?",
     "who was the story about", "What was {their} name?", "Does {who} have a name?",
     "Who is the hero of the story?", "Who is the main character?", "what was {who} called"),
    ("The {kind}'s name was {Hero}.", "{Her} name was {Hero}.", "The {kind} was called {Hero}."),
)
_KIND = (
    ("Who is {Hero}?", "Who was {Hero}?", "What kind of animal is {Hero}?", "What is {Hero}?",
     "Is {Hero} {a_kind}?"),
    ("{Hero} is {a_hero}.", "{Hero} is {a_kind}, the hero of the story."),
)
_HELPER = (
    ("Who is {Helper}?", "Who was {Helper}?", "And who is {Helper}?", "Tell me about {Helper}",
     "What kind of animal is {Helper}?", "What is {Helper}?"),
    ("{Helper} is {a_helper}.", "{Helper} is the {helper} in the story."),
)
_FRIEND = (
    ("Who else was in the story?", "Who did {they} meet?", "Who did {who} meet?",
     "What was the {helper}'s name?", "What was the {helper} called?", "Who is the other one?",
     "What was the name of the {helper}?", "who was {their} friend", "Was there anyone else?"),
    ("There was {a_helper} called {Helper}.", "{Helper} the {helper} was in it too."),
)
_HELPED = (
    ("Who helped {them}?", "Who helped {who}?", "Who helped {Hero}?", "did anybody help {them}?"),
    ("{helped}",),
)
_PLACE = (
    ("Where did it happen?", "Where did {they} live?", "Where does {who} live?", "Where was that?",
     "Where does the story take place?", "Where did {who} live?", "where was {Hero}", "Where "
     "was it?"
     ),
    ("It happened {where}.", "{Hero} lived {where}."),
)
_WHAT = (
    ("What did {they} have?", "What was the object in the story?", "What did {they} lose?",
     "What did {they} want?", "what was it about", "What did {who} have?", "What did {who} lose?",
     "What thing was it?"),
    ("{what}",),
)
_FOUND = (
    ("What did {they} find?", "Where did they find it?", "What did {who} find?",
     "Where was the {thing}?", "what did {Hero} find", "Where did {they} find the {thing}?",
     "Did {they} find it?"),
    ("{found}",),
)
_TRAIT = (
    ("What was special about the {thing}?", "What could the {thing} do?", "Tell me about the "
     "{thing}", "What was the {thing} like?", "why was the {thing} special"),
    ("It {trait}.", "The {thing} {trait}."),
)
_WHY = (
    ("Why was {they} sad?", "Why was {who} sad?", "What was the problem?", "What was wrong?",
     "Why was {who} worried?", "Why was {they} afraid?", "why did {they} do that", "Why?",
     "What was {Hero}'s problem?"),
    ("{why}",),
)
_END = (
    ("How did it end?", "How does the story end?", "What happened in the end?",
     "Did it end well?", "Was there a happy ending?", "what was the ending", "How did that end?"),
    ("{end}",),
)
_MORAL = (
    ("What is the moral of the story?", "What is the moral?", "What can I learn from it?",
     "What does the story teach?", "what's the lesson", "What does it mean?", "And the moral?"),
    ("{moral}", "The moral is this. {moral}"),
)
_SHORT = (
    ("Tell it again but shorter", "Shorter, please", "Can you make it shorter?", "too long",
     "Tell me the short version", "Summarize it", "Can you summarize the story?", "make it short",
     "Give me a summary", "In short?", "Please sum it up", "Tell the same story in two sentences",
     "What happened in the story?", "tldr", "tell it shorter"),
    ("{short}",),
)
_NEXT = (
    ("What happens next?", "And then?", "Go on", "Continue", "What happened then?", "continue the "
     "story", "Please go on", "And what happened after that?", "then what", "keep going",
     "Is there more?", "Tell me more", "What happened next?", "more of that story please"),
    ("{after}",),
)
_TITLE = (
    ("What is the title?", "Give it a title", "What is the story called?", "does it have a title",
     "Can you give the story a title?", "What would you call it?"),
    ("The {Kind} and the {Thing}", "I would call it \"The {Kind} and the {Thing}\"."),
)
_TRUE = (
    ("Is that a true story?", "Is it true?", "Did that really happen?", "Is this real?",
     "Did you make that up?", "really?", "Where did you get that story?"),
    ("No, I made it up just now.", "No, {Hero} the {kind} lives only in this story."),
)
_PRAISE = (
    ("I liked that", "Nice story", "That was nice", "That was a lovely story", "Great story!",
     "Beautiful", "I love it", "that was good", "wow", "Haha", "cool story", "well done",
     "Good one", "That was fun", "nice one", "lovely", "very nice, thanks"),
    ("Thank you! Would you like another one?", "I am glad you liked it. Shall I tell you another?",
     "Thank you! {Hero} the {kind} says hello."),
)
_BLAME = (
    ("I don't like it", "That was boring", "That was bad", "I did not like that story", "boring",
     "That makes no sense", "that was a stupid story", "meh", "That's not a good story"),
    ("I am sorry. Tell me who should be in the next one, and I will try again.",
     "That is a pity. Shall I try another one? Give me an animal and a thing."),
)

_ALL = (_NAME, _NAME, _NAME, _KIND, _HELPER, _FRIEND, _HELPED, _PLACE, _PLACE, _WHAT, _WHAT, _FOUND,
        _FOUND, _TRAIT, _WHY, _WHY, _END, _MORAL, _SHORT, _SHORT, _NEXT, _NEXT, _TITLE, _TRUE,
        _PRAISE, _PRAISE, _BLAME)

_AGAIN = ("Tell it again", "Tell me that story again", "Can you tell it again?", "once more please",
          "Tell the same story again", "tell it differently", "again the same one",
          "Tell it in other words")
_SAME_HERO = ("Tell me another story about {Hero}", "Another story about {Hero}, please",
              "Another one with {Hero}", "One more about the same {kind}", "more about {Hero}",
              "I want to hear more about {Hero}", "a new story with {Hero} please",
              "Tell me another one about {Hero} the {kind}")


def follow_up(story: Story, rng: Random) -> tuple[str, str]:
    """One (question, answer) about the story."""
    questions, answers = rng.choice(_ALL)
    fields = dict(story.fields)
    # Users guess: most of the time the right pronoun, sometimes "it" or "they".
    guess = rng.random()
    if guess < 0.7:
        their, them, they = fields["her"], fields["obj"], fields["she"]
    else:
        their, them, they = ("its", "it", "it") if guess < 0.9 else ("their", "them", "they")
    pointers = (f"the {fields['kind']}",) * 3 + (fields["Hero"],)
    if questions is _NAME[0]:
        pointers = (f"the {fields['kind']}", "the hero")
    fields.update(
        who=rng.choice(pointers), they=they, their=their, them=them,
        Kind=_title(fields["kind"]), Thing=_title(fields["thing"]),
    )
    for key in ("helped", "what", "found", "why", "end", "moral", "short", "after"):
        fields[key] = story.fill(getattr(story.plot, key))
    question = rng.choice(questions).format_map(fields)
    answer = rng.choice(answers).format_map(fields)
    return question.replace("they was", "they were"), answer


def retell(story: Story, rng: Random) -> tuple[str, Story]:
    """A request for the same story or the same hero once more, and that story."""
    if rng.random() < 0.5:
        return rng.choice(_AGAIN), tell(exact(story), rng)
    return rng.choice(_SAME_HERO).format_map(story.fields), tell(same_cast(story, rng), rng)


def _title(phrase: str) -> str:
    """The phrase as in a title: every word but "of" with a capital."""
    return " ".join(w if w == "of" else w.capitalize() for w in phrase.split())

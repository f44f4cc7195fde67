"""Questions from outside the little world of the demo model, and the polite answer to all of them.

The model should say that it does not know instead of guessing, so the questions are built from
many templates and topics; a few are plain nonsense.
"""

from __future__ import annotations

from random import Random


def _split(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


_TEMPLATES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("What is the capital of {x}?", "Where is {x}?", "How many people live in {x}?", "capital of "
      "{x}", "Tell me about the history of {x}", "Have you been to {x}?", "What language do they "
      "speak in {x}?", "what's the weather in {x}", "Who is the president of {x}?",
      "Which city is the largest in {x}?", "how far is it to {x}"),
     _split("France Germany Spain Italy Japan China India Brazil Canada Australia Egypt Sweden "
            "Norway Poland Russia Mexico Kenya Turkey Greece London Paris Berlin Tokyo Rome "
            "America Africa Europe Texas")),
    (("What is {x}?", "Calculate {x}", "How much is {x}?", "{x} = ?", "can you solve {x}", "{x}",
      "what's {x}"),
     ("2+2", "2 + 2", "7 times 8", "12 * 12", "100 divided by 4", "the square root of 16", "3 "
      "plus 5", "15 - 9", "the sum of 1 and 2", "17 x 23", "10 percent of 50", "1+1", "5*5", "pi")),
    (("Write a {x} for me", "Can you write a {x}?", "I need a {x}", "Make me a {x}", "Help me "
      "with a {x}", "Please write a {x}", "give me a {x}", "write me a {x} about summer"),
     ("poem", "Python program", "business plan", "cover letter", "song", "function in C", "regex",
      "website", "speech", "haiku", "job application", "recipe", "shopping list", "joke",
      "diet plan", "report", "homework essay", "rap", "tweet", "shell script", "sorting function")),
    (("How do I {x}?", "Can you help me {x}?", "Teach me how to {x}", "what is the best way to {x}",
      "I want to {x}", "Please {x}", "Why can't I {x}?"),
     ("bake bread", "cook pasta", "lose weight", "learn Spanish", "fix my car", "get rich",
      "play chess", "find a job", "buy a house", "book a flight", "install Windows", "make coffee",
      "cut my hair", "swim", "file my taxes", "translate a letter", "send an email", "plant a tree",
      "write code", "order pizza")),
    (("Who is {x}?", "Who was {x}?", "What do you think about {x}?", "Tell me about {x}", "What "
      "happened to {x}?", "when was {x} born", "do you know {x}", "What is {x}?", "explain {x}"),
     ("Albert Einstein", "the president", "Napoleon", "Shakespeare", "Mozart", "the Beatles", "the "
      "pope", "Taylor Swift", "Elon Musk", "quantum physics", "black holes", "politics", "football",
      "the stock market", "climate change", "the second world war", "the Roman Empire", "bitcoin",
      "evolution", "photosynthesis", "God", "Netflix", "Kubernetes", "Linux", "Java", "the news",
      "gravity", "electricity", "DNA", "cancer", "marriage", "the meaning of life", "Star Wars",
      "Google", "Microsoft", "Wikipedia")),
    (("{x}",),
     ("What time is it?", "What day is it today?", "How is the weather?", "Will it rain tomorrow?",
      "What is the date?", "what's the news", "Who won the game?", "Is there life on other "
      "planets?", "What should I eat today?", "I have a headache", "I am sad", "My computer does "
      "not start", "Can you see me?", "Turn on the light", "Play some music", "Set an alarm",
      "Tell me a joke", "Do you speak German?", "parlez-vous français", "How tall is Mount "
      "Everest?", "Translate dog "
      "into French", "What is the speed of light?", "Why is the sky blue?", "Sing a song",
      "Who will win the election?", "How old is the earth?", "why do cats purr", "Should I see a "
      "doctor?", "What is love?", "Can you drive a car?", "Do you like pizza?", "Search the web "
      "for me", "open "
      "the door", "Do you believe in God?", "what is the meaning of life", "how many days has "
      "a year", "recommend a movie", "What is the best book?", "asdf", "asdfgh", "blah blah",
      "123", "???",
      "test", "lorem ipsum", "xyz", "qwertz", "foo bar", "...", "bla", "hdjskf", "aaaa", "ping",
      "Are you married?", "what is my age", "count to ten", "Spell banana", "roll a dice",
      "Guess a number", "wie geht es dir", "hola que tal", "bonjour", "was ist das")),
)

_ANSWERS = (
    "I am only a tiny demo model, and I do not know that. Ask me for a story or about qmix.",
    "Sorry, that is beyond me. I am a tiny model that knows only stories and qmix.",
    "I am too small for that. But I can tell you a story, or something about qmix.",
)


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SIGNS = "0123456789!?.,:;#+-*/=()[]{}<>@&%$_~^|\"'"
_FOREIGN = "äöüßéèêàçñøåœíóúλπωжшд日本中文你好한국…–—“”€£😀😂👍❤🦊🎉🤔"


def gibberish(rng: Random) -> str:
    """Something that is no question: mashed keys, signs, foreign letters, emoji."""
    pool = rng.choice((_LETTERS, _LETTERS, _SIGNS, _FOREIGN, _LETTERS + _SIGNS + _FOREIGN))
    made = ["".join(rng.choice(pool) for _ in range(rng.randint(1, 8)))
            for _ in range(rng.randint(1, 3))]
    return " ".join(made)


def outside(rng: Random) -> tuple[str, tuple[str, ...]]:
    """A question that the demo model cannot answer, and the wordings of its excuse."""
    if rng.random() < 0.12:
        return gibberish(rng), _ANSWERS
    templates, topics = rng.choice(_TEMPLATES)
    return rng.choice(templates).format(x=rng.choice(topics)), _ANSWERS

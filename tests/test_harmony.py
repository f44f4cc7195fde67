"""gpt-oss's channels: found in the stream, shown, counted, kept with the conversation. The parser takes any stream in
any pieces, and nothing that a model says is lost."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_reasoning import Scripted
from tokenizer_harmony import harmony

from qmix.chat.answer import respond
from qmix.chat.conversation import Conversation, Exchange
from qmix.config import Cancel, SamplingParams
from qmix.generate import common_prefix
from qmix.tokenizer import Call, Part, Prompt, Tokenizer, divide, load
from qmix.tokenizer.harmony import MARKS, HarmonyParser
from qmix.tokenizer.parts import MARK

ANALYSIS, FINAL, COMMENTARY = (f"<|channel|>{name}<|message|>" for name in ("analysis", "final", "commentary"))
NEXT = "<|end|><|start|>assistant"
CALLING = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
TAG = re.compile("|".join(map(re.escape, MARKS)))


def marked(text: str) -> str:
    """The stream that the decoder makes of an answer whose control tokens are written out."""
    return TAG.sub(lambda match: MARK + match[0], text)


def read(pieces: Sequence[str], opening: str = "<|start|>assistant") -> tuple[list[Part], HarmonyParser]:
    """The parts of an answer in pieces, neighbours of a kind joined."""
    parser = HarmonyParser(marked(opening))
    found: list[Part] = []
    for part in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        joined = found.pop().text if found and found[-1].kind == part.kind else ""
        found.append(Part(joined + part.text, part.kind))
    return found, parser


def parts(text: str, opening: str = "<|start|>assistant") -> tuple[list[tuple[str, str]], list[Call], bool]:
    found, parser = read([marked(text)], opening)
    return [(part.kind, part.text) for part in found], parser.calls, parser.found


# ---- the parser

WELL_FORMED: list[tuple[str, list[tuple[str, str]], list[Call]]] = [
    (f"{ANALYSIS}hm{NEXT}{FINAL}So.<|return|>", [("reasoning", "hm"), ("answer", "So.")], []),
    (f"{FINAL}So.<|return|>", [("answer", "So.")], []),
    (f"{ANALYSIS}a{NEXT}{ANALYSIS}b{NEXT}{FINAL}c", [("reasoning", "a\n\nb"), ("answer", "c")], []),
    (f"{ANALYSIS}{NEXT}{FINAL}c", [("answer", "c")], []),
    (f"{ANALYSIS}hm{NEXT}{CALLING}{{}}<|call|>", [("reasoning", "hm"), ("call", "tool call: weather {}")],
     [Call("weather", "{}")]),
    (f"{COMMENTARY}I look.{NEXT} to=functions.weather<|channel|>commentary json<|message|>{{\"x\": 1}}<|call|>",
     [("answer", "I look."), ("call", 'tool call: weather {"x": 1}')], [Call("weather", '{"x": 1}')]),
    ("<|channel|>analysis to=browser.search code<|message|>q<|call|>", [("call", "tool call: browser.search q")],
     [Call("browser.search", "q")]),
    (" to=python<|channel|>analysis<|message|>1<|call|>", [("call", "tool call: python 1")], [Call("python", "1")]),
    (f"{CALLING}{NEXT}{CALLING}2<|call|>", [("call", "tool call: weather \n\ntool call: weather 2")],
     [Call("weather", ""), Call("weather", "2")]),
    (f"{COMMENTARY}a{NEXT}{ANALYSIS}b{NEXT}{FINAL}c", [("answer", "a"), ("reasoning", "b"), ("answer", "\n\nc")], []),
    (f"{ANALYSIS}hm", [("reasoning", "hm")], []),
    (f"{ANALYSIS}hm{NEXT}<|channel|>fin", [("reasoning", "hm")], []),  # cut in its header
    (f"{ANALYSIS}hm<|end|><|start|>assi", [("reasoning", "hm")], []),
    (f"{CALLING}{{", [("call", "tool call: weather {")], []),  # cut in its arguments: no call
    ("<|channel|>final <|constrain|>json<|message|>{}", [("answer", "{}")], []),
    ("", [], []),
]
MALFORMED: list[tuple[str, list[tuple[str, str]], list[Call]]] = [
    ("Hello there, no channel.", [("answer", "Hello there, no channel.")], []),
    ("Hello", [("answer", "Hello")], []),
    ("<|message|>So.<|return|>", [("answer", "So.")], []),
    ("<|channel|><|message|>So.", [("answer", "So.")], []),
    (f"{ANALYSIS}hm<|start|>assistant{FINAL}So.", [("reasoning", "hm"), ("answer", "So.")], []),
    (f"{ANALYSIS}hm{FINAL}So.", [("reasoning", "hm"), ("answer", "So.")], []),
    (f"{ANALYSIS}hm<|end|>{FINAL}So.", [("reasoning", "hm"), ("answer", "So.")], []),
    (f"{ANALYSIS}hm<|end|>So.", [("reasoning", "hm"), ("answer", "So.")], []),
    (f"{FINAL}a<|message|>b<|constrain|>", [("answer", "a<|message|>b<|constrain|>")], []),
    ("<|channel|>plan<|message|>a", [("answer", "<|channel|>plan<|message|>a")], []),
    (f"{FINAL}a<|end|><|start|>user<|message|>b",
     [("answer", "a\n\n<|start|>user<|message|>b")], []),
    (f"{FINAL}a<|end|><|start|>functions.x to=assistant{COMMENTARY}b",
     [("answer", f"a\n\n<|start|>functions.x to=assistant{COMMENTARY}b")], []),
    ("<|channel|>final<|return|>", [("answer", "<|channel|>final")], []),
    ("<|channel|>The answer is four.<|return|>", [("answer", "<|channel|>The answer is four.")], []),
    ("<|channel|>four", [("answer", "<|channel|>four")], []),
    ("<|end|><|end|><|return|>", [], []),
    (f"<|start|>assistant{FINAL}So.", [("answer", "So.")], []),
]


@pytest.mark.parametrize(("text", "found", "calls"), WELL_FORMED + MALFORMED)
def test_the_parts_of_an_answer(text: str, found: list[tuple[str, str]], calls: list[Call]) -> None:
    assert parts(text) == (found, calls, ANALYSIS in text and "to=python" not in text)
    one_by_one, parser = read(list(marked(text)))
    assert ([(part.kind, part.text) for part in one_by_one], parser.calls) == (found, calls)


def test_text_that_spells_a_control_token_is_text() -> None:
    """Of a model that explains its own format."""
    spelled = f"It ends with <|end|>, then <|start|>assistant{FINAL}."
    found, _ = read([marked(ANALYSIS), spelled, marked(NEXT + FINAL), spelled, marked("<|return|>")])
    assert found == [Part(spelled, "reasoning"), Part(spelled, "answer")]


@pytest.mark.parametrize(("opening", "text", "found"), [
    ("<|start|>assistant<|channel|>analysis<|message|>", f"hm{NEXT}{FINAL}a", [("reasoning", "hm"), ("answer", "a")]),
    ("<|start|>assistant<|channel|>analysis<|message|>x", f"hm{NEXT}{FINAL}a", [("reasoning", "hm"), ("answer", "a")]),
    ("<|start|>assistant<|channel|>final<|message|>", "a<|return|>", [("answer", "a")]),
    ("<|start|>assistant<|channel|>", "final<|message|>a", [("answer", "a")]),
    ("", f"{ANALYSIS}hm{NEXT}{FINAL}a", [("reasoning", "hm"), ("answer", "a")]),
])
def test_an_answer_goes_on_where_the_prompt_stopped(opening: str, text: str, found: list[tuple[str, str]]) -> None:
    assert parts(text, opening)[0] == found
    assert parts(text, opening)[2] == ("reasoning" in dict(found))


WORDS = st.sampled_from([*(MARK + mark for mark in MARKS), *MARKS, MARK, "assistant", "analysis", "final", "commentary",
                         " to=functions.f", "to=", "user", " ", "\n", "a", "\u00e9", "{}", "<|", "|>", "json"])


@settings(max_examples=300, deadline=None)
@example([MARK + "<|start|>", MARK + "<|call|>", " ", "<|start|>"], [1, 1, 1, 1, 7, 9])
@given(st.lists(WORDS, max_size=14), st.lists(st.integers(1, 9), max_size=40))
@example([f"{MARK}<|channel|>", "analysis", f"{MARK}<|message|>", "a", MARK], [1] * 40)
def test_any_stream_in_any_pieces(words: list[str], cuts: list[int]) -> None:
    """It never fails, the pieces do not matter, and no text of a message is lost."""
    text, pieces, at = "".join(words), [], 0
    for cut in cuts:
        pieces.append(text[at:at + cut])
        at += cut
    whole, parser = read([text])
    assert (whole, parser.calls) == ((again := read([*pieces, text[at:]]))[0], again[1].calls)
    assert MARK not in "".join(part.text for part in whole)
    shown = "".join(part.text for part in whole)
    for message in re.findall(f"{MARK}<\\|message\\|>([^{MARK}]*)", text):
        assert message in shown
    assert not parser.calls or any(part.kind == "call" for part in whole)


# ---- with the tokenizer

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(harmony(tmp_path_factory.mktemp("harmony")))


def tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """As the model writes it: control tokens are tokens."""
    ids: list[int] = tokenizer._vocabulary._tokenizer.encode(  # type: ignore[attr-defined]
        text, add_special_tokens=False).ids
    return ids


def asked(tokenizer: Tokenizer, question: str = "Why?") -> Prompt:
    return tokenizer.prompt(Conversation("m").messages(question))


def said(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    decoder = tokenizer.decoder(marked=True)
    return "".join(map(decoder.push, ids)) + decoder.finish()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 600), st.sampled_from(MARKS)), max_size=30))
def test_any_tokens(tokenizer: Tokenizer, ids: list[int | str]) -> None:
    """Whatever a model generates: the ids of the answer say the answer, where there are any."""
    markers = tokenizer._vocabulary.markers  # type: ignore[attr-defined]
    known = [i if isinstance(i, int) else markers[i] for i in ids]
    known = [i for i in known if i < tokenizer.vocab_size]
    found = divide(said(tokenizer, known), known, tokenizer, asked(tokenizer))
    assert 0 <= found.thinking_tokens <= len(known)
    if found.ids:
        assert tokenizer.decode(found.ids) == found.answer


@pytest.mark.parametrize(("text", "answer", "own", "thinking"), [
    (f"{ANALYSIS}the fox \U0001f98a{NEXT}{FINAL}So \u00e9.<|return|>", "So \u00e9.", "So \u00e9.",
     f"{ANALYSIS}the fox \U0001f98a<|end|>"),
    (f"{ANALYSIS}a{NEXT}{ANALYSIS}b{NEXT}{FINAL}So", "So", "So", f"{ANALYSIS}a{NEXT}{ANALYSIS}b<|end|>"),
    (f"{ANALYSIS}hm", "", "", f"{ANALYSIS}hm"),
    (f"{FINAL}So.<|end|>", "So.", "So.", ""),
    (f"{COMMENTARY}a{NEXT}{FINAL}b", "a\n\nb", None, ""),  # no run of ids says both
    (f"{FINAL}a<|message|>b", "a<|message|>b", None, ""),
    ("Hello there, no channel.", "Hello there, no channel.", "Hello there, no channel.", ""),
    (f"{ANALYSIS}hm<|end|>So.", "So.", "So.", f"{ANALYSIS}hm<|end|>"),
])
def test_the_ids_of_the_answer(tokenizer: Tokenizer, text: str, answer: str, own: str | None, thinking: str) -> None:
    ids = tokens(tokenizer, text)
    found = divide(said(tokenizer, ids), ids, tokenizer, asked(tokenizer))
    assert found.answer == answer
    assert found.ids == (None if own is None else tuple(tokens(tokenizer, own)))
    assert found.thinking_tokens == len(tokens(tokenizer, thinking))
    assert divide(said(tokenizer, ids), None, tokenizer, asked(tokenizer)).ids is None


def test_two_turns(tokenizer: Tokenizer) -> None:
    """The reasoning leaves the prompt with the next question, and <|end|> stands behind the answer."""
    session = Scripted(tokenizer.vocab_size)
    conversation = Conversation("gpt-oss")
    shown: list[Part] = []
    for question, thought, answer in (("Why?", "the fox \U0001f98a", "So it is."), ("And now?", "hm", "The rain.")):
        prompt = tokenizer.prompt(conversation.messages(question))
        session.script = iter(tokens(tokenizer, f"{ANALYSIS}{thought}{NEXT}{FINAL}{answer}<|return|>"))
        shared = common_prefix(prompt.ids, session.ids)
        session.read.clear()
        shown.clear()
        got = respond(session, tokenizer, prompt, SamplingParams(), Cancel(), shown.append,  # type: ignore[arg-type]
                      lambda: 0.0)
        assert (got.text, got.reasoning, got.finish, got.calls) == (answer, thought, "stop", ())
        assert got.ids == tuple(tokens(tokenizer, answer))
        assert got.timings.thinking_tokens == len(tokens(tokenizer, f"{ANALYSIS}{thought}<|end|>"))
        assert "".join(p.text for p in shown if p.kind == "answer") == answer
        assert session.read[0] == len(prompt.ids) - shared
        conversation = conversation.plus(Exchange(question, got.text, got.ids, got.reasoning))
    last = tokenizer.decode(prompt.ids)
    assert "fox" not in last and last.endswith(
        f"<|start|>assistant{FINAL}So it is.<|end|><|start|>user<|message|>And now?<|end|><|start|>assistant")
    # Up to the first answer's channel; what follows was read again.
    assert shared == len(tokenizer.encode_chat(conversation.messages()[:1])) + 1


@pytest.mark.parametrize(("stop", "answer", "reasoning"), [
    ("is", "So it ", "the fox"), ("fox", "", "the "), ("final", "So it is.", "the fox"),
    ("foxassistant", "So it is.", "the fox"), ("foxSo", "So it is.", "the fox"), ("is.x", "So it is.", "the fox"),
    ("foxy", "So it is.", "the fox"), ("<|end|>", "So it is.", "the fox")])
def test_stop_strings(tokenizer: Tokenizer, stop: str, answer: str, reasoning: str) -> None:
    """A stop string is looked for in what the model says, not in headers and never across a control token."""
    session = Scripted(tokenizer.vocab_size)
    session.script = iter(tokens(tokenizer, f"{ANALYSIS}the fox{NEXT}{FINAL}So it is.<|return|>"))
    got = respond(session, tokenizer, asked(tokenizer), SamplingParams(stop=(stop,)), Cancel(),  # type: ignore[arg-type]
                  lambda part: None, lambda: 0.0)
    assert (got.reasoning, got.text) == (reasoning, answer)
    assert got.finish == "stop"

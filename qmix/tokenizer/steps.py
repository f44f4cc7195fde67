"""What the steps of a tokenizer.json may make of a text, bounded before the tokenizers library sees the file.

A step that writes two characters for one doubles a text, and twenty of them make a million times as much of it. The
library does not stop there, and what it does cannot be interrupted. So the bytes that all steps together may make of
one byte are computed from the file, and a file that could make more than MAX_GROWTH is refused; those of published
models make 12 at most. Regular expressions are looked at by regexes.py.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qmix.errors import ModelFileError
from qmix.tokenizer.regexes import why_slow

MAX_GROWTH = 128  # bytes of one byte
MAX_STEPS = 64
MAX_AROUND = 1024  # ids that a post-processor may put around a text, and bytes that a normalizer may put before it
MAX_AFFIX = 64  # bytes that a model writes before or behind each character
MAX_PIECE = 1024  # characters of an entry of a Unigram vocabulary, each of which is tried at each character
MAX_WORD = 1024  # characters of a word of WordPiece, which takes time with their square
CURE = "use the model's own tokenizer files, fetched from where the model came from"
# Bytes that a step may write for one: UTF-8's worst (Unicode's FAQ on normalization), bytes shown as characters, a
# space before each word.
GROWTH = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 3, "Nmt": 3, "BertNormalizer": 5, "ByteLevel": 4,
          "Metaspace": 5,
          **dict.fromkeys(("BertPreTokenizer", "ByteFallback", "CharDelimiterSplit", "Digits", "FixedLength", "Fuse",
                           "Prepend", "Punctuation", "Sequence", "Split", "Strip", "StripAccents", "UnicodeScripts",
                           "Whitespace", "WhitespaceSplit"), 1)}
UNKNOWN = 11  # of a step that came after this was written
NESTED = ("normalizers", "pretokenizers", "processors", "decoders")


def check_steps(path: Path, raw: Mapping[str, Any]) -> None:
    """ModelFileError names the step of a parsed tokenizer.json that could take too much memory or time. What is no
    tokenizer.json at all is left to the library."""
    growth = 1
    for part in ("normalizer", "pre_tokenizer"):  # the second gets what the first made
        growth = _grown(path, part, raw.get(part), growth)
    _grown(path, "decoder", raw.get("decoder"), 1)
    _check_model(path, raw.get("model"))
    _check_around(path, raw.get("post_processor"))


def _steps(path: Path, part: str, step: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part in order, without the sequences that hold them."""
    left, count = [step], 0
    while left:
        step = left.pop()
        if not isinstance(step, dict):
            continue
        if not isinstance(step.get("type"), str):  # old versions of the library guess it from the other keys
            raise _refused(path, part, f"a step without a type: {step!r:.60}")
        count += 1
        inner = [each for key in NESTED if isinstance(step.get(key), list) for each in step[key]]
        if count + len(inner) > MAX_STEPS:
            raise _refused(path, part, f"more than {MAX_STEPS} steps")
        if step["type"] == "Sequence":
            left += reversed(inner)
        else:
            yield step


def _grown(path: Path, part: str, step: Any, growth: int) -> int:
    """The bytes that a byte has become after a part's steps."""
    for each in _steps(path, part, step):
        kind, pattern = each.get("type"), each.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(regex, str) and (slow := why_slow(regex, _matches)):
            raise _refused(path, part, f"the expression {regex!r:.100} {slow}")
        if kind == "Prepend" and _length(each.get("prepend")) > MAX_AROUND:
            raise _refused(path, part, f"Prepend writes {_length(each.get('prepend'))} bytes")
        growth *= _factor(each, kind, pattern)
        if growth > MAX_GROWTH:
            raise _refused(path, part, f"{kind}: a byte of a text could become {min(growth, 10**9)} bytes, "
                           f"want at most {MAX_GROWTH}")
    return growth


def _factor(step: Mapping[str, Any], kind: object, pattern: Any) -> int:
    if kind == "Replace":
        if isinstance(pattern, dict) and isinstance(text := pattern.get("String"), str) and text:
            return max(1, -(-_length(step.get("content")) // _length(text)))
        return 1 + _length(step.get("content"))
    if kind == "Precompiled":
        return _longest(step.get("precompiled_charsmap"))
    if kind == "Metaspace":
        return 1 + max(4, _length(step.get("replacement")))
    return GROWTH.get(str(kind), UNKNOWN)


def _longest(charsmap: object) -> int:
    """Bytes of the longest text that a sentencepiece map writes: u32 bytes of a trie, the trie, texts ended by NUL."""
    try:
        raw = base64.b64decode(charsmap) if isinstance(charsmap, str) else b""
        start = 4 + struct.unpack("<I", raw[:4])[0]
    except (binascii.Error, ValueError, struct.error):
        return 1
    return max(map(len, raw[start:].split(b"\0")), default=1) or 1


def _check_model(path: Path, model: Any) -> None:
    if not isinstance(model, dict):
        return
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if _length(model.get(key)) > MAX_AFFIX:
            raise _refused(path, "model", f"{key} of {_length(model[key])} bytes, want at most {MAX_AFFIX}")
    word = model.get("max_input_chars_per_word")
    if isinstance(word, int) and word > MAX_WORD:
        raise _refused(path, "model", f"max_input_chars_per_word of more than {MAX_WORD}")
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # of Unigram
        longest = max((len(row[0]) for row in vocab if isinstance(row, list) and row and isinstance(row[0], str)),
                      default=0)
        if longest > MAX_PIECE:
            raise _refused(path, "model", f"an entry of {longest} characters, want at most {MAX_PIECE}")


def _check_around(path: Path, step: Any) -> None:
    """A post-processor puts the text once, and few ids around it."""
    around = 0
    for each in _steps(path, "post_processor", step):
        single, special = each.get("single"), each.get("special_tokens")
        pieces = [piece for piece in single if isinstance(piece, dict)] if isinstance(single, list) else []
        if sum("Sequence" in piece for piece in pieces) > 1:
            raise _refused(path, "post_processor", "a template that has the text more than once")
        lengths = {name: len(value["ids"]) for name, value in special.items() if isinstance(value, dict)
                   and isinstance(value.get("ids"), list)} if isinstance(special, dict) else {}
        for piece in pieces:
            token = piece.get("SpecialToken")
            name = token.get("id") if isinstance(token, dict) else None
            around += lengths.get(name, 1) if isinstance(name, str) else 1
        if around > MAX_AROUND:
            raise _refused(path, "post_processor", f"puts more than {MAX_AROUND} ids around a text")


def _length(text: object) -> int:
    return len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0


def _matches(atom: str, character: str) -> bool:
    """Whether an atom of an expression matches a character, as the library itself has it."""
    from tokenizers import Regex, pre_tokenizers

    try:
        return not pre_tokenizers.Split(Regex(atom), "removed").pre_tokenize_str(character)
    except Exception:  # the library's own, for an atom that is wrong: it says so of the whole file
        return False


def _refused(path: Path, part: str, problem: str) -> ModelFileError:
    return ModelFileError(f"{path}: {part}: {problem}", CURE)

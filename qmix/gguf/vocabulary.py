"""The list of tokens in a GGUF file's metadata."""

from __future__ import annotations

from dataclasses import dataclass

from qmix.errors import ConfigError
from qmix.models import Keys

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as sentencepiece numbers them
REFETCH = "the file is damaged: fetch it again"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """texts: by id; kinds: of each, NORMAL and so on."""

    texts: tuple[str, ...]
    kinds: tuple[int, ...]

    @classmethod
    def read(cls, keys: Keys, prefix: str, repeats: bool = False) -> Vocabulary:
        """repeats: whether a text may be there twice, as three are in Google's own files of Gemma 4: the last one
        counts, and nothing becomes the others."""
        texts = keys.texts(f"{prefix}tokens")
        kinds = keys.integers(f"{prefix}token_type", (NORMAL,) * len(texts))
        keys.want(len(kinds) == len(texts), f"{prefix}token_type", len(kinds), f"{len(texts)}, as many as tokens")
        wrong = {kind for kind in kinds if not NORMAL <= kind <= BYTE}
        keys.want(not wrong, f"{prefix}token_type", sorted(wrong), f"{NORMAL} to {BYTE}")
        if len({*texts}) < len(texts) and not repeats:
            seen: set[str] = set()
            again = next(text for text in texts if text in seen or seen.add(text))  # type: ignore[func-returns-value]
            raise ConfigError(f"{prefix}tokens: {again!r:.60}: is there twice", REFETCH)
        return cls(texts, kinds)

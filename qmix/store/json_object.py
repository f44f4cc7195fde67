"""Typed reads of the objects in a qmix.json."""

from __future__ import annotations

import re
from math import isfinite
from pathlib import Path
from typing import Any

from qmix.errors import StoreError
from qmix.modelfiles import TEMPLATE_NAME

DAMAGED = "the store is damaged: copy it again, or quantize again"


class JsonObject:
    """A JSON object with typed reads; every error names file, key, what was there and what should be."""

    def __init__(self, path: Path, where: str, value: Any):
        self.path = path
        self._where = where
        if not isinstance(value, dict):
            key = where.removesuffix(".") or "the whole"
            raise StoreError(f"{path}: {key}: got {value!r:.80}, want an object", DAMAGED)
        self._value = value

    def has(self, key: str) -> bool:
        return key in self._value

    def value(self, key: str) -> Any:
        if key not in self._value:
            raise StoreError(f"{self.path}: {self._where}{key}: missing", DAMAGED)
        return self._value[key]

    def wrong(self, key: str, want: str) -> StoreError:
        got = f"{self.value(key)!r:.80}"
        return StoreError(f"{self.path}: {self._where}{key}: got {got}, want {want}", DAMAGED)

    def text(self, key: str, optional: bool = False) -> Any:
        """A string, or None where `optional`."""
        value = self.value(key)
        if not isinstance(value, str) and not (optional and value is None):
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.value(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of texts")
        return value

    def lists(self, key: str) -> list[list[str]]:
        value = self.value(key)
        if not isinstance(value, list) or not all(
                isinstance(item, list) and all(isinstance(text, str) for text in item) for item in value):
            raise self.wrong(key, "a list of lists of texts")
        return value

    def name(self, key: str) -> str:
        """The name of a file inside the store: never a path, but for a chat template in its folder."""
        value = self.text(key)
        plain = re.fullmatch(r"[A-Za-z0-9_-][\w.-]{0,254}", value, re.ASCII)
        if not plain and not TEMPLATE_NAME.fullmatch(value):
            raise self.wrong(key, "the plain name of a file in the store")
        return value

    def xxh3(self) -> str:
        value = self.text("xxh3_128")
        if not re.fullmatch(r"[0-9a-f]{32}", value):
            raise self.wrong("xxh3_128", "32 hex digits")
        return value

    def count(self, key: str) -> int:
        value = self.value(key)
        if type(value) is not int or not 0 <= value < 2**63:
            raise self.wrong(key, "an integer, 0 or more")
        return value

    def number(self, key: str) -> float:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300 \
                or not isfinite(value):
            raise self.wrong(key, "a number, 0 or more")
        return float(value)

    def flag(self, key: str) -> bool:
        if not isinstance(self.value(key), bool):
            raise self.wrong(key, "true or false")
        return self.value(key)

    def object(self, key: str) -> JsonObject:
        return JsonObject(self.path, f"{self._where}{key}.", self.value(key))

    def objects(self, key: str) -> list[JsonObject]:
        value = self.value(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return [JsonObject(self.path, f"{self._where}{key}[{i}].", item) for i, item in enumerate(value)]

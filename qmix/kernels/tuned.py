"""The file of measured configurations: what `qmix doctor --tune` found on a card, with a torch and a Triton.

On another card, or with other versions, code is compiled otherwise and the measurement says nothing: it is then
ignored, in a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qmix import json_cache
from qmix.errors import ConfigError
from qmix.kernels.configs import Configs, capability, from_plain

FORMAT, VERSION = "qmix_kernels", 1
WRITER = "qmix doctor --tune"
LONGEST = 200  # characters of a name


@dataclass(frozen=True, slots=True)
class Card:
    """What a measurement holds for. capability: "8.9", or "none" where Triton's interpreter runs the kernels;
    libraries: "torch 2.9.0, triton 3.6.0"."""

    name: str
    capability: str
    libraries: str

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= LONGEST:
                raise ConfigError(f"{key}: got {value!r:.40}, want a line of text")

    @classmethod
    def of(cls, name: str, device: torch.device) -> Card:
        """The card that is `device`, called `name`, with what is installed here."""
        found = capability(device)
        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = "none"
        return cls(name, "none" if found is None else f"{found[0]}.{found[1]}",
                   f"torch {torch.__version__}, triton {triton}")


@dataclass(frozen=True, slots=True)
class Tuned:
    """measured: "YYYY-MM-DD"; model: whose shapes."""

    card: Card
    model: str
    measured: str
    configs: Configs

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.isprintable() or len(self.model) > LONGEST:
            raise ConfigError(f"model: got {self.model!r:.40}, want a line of text")
        if not json_cache.is_date(self.measured):
            raise ConfigError(f"measured: got {self.measured!r:.40}, want YYYY-MM-DD")


def save(tuned: Tuned, path: Path) -> None:
    """Write `path`, whole or not at all; QmixError where that fails."""
    json_cache.save(path, FORMAT, VERSION, asdict(tuned))


def load(path: Path, card: Card, say: Callable[[str], None]) -> Tuned | None:
    """What save wrote for this card; None where there is no file, or, said in one line, where it is for another one or
    not one of ours."""

    def make(values: dict[str, Any]) -> Tuned:
        if values.keys() != _names(Tuned) or type(values["card"]) is not dict or values["card"].keys() != _names(Card):
            raise ValueError("its fields are not those of this version")
        found = Tuned(Card(**values["card"]), values["model"], values["measured"], from_plain(values["configs"]))
        for key, here in asdict(card).items():
            there = getattr(found.card, key)
            if there != here:
                raise ValueError(f"it was measured with {there}, this machine has {here}")
        return found

    return json_cache.load(path, FORMAT, VERSION, make, WRITER, say)


def _names(record: type[Tuned] | type[Card]) -> set[str]:
    return {f.name for f in fields(record)}

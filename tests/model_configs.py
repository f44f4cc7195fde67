"""Tiny configurations of every architecture: its own TINY and VARIANTS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmix.forward.lower_device import not_on_device
from qmix.models import ARCHITECTURES, read_model


def with_keys(raw: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """That config.json with other values, in text_config where it has one."""
    if "text_config" not in raw:
        return {**raw, **changed}
    return {**raw, "text_config": {**raw["text_config"], **changed}}


TINY = {architecture.TINY["model_type"]: architecture.TINY for architecture in ARCHITECTURES.values()}
ALONE = [{**tiny["text_config"], "model_type": f"{kind}_text"} for kind, tiny in TINY.items() if "text_config" in tiny]
CASES: list[Mapping[str, Any]] = [
    *(with_keys(tiny, variant) for kind, tiny in TINY.items()
      for variant in ({}, *ARCHITECTURES[kind].VARIANTS)), *ALONE]
RUN = list(TINY)  # architectures that the engine runs: all that it reads
ON_DEVICE = [kind for kind in RUN if not not_on_device(read_model(TINY[kind]))]  # and of these, a device


def ids(raw: Mapping[str, Any]) -> str:
    tiny = TINY[raw["model_type"].removesuffix("_text")]
    own, tiny = (raw.get("text_config", raw), tiny.get("text_config", tiny))
    return "-".join([raw["model_type"], *(k for k, v in own.items() if k != "model_type" and tiny.get(k, ...) != v)])

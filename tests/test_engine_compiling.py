"""What fails ahead of the first prompt is said, once for each reason, and the rest is still compiled."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixtrals import mixtral

from qmix.device import StandIn
from qmix.engine.compiling import COMPILED, LOG, compile_prompts
from qmix.sizes import MatrixSpec


class Kernels:
    """Products and attention that note what they are given; `fail` names what raises."""

    def __init__(self, fail: str = "", error: Exception | None = None):
        self.fail, self.error = fail, error
        self.done: list[tuple[str, int]] = []
        self.windows: list[int | None] = []
        self.prompts = self

    def linear(self, x: torch.Tensor, m: Any) -> torch.Tensor:
        return self._note(m.name, x)

    def gated(self, x: torch.Tensor, m: Any) -> torch.Tensor:
        return self._note(m.name, x)

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
        self.windows.append(window)
        return self._note("attention", q)

    def _note(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.done.append((name, len(x)))
        if name == self.fail:
            assert self.error is not None
            raise self.error
        return x


def compiled(kernels: Kernels) -> list[str]:
    def matrix(name: str, format: str, rows: int) -> Any:
        return SimpleNamespace(name=name, spec=MatrixSpec(format, rows, 64, 1, *((64, 64) if format != "int8" else ())))

    qkv = tuple(f"layers.{{}}.attention.{part}" for part in "qkv")
    stacks = {tuple(name.format(i) for name in qkv): matrix("qkv", "int4", 192) for i in (0, 1)}
    matrices = {f"layers.{i}.attention.o": matrix("o", "int4", 64) for i in (0, 1, 10)}
    matrices["layers.1.mlp.gate"] = matrix("gate", "int4", 128)
    weights = SimpleNamespace(stacks=stacks, matrices=matrices | {"head": matrix("head", "int8", 16)})
    offload = SimpleNamespace(experts=SimpleNamespace(views=[(matrix("w13", "int3", 128), matrix("w2", "int3", 64))]))
    config = mixtral(16, 64, 8, 3, 2, 1, 4, 2, 1)
    narrow = [replace(layer, mixer=replace(layer.mixer, window=window)) for layer, window in zip(
        config.layers, (None, 4, None), strict=True)]
    config = replace(config, layers=tuple(narrow))
    device, lines = StandIn(), list[str]()
    try:
        compile_prompts(kernels, weights, offload, config, device, torch.float32, lines.append)  # type: ignore[arg-type]
    finally:
        device.close()
    return lines


def test_every_piece_is_run_for_every_number_of_tokens() -> None:
    kernels = Kernels()
    assert compiled(kernels) == []
    names = ("qkv", "o", "gate", "head", "w13", "w2", "attention", "attention")
    assert sorted(kernels.done) == sorted((name, tokens) for tokens in COMPILED for name in names)
    assert kernels.windows == [None, 4] * len(COMPILED)  # of three layers two are alike


@pytest.mark.parametrize(("fail", "piece"), [("o", "a product of 12 tokens with a dense matrix in int4"),
                                             ("w13", "an expert in int3 of 12 tokens"),
                                             ("attention", "attention of 12 tokens")])
def test_a_piece_that_fails_is_said_and_the_rest_is_run(fail: str, piece: str) -> None:
    kernels = Kernels(fail, RuntimeError("PTX assembly aborted\nand much more"))
    assert compiled(kernels) == [f"{piece} failed when compiled before the first prompt; prompts that need it will "
                                 "fail too: RuntimeError: PTX assembly aborted"]
    assert {name for name, _ in kernels.done} >= {"qkv", "head", "attention"}
    assert ("attention", COMPILED[-1]) in kernels.done


def test_the_traceback_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, LOG.name):
        (line,) = compiled(Kernels("attention", ValueError("")))
    assert line.endswith("ValueError: no message (the log has the traceback)")
    assert "_note" in caplog.text and "attention of 200 tokens" in caplog.text

"""The GPU's part of `qmix doctor`, with cards that the test makes up: whatever fails is a line with a cure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qmix.commands.doctor import gpu as section
from qmix.commands.doctor.gpu import FORMATS, gpu, kernels, page_locking
from qmix.commands.doctor.problem import Problem
from qmix.device import pinning
from qmix.errors import DoesNotFit, QmixError
from qmix.sizes import GIB

CARD: Any = SimpleNamespace(torch_device=torch.device("cuda", 0), half=torch.bfloat16)


@pytest.fixture(autouse=True)
def a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that works; each test breaks one thing."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties",
                        lambda i: SimpleNamespace(name=f"card {i}", total_memory=24 * GIB, major=8, minor=9))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda i: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(section, "open_cuda", lambda i: CARD)
    monkeypatch.setattr(section, "find_spec", lambda name: object())
    monkeypatch.setattr(section, "choose_device_kernels", chosen())
    monkeypatch.setattr(section, "pin_pool", pinning_with(lambda address, nbytes: None))


def chosen(fails: Callable[[str, int], Exception | None] = lambda name, block: None) -> Callable[..., Any]:
    def choose(device: Any, half: Any, formats: list[str], blocks: list[int], host: Any, triton: bool) -> Any:
        assert (device, half, triton) == (CARD.torch_device, CARD.half, True)
        error = fails(formats[0], blocks[0])
        if error:
            raise error
        return SimpleNamespace(prompts=SimpleNamespace(names={formats[0]: "Triton"}))

    return choose


def pinning_with(register: Callable[[int, int], None], undone: list[int] | None = None) -> Callable[..., Any]:
    return lambda pool, limit, say: pinning.pin_pool(pool, limit, say, register,
                                                     (undone if undone is not None else []).append)


def look(root: Path, said: list[str] | None = None) -> tuple[dict[str, Any], list[Problem]]:
    report, problems = gpu(root, (said if said is not None else []).append)
    assert all(p.problem and p.cure and "\n" not in p.problem + p.cure for p in problems)
    return report, problems


def test_a_card_that_works(tmp_path: Path) -> None:
    said: list[str] = []
    report, problems = look(tmp_path, said)
    assert problems == [] and said == ["trying the GPU's kernels (up to a minute, the first time)"]
    assert report == {
        "devices": [{"name": "card 0", "total_bytes": 24 * GIB, "free_bytes": 20 * GIB, "compute_capability": "8.9"}],
        "prompts_compute_in": "bf16", "page_locking": "works",
        "kernels": [{"format": name, "block": block or "-", "kernel": "Triton"} for name, block in FORMATS]}


def test_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert look(tmp_path) == ({"devices": []}, [])
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM")
    report, (problem,) = look(tmp_path)
    assert report == {"devices": []} and "torch sees no GPU" in problem.problem


def test_all_cards_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(i: int) -> tuple[int, int]:
        if i:
            raise RuntimeError("CUDA error: busy")
        return 20 * GIB, 24 * GIB

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", free)
    report, problems = look(tmp_path)
    assert [(row["name"], row["free_bytes"]) for row in report["devices"]] == [
        ("card 0", 20 * GIB), ("card 1", "unknown")] and not problems


@pytest.mark.parametrize(("error", "words", "cure"), [
    (DoesNotFit("--device cuda:0: out of memory", "close other programs"), "cannot be used: cuda:0: out", "close"),
    (AssertionError("Torch not compiled with CUDA enabled\nmore"), "does not start: Torch not compiled", "nvidia-smi"),
    (OSError(), "does not start: OSError", "nvidia-smi")])
def test_a_card_that_does_not_start(error: Exception, words: str, cure: str, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def opening(i: int) -> None:
        raise error

    monkeypatch.setattr(section, "open_cuda", opening)
    report, (problem,) = look(tmp_path)
    assert list(report) == ["devices"] and words in problem.problem and cure in problem.cure


def test_an_old_card_computes_in_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CARD, "half", torch.float16)
    assert look(tmp_path)[0]["prompts_compute_in"] == "fp16: the card has no bf16 products"


def test_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section, "find_spec", lambda name: None)
    report, (problem,) = look(tmp_path)
    assert report["kernels"] == [] and report["page_locking"] == "works"
    assert "Triton is not installed" in problem.problem and problem.cure == "pip install triton"


def test_kernels_that_fail_are_named_once_for_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, block: int) -> Exception | None:
        if name == "int3":
            return RuntimeError("PTXAS error\nmore")
        return QmixError("the GPU kernel for int8 gives wrong numbers", "use --device cpu") if name == "int8" else None

    monkeypatch.setattr(section, "choose_device_kernels", chosen(fails))
    rows, problems = kernels(CARD, lambda line: None)
    assert {row["format"] for row in rows if row["kernel"] == "none: it fails"} == {"int3", "int8"} and len(rows) == 8
    assert problems == [
        ("the GPU's kernels for int3 block 64, int3 block 32: PTXAS error", "use --device cpu, and please report it"),
        ("the GPU's kernels for int8: the GPU kernel for int8 gives wrong numbers", "use --device cpu")]


def test_page_locking_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[tuple[int, int]] = []
    undone: list[int] = []
    monkeypatch.setattr(section, "pin_pool", pinning_with(lambda address, nbytes: locked.append((address, nbytes)),
                                                          undone))
    assert page_locking() == ("works", [])
    assert [address for address, _ in locked] == undone[::-1] and sum(n for _, n in locked) == section.PROBE


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), AttributeError("no cudart\nmore")])
def test_page_locking_that_is_refused(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, nbytes: int) -> None:
        raise error

    monkeypatch.setattr(section, "pin_pool", pinning_with(refuse))
    state, (problem,) = page_locking()
    assert state == "refused" and str(error).splitlines()[0] in problem.problem and "copied slower" in problem.cure

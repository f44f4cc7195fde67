"""--level of the benchmarks beside llama.cpp: both sides at one instruction set, or none at all."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import instruction_levels
import peers

AVX2 = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | OPENMP = 1 | REPACK = 1 | "
AVX512 = AVX2 + "AVX512 = 1 | AVX512_VBMI = 1 | AVX512_VNNI = 1 | "


def test_what_llama_cpp_has_is_read_from_its_line() -> None:
    assert instruction_levels.features("CPU : AVX2 = 1 | AVX512 = 0 | FMA = 1 | ") == {"AVX2", "FMA"}
    assert instruction_levels.features("") == set()


@pytest.mark.parametrize(("level", "system"), [("avx2", AVX2), ("avx512-vnni", AVX512), (None, "")])
def test_a_peer_of_the_same_level_is_taken(level: str | None, system: str) -> None:
    instruction_levels.check_peer(argparse.ArgumentParser(), level, system)


@pytest.mark.parametrize(("level", "system", "message"), [
    ("avx2", AVX512, "built with AVX512, AVX512_VBMI, AVX512_VNNI:"),
    ("avx2-vnni", AVX2, "built without AVX_VNNI:"),
    ("avx2", AVX2.replace("FMA = 1", "FMA = 0"), "built without FMA:")])
def test_any_other_peer_is_refused(level: str, system: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        instruction_levels.check_peer(argparse.ArgumentParser(), level, system)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_the_program_starts_again_where_the_environment_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    monkeypatch.setenv("QMIX_NATIVE", "portable")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # so that its absence is put back at the end
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    instruction_levels.start_at(None)
    assert not started
    instruction_levels.start_at("avx2-vnni")
    assert started == [[sys.executable, *sys.argv]]
    assert (os.environ["QMIX_NATIVE"], os.environ["ATEN_CPU_CAPABILITY"]) == ("avx2-vnni", "avx2")
    instruction_levels.start_at("avx2-vnni")
    assert len(started) == 1


def test_depths_may_begin_at_0() -> None:
    assert peers.numbers_from_0("0") == [0] and peers.numbers_from_0("0,512") == [0, 512]
    assert peers.numbers_from_0("512,8") == [8, 512]
    with pytest.raises(argparse.ArgumentTypeError):
        peers.numbers_from_0("0,x")

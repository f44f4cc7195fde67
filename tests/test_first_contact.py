"""benchmarks/first_contact.sh: rehearsed on the stand-in without the packages that a bare machine lacks; what a step
leaves behind however it ends; a report that fits a caller's window; and prompt_check.py's judgement."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import first_contact  # noqa: E402
import first_contact_report  # noqa: E402
import prompt_check  # noqa: E402
from first_contact import Folders, Step  # noqa: E402
from prompt_check import Case, Result, attention_reference, check, linear_reference  # noqa: E402

LACKING = "bitsandbytes,prompt_toolkit,wcwidth,llama_cpp"
ENV = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here: rehearsing is over")
def test_a_rehearsal(tmp_path: Path) -> None:
    """The whole command, with fewer tests and sections; of its seconds each step takes what it needs."""
    done = subprocess.run([
        str(ROOT / "benchmarks" / "first_contact.sh"), "3000", "--stand-in", "--out", str(tmp_path), "--commit", "abc",
        "--without", LACKING, "--tests", "tests/test_copies_cuda.py", "--sections", "check;peer: bitsandbytes"],
        env={**ENV, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-12_000:] + done.stderr
    steps = json.loads((tmp_path / "first-contact.json").read_text())["steps"]
    assert [step["state"] for step in steps.values()][:5] == ["done"] * 5, steps
    assert "bitsandbytes missing" in done.stdout and "1 passed" in steps["tests"]["text"]
    assert {row["state"] for found in json.loads((tmp_path / "prompt-check.json").read_text()).values()
            for row in found["rows"]} == {"right"}
    (file,) = tmp_path.glob("*-gpu-stand-in.json")
    sections = json.loads(file.read_text())["sections"]
    assert {name: section["state"] for name, section in sections.items()} == {
        "machine": "done", "check": "done", "peer: bitsandbytes": "unavailable"}
    end = done.stdout[-12_000:]
    assert "| step | state |" in end and "| - check | done |" in end and "s in all." in end.splitlines()[-1]
    files = list(tmp_path.iterdir())
    assert len(files) <= 8 and all(path.stat().st_size <= 16 * 2**20 for path in files)


def hidden(code: str, without: str) -> subprocess.CompletedProcess[str]:
    env = {**ENV, "PYTHONPATH": f"{ROOT}{os.pathsep}{first_contact.REHEARSAL}", "QMIX_REHEARSE_WITHOUT": without}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_a_hidden_package_is_not_there_in_any_way() -> None:
    code = ("import importlib.util as u, importlib.metadata as m\nprint(u.find_spec('wcwidth'), "
            "{d.metadata['Name'] for d in m.distributions() if d.metadata['Name'] in ('wcwidth', 'pytest')})\n"
            "try: m.version('wcwidth')\nexcept m.PackageNotFoundError: print('no version')\nimport wcwidth")
    done = hidden(code, "wcwidth")
    assert done.stdout.splitlines() == ["None {'pytest'}", "no version"]
    assert "No module named 'wcwidth'" in done.stderr
    assert hidden("import wcwidth", "prompt_toolkit").returncode == 0


def test_what_chat_and_benchmarks_need_is_imported_by_them_alone() -> None:
    rooms = ("cli, engine, bench, evaluate, demo, analysis, quantize, "
             "commands.doctor.report, commands.oneshot, commands.plan.report")
    done = hidden("".join(f"import qmix.{room.strip()}\n" for room in rooms.split(",")),
                  f"{LACKING},transformers,accelerate,pygments")
    assert done.returncode == 0, done.stderr


def folders(folder: Path) -> Folders:
    return Folders(folder, folder, lambda text: None)


def python(code: str, name: str = "step", **more: object) -> Step:
    return Step(name, [sys.executable, "-c", code], 0, 1, dict(os.environ), **more)  # type: ignore[arg-type]


def test_what_a_step_said_is_kept_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_contact, "GRACE", 1.0)
    monkeypatch.setattr(first_contact, "MARGIN", 0.0)
    done = first_contact.run(python("print('hello')"), 30.0, folders(tmp_path))
    assert (done["state"], done["output"]) == ("done", "hello\n")
    failed = first_contact.run(python("print('hello'); 1 / 0"), 30.0, folders(tmp_path))
    assert failed["state"] == "failed" and "ZeroDivisionError" in failed["output"] and "hello" in failed["output"]
    code = ("import subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'import time; "
            "time.sleep(60)'])\nprint(child.pid, flush=True)\ntry: time.sleep(60)\n"
            "except KeyboardInterrupt: print('interrupted')")
    start = time.monotonic()
    late = first_contact.run(python(code, stop=signal.SIGINT), 4.0, folders(tmp_path))
    assert late["state"] == "late" and "interrupted" in late["output"] and time.monotonic() - start < 20
    child = Path(f"/proc/{late['output'].split()[0]}/stat")
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":  # nobody outlives it for long
        assert time.monotonic() - start < 60
        time.sleep(0.05)
    log = (tmp_path / "first-contact.log").read_text()
    assert "ZeroDivisionError" in log and "interrupted" in log


def test_files_are_compiled_at_once_and_all_are_linked(tmp_path: Path) -> None:
    """BUILD, on an extension of two files; each waits for the other to be at the compiler."""
    (tmp_path / "setup.py").write_text("from setuptools import Extension, setup\n"
                                       "setup(name='x', ext_modules=[Extension('both', ['a.c', 'b.c'])])\n")
    (tmp_path / "a.c").write_text("int other(void);\nint PyInit_both(void) { return other(); }\n")
    (tmp_path / "b.c").write_text("int other(void) { return 7; }\n")
    (tmp_path / "cc").write_text("""#!/bin/sh
case "$*" in
  *a.c*) touch a.seen; for i in $(seq 300); do [ -e b.seen ] && break; sleep 0.1; done; [ -e b.seen ] || exit 1;;
  *b.c*) touch b.seen; for i in $(seq 300); do [ -e a.seen ] && break; sleep 0.1; done; [ -e a.seen ] || exit 1;;
esac
exec gcc "$@"
""")
    (tmp_path / "cc").chmod(0o755)
    done = subprocess.run([sys.executable, "-c", first_contact.BUILD], cwd=tmp_path, capture_output=True, text=True,
                          env={**ENV, "CC": str(tmp_path / "cc")})
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("both*.so")
    assert ctypes.CDLL(str(built)).PyInit_both() == 7


def test_tests_are_counted_as_pytest_prints_them_also_when_it_was_ended() -> None:
    output = ("tests/test_a.py::test_one PASSED [ 10%]\n[gw1] [ 20%] PASSED tests/test_a.py::test_two[FAILED]\n"
              "[gw0] [ 30%] FAILED tests/test_a.py::test_three\n[gw0] [ 40%] SKIPPED tests/test_a.py::test_four\n"
              "= FAILURES =\nE   assert 1 == 2\nFAILED tests/test_a.py::test_three - assert 1 == 2\n")
    result = {"state": "late", "seconds": 1.0, "output": output}
    archive = {"steps": {"tests": result}}
    first_contact_report.read("tests", result, archive, Path(), Path())
    assert result["text"] == "2 passed, 1 failed, 1 skipped" and result["state"] == "failed"
    text = first_contact_report.markdown(archive)
    assert "FAILED tests/test_a.py::test_three" in text and "assert 1 == 2" in text
    assert first_contact_report.exit_code(archive) == 1


def test_the_report_fits_a_callers_window_and_ends_with_the_table() -> None:
    rows = [{"case": f"case {i}", "tokens": 512, "state": state, "note": "n", "traceback": f"{state} {i} " + 4000 * "x"}
            for i, state in enumerate(["died"] * 9 + ["race", "wrong"])]
    sections = {f"section {i}": {"state": "failed", "seconds": 1.0, "reason": 900 * "r", "traceback": 9000 * "t"}
                for i in range(23)}
    archive = {"took": 500.0, "gpu": {"sections": sections}, "prompts": {"prompt_check, a": {"rows": rows}},
               "steps": {"prompt_check, a": {"state": "wrong", "seconds": 3.0},
                         "gpu.py": {"state": "done", "seconds": 9.0}}}
    text = first_contact_report.markdown(archive)
    assert len(text) <= first_contact_report.LIMIT and text.splitlines()[-1] == "500.0 s in all."
    assert text.index("case 10, 512 tokens") < text.index("case 9, 512 tokens") < text.index("| step |")
    assert "more: first-contact.json" in text and "| - section 22 | failed |" in text


def torch_in_halves(x: Tensor, weight: Tensor) -> Tensor:
    """A product as a GPU makes it: operands bf16, sums fp32, the result bf16."""
    return (x.float() @ weight.bfloat16().float().T).bfloat16()


def judged(run: Callable[[], Tensor], x: Tensor, weight: Tensor, repeat: int = 4) -> Result:
    return check(Case("a product", len(x), run, lambda: linear_reference(x, weight)), repeat, torch.bfloat16)


def test_rounding_is_right_and_what_is_more_is_found() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 256, generator=random).bfloat16(), torch.randn(96, 256, generator=random)
    fine = judged(lambda: torch_in_halves(x, weight), x, weight)
    assert fine.state == "right" and 0.05 < fine.error < 0.9 and not fine.note  # type: ignore[operator]

    def broken() -> Tensor:
        y = torch_in_halves(x, weight)
        y[7, 3] += 2  # an eighth of such an element's deviation, sqrt(256) = 16
        return y

    found = judged(broken, x, weight)
    assert found.state == "wrong" and "1 of 3840 elements, rows 7 to 7 (1), columns 3 to 3 (1)" in found.note
    lost = torch_in_halves(x, weight)
    lost[5] = float("nan")
    assert judged(lambda: lost, x, weight).state == "wrong"


def test_a_result_that_moves_is_a_race() -> None:
    x, weight, calls = torch.ones(20, 64).bfloat16(), torch.ones(32, 64), [0]

    def moving() -> Tensor:
        calls[0] += 1
        y = torch_in_halves(x, weight)
        if calls[0] == 3:
            y[4:6, 8] = 63.75  # within what rounding may do
        return y

    found = judged(moving, x, weight, repeat=6)
    assert found.state == "race" and calls[0] == 6
    assert "1 of 5 repeats" in found.note and "repeat 2 differs: 2 of 640 elements, rows 4 to 5 (2)" in found.note


def test_an_exception_costs_one_case() -> None:
    def die() -> Tensor:
        raise RuntimeError("no kernel image is available")

    found = prompt_check.tried(Case("x", 1, die, lambda: (torch.ones(1), torch.ones(1))), 3, torch.bfloat16)
    assert found.state == "died" and "no kernel image" in found.note and "in die" in found.traceback


@pytest.mark.parametrize("past", [0, 9])
def test_the_reference_of_attention_is_that_of_float64(past: int) -> None:
    random = torch.Generator().manual_seed(past)
    q, keys, values = (torch.randn(*shape, generator=random).half() for shape in (
        (12, 4, 32), (2, past + 12, 32), (2, past + 12, 32)))
    want, spread = attention_reference(q, keys, values)
    for token, head in ((0, 0), (5, 3), (11, 2)):
        k, v = keys[head // 2, :past + token + 1].double(), values[head // 2, :past + token + 1].double()
        weight = (k @ q[token, head].double() / 32**0.5).softmax(0)
        at = slice(32 * head, 32 * head + 32)
        assert torch.allclose(want[token, at].double(), weight @ v, atol=1e-5)
        assert torch.allclose(spread[token, at].double(), (weight.square() @ v.square()).sqrt(), atol=1e-5)
    other = prompt_check.torch_attention(q.float(), keys.float(), values.float())
    assert torch.allclose(other, want, atol=1e-5)

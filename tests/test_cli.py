"""The command line as a user meets it: real stores, exit codes and streams.

One tiny random checkpoint is quantized once; its tokenizer is trained here on a few sentences. Most commands
run in this process; streams, signals and tracebacks are proven on processes of their own.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

import pytest
from helpers import write_tiny_checkpoint
from tokenizer_files import DEMO_TEMPLATE, spm_model
from warm_python import WarmPython

from qmix.cli import main
from qmix.demo import CHECKPOINT


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def qmix(*args: object, stdin: str = "", **env: str) -> Done:
    """The command in this process: starting torch anew for each would take most of the suite's time."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.stdin", io.StringIO(stdin))
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            main([str(a) for a in args])
            code = 0
        except SystemExit as left:
            code = left.code or 0
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    write_tiny_checkpoint(folder, vocab_size=512)
    (folder / "tokenizer.model").write_bytes(spm_model())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>",
                                                              "chat_template": DEMO_TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    out = checkpoint.parent / "store"
    done = qmix("quantize", checkpoint, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return out


def refused(done: Done, code: int, *words: str) -> None:
    """One clear error: the exit code, every word of `words`, no traceback, nothing on stdout."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error: ") == 1 or "Usage:" in done.stderr, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr, done.stderr


def test_generate_streams_text_and_keeps_stdout_clean(store: Path) -> None:
    done = qmix("generate", store, "-p", "the fox", "--raw", "-n", 12, "--seed", 5)
    assert done.returncode == 0, done.stderr
    assert "tok" in done.stderr and "tok" not in done.stdout
    again = qmix("generate", store, "-p", "the fox", "--raw", "-n", 12, "--seed", 5)
    assert again.stdout == done.stdout


def test_quantize_to_a_size(checkpoint: Path, tmp_path: Path) -> None:
    """A mix that fits, by gptq and by hqq from what was measured once; and one that cannot be made."""
    text = tmp_path / "text.txt"
    text.write_text("The lamp at the harbour was lit, and nobody asked who had lit it. " * 60)
    given = "--calibration", text, "--calibration-tokens", 1000
    for method, said in (("gptq", "measuring on"), ("hqq", "as measured before")):
        done = qmix("quantize", checkpoint, tmp_path / method, "--fit", "264K", "--method", method, *given)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr and "expected divergence" in done.stderr
        assert sum(file.stat().st_size for file in (tmp_path / method).glob("*.safetensors")) <= 264 * 1024
        shown = json.loads(qmix("show", tmp_path / method, "--json").stdout)
        assert shown["classes"][0]["format"].startswith(f"mixed {method}")
        assert ("calibration" in shown) == (method == "gptq")
        done = qmix("generate", tmp_path / method, "-p", "fox", "-n", 4, "--temp", 0)
        assert done.returncode == 0 and "chat format: the checkpoint's template" in done.stderr
    refused(qmix("quantize", checkpoint, tmp_path / "no", "--fit", "64K", *given), 3, "--fit 64.0 KiB", "smallest mix")
    assert not (tmp_path / "no").exists()


def test_quantize_with_a_calibration(checkpoint: Path, tmp_path: Path) -> None:
    """The report and `show --experts` tell what the text was and what each expert saw of it."""
    text = tmp_path / "text.txt"
    text.write_text("the fox and the dog went over the hill " * 60)
    done = qmix("quantize", checkpoint, tmp_path / "out", "--method", "gptq", "--calibration", text,
                "--calibration-tokens", 1000)
    assert done.returncode == 0, done.stderr
    assert "tokens of" in done.stderr and "output error" in done.stderr and "gptq" in done.stderr
    shown = json.loads(qmix("show", tmp_path / "out", "--experts", "--json").stdout)
    assert len(shown["all_experts"]) == 12 and len(shown["calibrated_layers"]) == 3
    assert sum(row["tokens"] for row in shown["all_experts"]) == shown["calibration"]["tokens"] * 2 * 3
    assert "all_experts" in qmix("show", tmp_path / "out", "--experts").stdout
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(qmix("quantize", checkpoint, tmp_path / "no", "--method", "gptq", "--calibration", empty), 2, "no tokens")


def test_generate_json_is_one_document(store: Path) -> None:
    done = qmix("generate", store, "--json", "--temp", 0, "-n", 7, "--raw", stdin="the fox and")
    document = json.loads(done.stdout)
    assert {"decode_passes", "drafted", "accepted", "passes_saved", "acceptance"} <= set(document["timings"])
    assert {"text", "token_ids", "finish_reason", "timings", "tiers"} <= set(document)
    assert document["finish_reason"] in ("length", "stop")
    assert len(document["token_ids"]) <= 7
    assert document["tiers"] == {"ram": 100.0}
    assert document["timings"]["prompt_tokens"] > 1


def test_prompt_from_file_is_the_same_prompt(store: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("the fox")
    flags = ("--temp", 0, "-n", 5, "--raw")
    assert (qmix("generate", store, "-f", tmp_path / "prompt.txt", *flags).stdout
            == qmix("generate", store, "-p", "the fox", *flags).stdout)


def test_environment_and_file_stand_behind_the_flag(store: Path, tmp_path: Path) -> None:
    config = tmp_path / "qmix" / "qmix.toml"
    config.parent.mkdir()
    config.write_text(f'[generate]\nmodel = "{store}"\nmax-tokens = 2\ntemp = 0\nraw = true\n')

    def count(*args: object, **env: str) -> int:
        done = qmix("generate", "-p", "the fox", "--json", *args, XDG_CONFIG_HOME=str(tmp_path), **env)
        return len(json.loads(done.stdout)["token_ids"])

    assert count() == 2
    assert count(QMIX_GENERATE_MAX_TOKENS="3") == 3
    assert count("-n", 1, QMIX_GENERATE_MAX_TOKENS="3") == 1


@pytest.mark.parametrize(("args", "code", "words"), [
    (("generate", "{store}", "-p", "x", "-f", "y"), 2, ("-p", "-f")),
    (("generate", "{store}", "-p", "  "), 2, ("empty",)),
    (("generate", "{store}", "-f", "{tmp}/none.txt"), 2, ("none.txt",)),
    (("generate", "{store}", "-p", "x", "--temp", "-1"), 2, ("--temp", "-1")),
    (("generate", "{store}", "-p", "x", "--top-p", "0"), 2, ("--top-p",)),
    (("generate", "{store}", "-p", "x", "--seed", "abc"), 2, ("--seed",)),
    (("generate", "{store}", "-p", "x", "-c", "99999999"), 2, ("ctx-size",)),
    (("generate", "{store}", "-p", "the fox " * 400, "-c", "32", "--raw"), 2, ("32",)),
    (("generate", "{store}", "-p", "x", "--raw", "--system", "y"), 2, ("--system",)),
    (("generate", "{tmp}/nothing", "-p", "x"), 2, ("nothing",)),
    (("generate", "-p", "x"), 2, ("MODEL",)),
    (("generate", "{checkpoint}", "-p", "x"), 2, ("qmix quantize", "{checkpoint}")),
    (("chat", "{store}"), 2, ("terminal", "qmix generate")),
    (("show", "{tmp}"), 4, ("{tmp}",)),
    (("quantize", "{checkpoint}", "{store}"), 2, ("--force",)),
    (("quantize", "{tmp}", "{tmp}/out"), 4, ("config.json",)),
    (("quantize", "{checkpoint}", "{tmp}/out", "--format", "int5"), 2, ("int5", "int4")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--format", "nf4", "--group-size", "64"), 2, ("--group-size", "int4")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--format", "keep", "--method", "rtn"), 2, ("--method",)),
    (("quantize", "{checkpoint}", "{tmp}/out", "--method", "gptq"), 2, ("--calibration",)),
    (("quantize", "{checkpoint}", "{tmp}/out", "--calibration", "x.txt"), 2, ("--calibration", "x.txt")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--format", "nf4", "--dense", "keep", "--calibration", "x.txt"), 2,
     ("--calibration", "gptq")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--bpw", "3.7"), 2, ("--bpw 3.7", "--calibration FILE")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--fit", "22G", "--bpw", "3.7"), 2, ("--fit 22G", "one of them")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--fit", "22G", "--format", "int4"), 2, ("--fit 22G", "--format int4")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--fit", "22G", "--group-size", "32"), 2, ("--group-size 32",)),
    (("quantize", "{checkpoint}", "{tmp}/out", "--fit", "22GB", "--calibration", "x.txt"), 2, ("--fit", "22GB")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--format", "mixed"), 2, ("mixed", "--fit")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--method", "rtn", "--calibration-tokens", "9"), 2,
     ("--calibration-tokens", "gptq")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--method", "gptq", "--calibration", "{tmp}/no.txt"), 2,
     ("{tmp}/no.txt", "No such file")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--method", "gptq", "--calibration", "{checkpoint}/model.safetensors"),
     2, ("not UTF-8",)),
    (("quantize", "{checkpoint}", "{tmp}/out", "--block", "16"), 2, ("--block", "16")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--group-size", "48"), 2, ("--group-size", "48")),
    (("quantize", "{checkpoint}", "{tmp}/out", "--double-quant"), 2, ("--double-quant",)),
    (("generate", "{store}", "-p", "x", "-t", "100000"), 2, ("--threads", "100000")),
    (("quantize", "{checkpoint}", "{tmp}/out", "-t", "100000"), 2, ("--threads", "100000")),
    (("quantize", "{checkpoint}", "{store}/config.json/sub"), 2, ("in the way",)),
    (("quantize", "{checkpoint}", "{checkpoint}/sub"), 2, ("inside",)),
    (("nonsense",), 2, ("nonsense",)),
])
def test_bad_input_is_one_clear_error(args: tuple[str, ...], code: int, words: tuple[str, ...], store: Path,
                                      checkpoint: Path, tmp_path: Path) -> None:
    places = {"store": store, "checkpoint": checkpoint, "tmp": tmp_path}
    refused(qmix(*(a.format(**places) for a in args)), code, *(w.format(**places) for w in words))
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing_and_tells_the_size(checkpoint: Path, tmp_path: Path) -> None:
    done = qmix("quantize", checkpoint, tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d B|KiB|MiB", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_show_and_verify(store: Path, tmp_path: Path) -> None:
    assert "int4" in qmix("show", store).stdout
    assert isinstance(json.loads(qmix("show", store, "--json").stdout), dict)
    assert qmix("verify", store, "--deep").returncode == 0
    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    path = broken / "experts-00.safetensors"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    refused(qmix("verify", broken, "--deep"), 4, "experts-00.safetensors", "layers.0.experts.0")
    refused(qmix("generate", broken, "-p", "x", "--raw"), 4, "layers.0.experts.0")
    path.write_bytes(data[:-100])
    refused(qmix("show", broken), 4, "experts-00.safetensors")


def test_an_error_in_a_process_of_its_own_has_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "qmix", "show", str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error(store: Path, warm_python: WarmPython) -> None:
    args = ["generate", store, "-p", "the fox", "--raw", "-n", 60, "--temp", 0]
    with warm_python.start("-m", "qmix", *args, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors and "BrokenPipe" not in errors, errors
    assert process.returncode == 0, errors


@pytest.mark.parametrize(("name", "text"), [
    ("tokenizer.model", "not a model"), ("tokenizer_config.json", "{bad"),
    ("tokenizer_config.json", '{"chat_template": "{% if %}"}'), ("generation_config.json", '{"eos_token_id": "x"}'),
])
def test_damaged_small_files_are_found_before_the_weights_are_read(checkpoint: Path, tmp_path: Path, name: str,
                                                                   text: str) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (source / name).write_text(text)
    refused(qmix("quantize", source, tmp_path / "out"), 4)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_missing_tokenizer_is_said(checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (source / "tokenizer.model").unlink()
    done = qmix("quantize", source, tmp_path / "out", "--dry-run")
    assert done.returncode == 0 and "warning" in done.stderr and "tokenizer.model" in done.stderr


def test_interrupt_keeps_what_was_said(store: Path, warm_python: WarmPython) -> None:
    args = ["generate", store, "-p", "the fox", "--raw", "--temp", 1]
    with warm_python.start("-m", "qmix", *args, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail(f"the answer ended before the interrupt: {first + rest!r}")
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


def test_demo_quantizes_the_bundled_model_once_and_answers() -> None:
    done = qmix("demo", "-p", "Tell me a story about a fox.", "--temp", 0)
    assert done.returncode == 0, done.stderr
    assert "fox" in done.stdout.lower()
    assert len(done.stdout.split()) > 30
    again = qmix("demo", "-p", "Tell me a story about a fox.", "--temp", 0)
    assert again.stdout == done.stdout
    assert "quantizing" not in again.stderr
    assert "demo" in qmix("list").stdout
    assert CHECKPOINT.is_dir()

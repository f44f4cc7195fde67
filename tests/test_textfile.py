"""Users' text: UTF-8, one byte order mark skipped, errors that name file, offset and cure; every reader of it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from tokenizer_files import byte_level_json, demo_folder, write_folder

from qmix import settings
from qmix.chat import savefile
from qmix.chat.conversation import Conversation, Exchange
from qmix.checkpoint import Checkpoint
from qmix.commands.eval import _read as read_eval_text
from qmix.commands.plan import report as planning
from qmix.commands.prompt import read_prompt
from qmix.commands.quantize import calibration
from qmix.config import SamplingParams
from qmix.demo import CHECKPOINT as DEMO
from qmix.errors import ConfigError, ModelFileError, UsageError
from qmix.textfile import MARK, decode, read_text, with_plain_line_ends
from qmix.tokenizer import Message, load

MARK_BYTES = MARK.encode()


@pytest.mark.parametrize(("data", "text"), [
    (b"", ""), (b"a\r\nb", "a\r\nb"), (MARK_BYTES + b"a", "a"), (MARK_BYTES, ""),
    (MARK_BYTES * 2, MARK),  # the second is text
    (b"a" + MARK_BYTES, "a" + MARK),
])
def test_one_mark_at_the_start_is_skipped(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    assert read_text(tmp_path / "x") == decode(data, "x") == text


@pytest.mark.parametrize(("data", "message", "cure"), [
    (b"ab\xff", "x: not UTF-8 at byte 2 (0xff)", "iconv -f LATIN1"),
    (MARK_BYTES + b"\x80", "x: not UTF-8 at byte 3 (0x80)", "iconv -f LATIN1"),
    ("caf\u00e9".encode("latin-1"), "x: not UTF-8 at byte 3 (0xe9)", "iconv -f LATIN1"),
    ("hi".encode("utf-16"), "x: the text is UTF-16, want UTF-8", "iconv -f UTF-16"),
])
def test_what_is_not_utf8_is_named_with_offset_and_cure(data: bytes, message: str, cure: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        decode(data, "x", ModelFileError)
    assert caught.value.message == message and cure in (caught.value.cure or "")


def test_a_text_that_was_cut_may_end_inside_a_character() -> None:
    data = "a\u20ac".encode()[:-1]
    assert decode(data, "x", cut=True) == "a"
    with pytest.raises(UsageError, match="byte 1"):
        decode(data, "x")
    with pytest.raises(UsageError, match="byte 0"):
        decode(b"\xff" + data, "x", cut=True)


def test_a_file_that_is_not_there_is_named_as_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-f gone: No such file"):
        read_text(tmp_path / "gone", "-f gone", ConfigError)


def test_line_ends_are_those_of_pythons_text_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a\r\nb\rc\n\r\r\n")
    assert with_plain_line_ends(read_text(tmp_path / "x")) == (tmp_path / "x").read_text()


# ---- every reader of users' text

def test_prompts_and_settings_skip_the_mark(tmp_path: Path) -> None:
    prompt, toml = tmp_path / "prompt", tmp_path / "qmix.toml"
    prompt.write_bytes(MARK_BYTES + b"Why?\r\n")
    assert read_prompt(None, prompt, io.StringIO()) == "Why?\n"
    assert read_prompt(None, None, io.StringIO(MARK + "Why?")) == "Why?"
    assert read_eval_text(prompt) == "Why?\r\n"
    toml.write_bytes(MARK_BYTES + b"temp = 1.0")
    assert settings.read_file(toml, {"chat": {"temp": float}}) == {"chat": {"temp": 1.0}}
    toml.write_bytes(b"temp = '\xff'")
    with pytest.raises(ConfigError, match=f"{re.escape(str(toml))}: not UTF-8 at byte 8"):
        settings.read_file(toml, {"chat": {"temp": float}})


def test_a_prompt_of_nothing_but_the_mark_is_empty(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(MARK_BYTES)
    for arguments in ((None, tmp_path / "x", io.StringIO()), (None, None, io.StringIO(MARK))):
        with pytest.raises(UsageError, match="empty"):
            read_prompt(*arguments)


def test_calibration_skips_the_mark(tmp_path: Path) -> None:
    words = b"The fox carried a lantern through the dark forest. " * 400
    found = []
    with Checkpoint.open(DEMO) as checkpoint:
        for data in (words, MARK_BYTES + words):
            (tmp_path / "x").write_bytes(data)
            found.append(calibration.read_calibration(checkpoint, tmp_path / "x", 256).ids)
    assert found[0].tolist() == found[1].tolist()


def test_a_saved_conversation_skips_the_mark(tmp_path: Path) -> None:
    talk = Conversation("m", "be kind", (Exchange("a", "b"),))
    savefile.save(tmp_path / "x.json", talk, SamplingParams())
    (tmp_path / "x.json").write_bytes(MARK_BYTES + (tmp_path / "x.json").read_bytes())
    assert savefile.load(tmp_path / "x.json")[0] == talk


def test_configuration_files_skip_the_mark(tmp_path: Path) -> None:
    folder, plain = demo_folder(tmp_path / "a"), demo_folder(tmp_path / "b")
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    (folder / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    for path in folder.glob("*.js*"):
        (plain / path.name).write_bytes(path.read_bytes())
        path.write_bytes(MARK_BYTES + path.read_bytes())
    (plain / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    (folder / "chat_template.jinja").write_bytes(MARK_BYTES + b"[{{ messages[0].content }}]")
    ours, theirs = load(folder), load(plain)
    assert ours.eos_ids == theirs.eos_ids and 5 in ours.eos_ids
    assert ours.encode_chat([Message("user", "fox")]) == theirs.encode_chat([Message("user", "fox")])


def test_a_tokenizer_json_skips_the_mark(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, json_text=byte_level_json())
    (folder / "tokenizer.json").write_bytes(MARK_BYTES + byte_level_json().encode())
    assert load(folder).decode(load(folder).encode("fox")) == "fox"


def test_a_config_json_with_the_mark_is_planned_and_opened(tmp_path: Path) -> None:
    for path in DEMO.iterdir():
        mark = MARK_BYTES if path.name == "config.json" else b""
        (tmp_path / path.name).write_bytes(mark + path.read_bytes())
    assert planning.find_model(tmp_path, None, None, print).model.num_layers > 0
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.raw_config == json.loads((DEMO / "config.json").read_text())


def test_utf16_on_stdin_is_refused() -> None:
    with pytest.raises(UsageError, match="stdin: the text is UTF-16") as refused:
        read_prompt(None, None, io.TextIOWrapper(io.BytesIO("hi".encode("utf-16"))))
    assert "iconv -f UTF-16" in str(refused.value)

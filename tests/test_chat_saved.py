"""Conversations that the chat saves by itself: a file each, found again by name, and none ever lost to another."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from subprocess import PIPE

import pytest
from chat_fakes import Talk
from warm_python import WarmPython

from qmix.chat import savefile
from qmix.chat.conversation import Conversation, Exchange
from qmix.chat.savefile import Autosave, rows, stem_of
from qmix.config import SamplingParams
from qmix.errors import QmixError, UsageError

PARAMS = SamplingParams()


def conversation(*questions: str, model: str = "m") -> Conversation:
    return Conversation(model, None, tuple(Exchange(question, "x") for question in questions))


def questions(folder: Path) -> dict[str, list[str]]:
    """{name of a file: the questions in it}"""
    return {path.name: [message["content"] for message in json.loads(path.read_text())["messages"][::2]]
            for path in (folder / "chats").iterdir()}


def test_each_conversation_has_a_file_of_its_own(tmp_path: Path) -> None:
    one = Talk(tmp_path)
    one.say("one")
    two = Talk(tmp_path)
    assert two.chat.autosave.path is None and "saved in    nothing yet" in two.say("/show")[1]
    two.say("two")
    one.say("one more")
    assert sorted(questions(tmp_path).values()) == [["one", "one more"], ["two"]]
    assert "saved as conversation 2" in two.say("/clear")[1]
    two.say("three")
    assert sorted(questions(tmp_path).values()) == [["one", "one more"], ["three"], ["two"]]
    assert Talk(tmp_path, resume="").said == two.said
    assert Talk(tmp_path, resume="1").said == one.said
    with pytest.raises(UsageError, match="--continue=7: no such") as caught:
        Talk(tmp_path, resume="7")
    assert "saved: 3, 1, 2" in str(caught.value.cure)


def test_two_chats_that_go_on_with_one_conversation_part(tmp_path: Path) -> None:
    """The second to save finds the file changed: it takes another, and says so once."""
    Talk(tmp_path).say("start")
    one, two = Talk(tmp_path, resume=""), Talk(tmp_path, resume="")
    assert "conversation" not in one.say("one")[1]
    err = two.say("two")[1]
    assert "conversation 1 was changed" in err and "now conversation 2" in err
    assert "was changed" not in two.say("two more")[1] and "was changed" not in one.say("one more")[1]
    assert sorted(questions(tmp_path).values()) == [["start", "one", "one more"], ["start", "two", "two more"]]


def test_a_removed_file_is_written_anew(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.say("one")
    assert talk.chat.autosave.path is not None
    talk.chat.autosave.path.unlink()
    talk.say("two")
    assert list(questions(tmp_path).values()) == [["one", "two"]]


def test_files_of_before_are_found(tmp_path: Path) -> None:
    """MODEL.json and MODEL.previous.json, which one conversation and the one before it had."""
    folder = tmp_path / "chats"
    folder.mkdir()
    for at, (name, said) in enumerate((("previous.json", "earlier"), ("json", "later"))):
        path = folder / f"{stem_of('m')}.{name}"
        savefile.save(path, conversation(said), PARAMS)
        os.utime(path, (1000 + at, 1000 + at))
    autosave = Autosave(tmp_path, "m")
    assert [one.name for one in autosave.saved()] == ["old", "previous"]
    assert autosave.load("previous") == (conversation("earlier"), PARAMS)
    assert autosave.load() == (conversation("later"), PARAMS) and autosave.name == "old"
    assert autosave.save(conversation("later", "on"), PARAMS) == ""
    Autosave(tmp_path, "m").save(conversation("new"), PARAMS)
    assert questions(tmp_path) == {f"{stem_of('m')}.previous.json": ["earlier"], f"{stem_of('m')}.json":
                                   ["later", "on"], f"{stem_of('m')}.1.json": ["new"]}


def test_saved_at_one_moment_by_many_chats(tmp_path: Path, warm_python: WarmPython) -> None:
    """Processes that all save new conversations, and go on with them, at once: as many files, each whole."""
    program = ("import sys; from pathlib import Path; from test_chat_saved import *\n"
               "me = sys.argv[2]; autosave = Autosave(Path(sys.argv[1]), 'm'); said = []\n"
               "sys.stdin.read(1)\n"
               "for n in range(20):\n"
               "    said.append(f'{me} {n}'); assert autosave.save(conversation(*said), PARAMS) == ''\n")
    running = [warm_python.start("-c", program, tmp_path, n, stdin=PIPE, cwd=Path(__file__).parent) for n in range(4)]
    for process in running:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(120) for process in running] == [0] * 4
    assert sorted(questions(tmp_path).values()) == [[f"{me} {n}" for n in range(20)] for me in range(4)]


def test_without_locks_and_hard_links_no_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    for said in ("a", "b", "c"):
        Autosave(tmp_path, "m").save(conversation(said), PARAMS)
    assert sorted(questions(tmp_path).values()) == [["a"], ["b"], ["c"]]
    with pytest.raises(FileExistsError):
        savefile.save(next((tmp_path / "chats").iterdir()), conversation("d"), PARAMS, new=True)


def test_killed_while_saving(tmp_path: Path, warm_python: WarmPython) -> None:
    """A process that is killed in the middle of a save leaves the file of before, and a list that shows it."""
    Autosave(tmp_path, "m").save(conversation("a"), PARAMS)
    program = ("import os, signal, sys; from pathlib import Path; from test_chat_saved import *\n"
               "autosave = Autosave(Path(sys.argv[1]), 'm'); autosave.load()\n"
               "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
               "autosave.save(conversation('a', 'b'), PARAMS)\n")
    done = warm_python.run("-c", program, tmp_path, cwd=Path(__file__).parent)
    assert done.returncode == -signal.SIGKILL
    assert Autosave(tmp_path, "m").load() == (conversation("a"), PARAMS)
    assert [row["begins"] for row in rows(tmp_path)] == ["a"]
    again = Autosave(tmp_path, "m")
    again.load()
    again.save(conversation("a", "c"), PARAMS)
    assert Autosave(tmp_path, "m").load() == (conversation("a", "c"), PARAMS)


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(tmp_path)
    talk.say("one")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert "No space left" in talk.say("two")[1]
        assert "No space" not in talk.say("three")[1]
    assert list(questions(tmp_path).values()) == [["one"]]
    talk.say("four")
    assert list(questions(tmp_path).values()) == [["one", "two", "three", "four"]]


def test_the_list(tmp_path: Path) -> None:
    Autosave(tmp_path, "m").save(conversation("first\nline", "second"), PARAMS)
    Autosave(tmp_path, "other").save(conversation("of another", model="other"), PARAMS)
    damaged = Autosave(tmp_path, "m")
    damaged.save(conversation("x"), PARAMS)
    assert damaged.path is not None
    damaged.path.write_text("{")
    os.utime(damaged.path, (1, 1))
    (tmp_path / "chats" / "notes.txt").write_text("not ours")
    found = rows(tmp_path)
    assert {(row["name"], row["model"], row["exchanges"]) for row in found} == {
        ("1", "m", 2), ("1", "other", 1), ("2", stem_of("m"), 0)}
    of_m = rows(tmp_path, "m")
    assert [(row["name"], row["begins"]) for row in of_m[:1]] == [("1", "first")] and "model" not in of_m[0]
    assert "damaged" in of_m[1]["begins"] and of_m[1]["saved"].startswith("1970-01-01")
    assert rows(tmp_path / "none") == []


def test_without_a_home_folder_nothing_is_saved_and_that_is_said() -> None:
    with pytest.raises(QmixError, match="no home folder"):
        Autosave(None, "m").save(conversation("a"), PARAMS)
    assert Autosave(None, "m").load() is None

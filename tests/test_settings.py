"""Settings: flag > environment > qmix.toml > default, and nothing misspelt is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmix.errors import ConfigError
from qmix.settings import check_environment, environment_lists, read_file, xdg_folder

COMMANDS = {"chat": {"temp": float, "threads": int | None, "ctx_size": int, "stop": list[str] | None, "stats": bool,
                     "system": str | None},
            "quantize": {"threads": int | None, "format": str}}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "qmix.toml"
    path.write_text(text)
    return path


def test_top_level_keys_reach_every_command_that_has_them(tmp_path: Path) -> None:
    path = write(tmp_path, 'threads = 3\nctx-size = 64\n[chat]\nthreads = 5\ntemp = 0.1\n')
    assert read_file(path, COMMANDS) == {"chat": {"threads": 5, "ctx_size": 64, "temp": 0.1},
                                         "quantize": {"threads": 3}}


def test_no_file_is_no_settings(tmp_path: Path) -> None:
    assert read_file(tmp_path / "none.toml", COMMANDS) == {}


@pytest.mark.parametrize(("text", "names"), [
    ("tempp = 1", "tempp"),
    ("[chat]\nformat = 'nf4'", "[chat] format"),
    ("[chatt]\ntemp = 1", "[chatt]"),
    ("temp = ", "qmix.toml"),
    ("chat = 3", "chat"),
    ("[[chat]]", "chat"),
    ('[chat]\ntemp = "hot"', "[chat] temp"),
    ("temp = true", "temp"),
    ("threads = true", "threads"),
    ("ctx_size = 1.5", "ctx_size"),
    ("stats = 1", "stats"),
    ("system = 5", "system"),
    ("stop = 3", "stop"),
    ("stop = ['a', 3]", "stop"),
])
def test_what_nobody_knows_is_an_error_that_names_it(tmp_path: Path, text: str, names: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_file(write(tmp_path, text), COMMANDS)
    assert names in error.value.message
    assert error.value.exit_code == 2


def test_xdg_folders(tmp_path: Path) -> None:
    assert xdg_folder("data", {"XDG_DATA_HOME": "/x"}) == Path("/x/qmix")
    assert xdg_folder("state", {"XDG_STATE_HOME": "not/absolute"}) == Path.home() / ".local/state/qmix"


def test_values_of_the_right_type_pass(tmp_path: Path) -> None:
    path = write(tmp_path, '[chat]\ntemp = 1\nstop = "end"\nstats = true\nsystem = "Be brief."\nthreads = 2\n')
    assert read_file(path, COMMANDS)["chat"] == {"temp": 1, "stop": ["end"], "stats": True, "system": "Be brief.",
                                                 "threads": 2}


def test_a_misspelt_variable_is_an_error() -> None:
    check_environment(COMMANDS, {"QMIX_CHAT_CTX_SIZE": "5", "QMIX_OTHER": "1", "HOME": "/"})
    with pytest.raises(ConfigError, match="QMIX_CHAT_TEMPP"):
        check_environment(COMMANDS, {"QMIX_CHAT_TEMPP": "1"})


@pytest.mark.parametrize(("text", "values"), [
    ("### a", ["### a"]), ("\n", ["\n"]), ('["a", "b c"]', ["a", "b c"]), ("[INST]", ["[INST]"]), ("[1]", ["[1]"]),
    ("[]", ["[]"]), ('["a", 1]', ['["a", 1]']), ("[" * 100_000, ["[" * 100_000]),
])
def test_lists_in_the_environment(text: str, values: list[str]) -> None:
    assert environment_lists(COMMANDS, {"QMIX_CHAT_STOP": text, "QMIX_CHAT_TEMP": "1"}) == {"chat": {"stop": values}}


def test_an_empty_variable_is_no_list() -> None:
    assert environment_lists(COMMANDS, {"QMIX_CHAT_STOP": ""}) == {}


def test_a_file_nested_too_deeply_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"qmix\.toml"):
        read_file(write(tmp_path, "a = " + "[" * 100_000), COMMANDS)

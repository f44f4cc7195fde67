"""What a hub id says, and which files of a repository it means."""

from __future__ import annotations

import pytest

from qmix.errors import CheckpointError, UsageError
from qmix.hub.names import HubName, choose_gguf, gguf_models

PIECES = tuple(f"Q5_K_M/big-Q5_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3))
FILES = ("README.md", "config.json", "m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-Q4_K_S.gguf", "mmproj-F16.gguf",
         "imatrix_unsloth.gguf", "m-UD-IQ2_M.gguf", *PIECES)


@pytest.mark.parametrize(("text", "want"), [
    ("org/name", HubName("org/name")),
    ("org/name@v1", HubName("org/name", None, "v1")),
    ("org/na.me-2:Q4_K_M", HubName("org/na.me-2", "Q4_K_M")),
    ("org/name:a/b-Q4.gguf@refs/pr/1", HubName("org/name", "a/b-Q4.gguf", "refs/pr/1")),
    ("name", None), ("a/b/c", None), ("org/name:", None), ("org/name:../x", None), ("org/name:a/../x.gguf", None),
    ("org/name:/etc/x", None), ("org/name:a//b", None), ("/org/name", None), ("./org/name", None), ("org/name@", None),
    ("org/name:a b", None), ("org/n\0me", None),
])
def test_what_a_hub_id_says(text: str, want: HubName | None) -> None:
    assert HubName.parse(text) == want
    if want is not None:
        assert str(want) == text


def test_one_revision() -> None:
    name = HubName("org/name", None, "v1")
    assert name.at(None) == name.at("v1") == HubName("org/name").at("v1") == name
    with pytest.raises(UsageError, match="another"):
        name.at("v2")


@pytest.mark.parametrize(("file", "want"), [
    ("Q4_K_M", ("m-Q4_K_M.gguf",)), ("q4_k_s", ("m-Q4_K_S.gguf",)), ("UD-Q4_K_M", ("m-UD-Q4_K_M.gguf",)),
    ("IQ2_M", ("m-UD-IQ2_M.gguf",)), ("m-Q4_K_M.gguf", ("m-Q4_K_M.gguf",)), ("m-Q4_K_M", ("m-Q4_K_M.gguf",)),
    ("Q5_K_M", PIECES), ("Q5_K_M/big-Q5_K_M", PIECES), ("big-Q5_K_M", PIECES), ("big-Q5_K_M.gguf", PIECES),
    (PIECES[1], PIECES), (PIECES[2].rpartition("/")[2], PIECES),
])
def test_the_model_that_is_meant(file: str, want: tuple[str, ...]) -> None:
    assert choose_gguf(HubName("org/name", file), FILES).files == want


def test_what_lies_beside_models_is_none() -> None:
    assert len(gguf_models(FILES)) == 5
    assert choose_gguf(HubName("org/name"), ("a.gguf", "mmproj-a.gguf")).files == ("a.gguf",)


@pytest.mark.parametrize(("file", "files", "want"), [
    (None, FILES, "any of 5 GGUF models: Q5_K_M/big-Q5_K_M-00001-of-00003.gguf, m-Q4_K_M.gguf"),
    ("Q4", FILES, "names no GGUF model of the repository: Q5_K_M/big"),
    ("Q4_K", FILES, "names no GGUF model"), ("x.gguf", FILES, "names no GGUF model"),
    ("Q4_K_M", ("a-Q4_K_M.gguf", "b-Q4_K_M.gguf"), "any of 2 GGUF models: a-Q4_K_M.gguf, b-Q4_K_M.gguf"),
    ("Q4_K_M", ("README.md",), "holds no GGUF model"),
    ("Q5_K_M", (PIECES[0], PIECES[2]), "lacks piece 2 of 3"),
    ("a", ("a-00001-of-00002.gguf", "a-00001-of-00003.gguf"), "any of several files"),
    ("a", ("a-00001-of-99999.gguf",), "lacks piece"),
])
def test_what_is_not_one_model_is_an_error_that_lists_files(file: str | None, files: tuple[str, ...],
                                                            want: str) -> None:
    with pytest.raises(CheckpointError) as error:
        choose_gguf(HubName("org/name", file), files)
    assert want in error.value.message

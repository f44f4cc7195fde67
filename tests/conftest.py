"""Fixtures that several test files share; see helpers.py for the checkpoint factory."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_interpreter import HAVE_TRITON, quicken
from hypothesis import settings
from warm_python import WarmPython

# Before anything imports Triton: without a GPU its kernels are run by its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if HAVE_TRITON:
        quicken()

# Tests start a hundred processes, and each would compile all of qmix anew where Python writes no bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Collecting the tests makes millions of objects that stay. The garbage collector would look through them again and
# again: a third of the time that collecting takes, and later with every test that makes many objects.
gc.disable()

# A process may be paused for minutes, and no test asserts a time.
settings.register_profile("qmix", deadline=None)
settings.load_profile("qmix")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Of tests/fuzz."""
    parser.addoption("--fuzz-seconds", type=float, default=float(os.environ.get("QMIX_FUZZ_SECONDS", "0")),
                     help="seconds for which each test of tests/fuzz tries further mutations")
    parser.addoption("--fuzz-seed", type=int, default=int(os.environ.get("QMIX_FUZZ_SEED", "0")),
                     help="the seed of its first mutation")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


SHARED = Path(__file__).parents[2] / "shared"
# One thread by default: small matrices gain nothing from more, and on a busy machine lose several times over.
THREADS = int(os.environ.get("QMIX_TEST_THREADS", "1"))


@pytest.fixture(scope="session")
def wiki_moe() -> Path:
    """A small trained Mixtral with real routing; not part of the project, so the test may skip."""
    folder = SHARED / "models" / "wiki-moe-29m"
    if not folder.is_dir():
        pytest.skip("the trained model wiki-moe-29m is not here")
    return folder


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Runs Python programs in processes of their own, which need not import torch anew."""
    with WarmPython() as server:
        yield server


@pytest.fixture(autouse=True)
def threads() -> None:
    """Again before each test: an engine sets torch's threads for the whole process, and bits follow their number."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders, each for a test. To make one tmp_path_factory looks through all that there are: with thousands, that
    takes most of a millisecond or several."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_settings(homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's settings, stores or history."""
    home = next(homes)
    home.mkdir()
    for command in ("QUANTIZE", "GENERATE", "CHAT", "DEMO", "BENCH", "EVAL"):
        monkeypatch.setenv(f"QMIX_{command}_THREADS", str(THREADS))
    for kind in ("CONFIG", "DATA", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(home / kind.lower()))


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """A test ends with the threads that it began with."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from browser_tabs import NAMES
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is here: " + ", ".join(NAMES))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def tabs(browser: Any) -> Iterator[Any]:
    """Opens tabs, see browser_tabs.py; what went wrong in one fails the test."""
    from browser_tabs import tabs_of

    with tabs_of(browser) as open_tab:
        yield open_tab

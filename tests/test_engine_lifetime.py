"""An engine that is closed, and one in a forked process: a clear error at once, or an answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_python import WarmPython

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig, SamplingParams
from qmix.demo import CHECKPOINT
from qmix.device import StandIn
from qmix.engine import Engine, Placement, load
from qmix.errors import DoesNotFit, QmixError, UsageError
from qmix.quantize import quantize_checkpoint
from qmix.sizes import MIB

GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lifetime") / "store"
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        quantize_checkpoint(checkpoint, out, QuantConfig(method="rtn"), threads=1)
    return out


@pytest.fixture(params=["resident", "paged"])
def engine(request: pytest.FixtureRequest, store: Path) -> Iterator[Engine]:
    """With all experts in memory, and with a budget that pages them."""
    if request.param == "resident":
        with load(store, threads=1, scoring=True) as found:
            yield found
        return
    for ram in range(256 * MIB, 400 * MIB, MIB // 2):
        try:
            found = load(store, threads=1, ram=ram, base=MIB, scoring=True)
        except DoesNotFit:
            continue
        with found:
            assert not found.plan.resident
            yield found
        return


def test_a_closed_engine_says_so(engine: Engine) -> None:
    """A budget has room for one session, so the answer that was begun is the only one."""
    begun = engine.generate("Once upon a time", GREEDY)
    next(begun)
    engine.close()
    engine.close()  # twice is no error
    for use in (lambda: next(begun), engine.session, lambda: engine.generate("x")):
        with pytest.raises(QmixError, match="the engine is closed"):
            use()
    assert engine.stats()["memory"]["budget"] > 0


def test_sessions_of_a_closed_engine(store: Path) -> None:
    with load(store, threads=1, scoring=True) as engine:
        session = engine.session()
        scores = engine.session().read([1, 2, 3])
        later = engine.generate("Once upon a time", GREEDY)
    for use in (lambda: session.prefill([1]), lambda: session.decode(1), lambda: next(scores), lambda: next(later)):
        with pytest.raises(QmixError, match="the engine is closed"):
            use()
    session.trim(0)


def test_reading_without_the_memory_for_it(store: Path) -> None:
    with load(store, threads=1) as engine:
        session = engine.session()
        with pytest.raises(UsageError, match=r"Session\.read: .*\n.*scoring=True"):
            session.read([1, 2])
    with pytest.raises(QmixError, match="closed"):
        session.read([1, 2])


def test_a_prompt_that_is_neither_text_nor_messages(store: Path) -> None:
    with load(store, threads=1) as engine:
        for prompt, words in ((b"x", "got bytes"), (5, "got int"), (["x"], r"prompt\[0\]: got str"),
                              ([{"role": "user", "content": "x"}], r"prompt\[0\]: got dict")):
            with pytest.raises(UsageError, match=words):
                engine.generate(prompt)  # type: ignore[arg-type]


FORK = """
import os, sys, qmix
from qmix.config import SamplingParams
def say(e):
    return "".join(t.text for t in e.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=4)))
store, threads, own = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
engine = qmix.load(store, threads=threads)
want = say(engine)
if os.fork() == 0:
    try:
        if own:
            engine = qmix.load(store, threads=own)
        text = say(engine)
        engine.close()
        print("the same" if text == want else "another", flush=True)
    except qmix.errors.QmixError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
print("parent", say(engine) == want)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(("threads", "own", "words"), [
    (1, 0, "the same"),  # no thread is needed
    (2, 0, "forked after the model was loaded"),
    (2, 2, "forked from one that had already computed"),
    (2, 1, ""),  # an engine of the child's own, with one thread; bits depend on the number of threads
])
def test_a_forked_child_answers_or_is_refused(store: Path, threads: int, own: int, words: str,
                                              warm_python: WarmPython) -> None:
    done = warm_python.run("-c", "import qmix.errors\n" + FORK, store, threads, own)
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.strip().rsplit("\n", 1)
    assert words in child and parent == "parent True", done.stdout
    assert ("spawn" in child) == (words.startswith("forked"))


FORK_BESIDE_TORCH = """
import os, sys, torch, qmix
from qmix.config import SamplingParams
import ctypes
store, parents, threads, childs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(2)
if parents:
    torch.ones(2**20).neg_()
if os.fork() == 0:
    if childs == "torch":
        torch.ones(2**20).neg_()
    if childs == "native":  # threads that Python does not know, as of tokenizers or a database driver
        libc = ctypes.CDLL(None)
        for _ in range(3):
            libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pause, None)
    for attempt in range(2):
        try:
            with qmix.load(store, threads=threads) as engine:
                text = "".join(t.text for t in engine.generate("Once", SamplingParams(temperature=0, max_tokens=4)))
                print("answered", flush=True)
        except qmix.errors.QmixError as error:
            print(str(error).splitlines()[0], flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists() or not hasattr(os, "fork"), reason="no way to know of a fork")
@pytest.mark.parametrize(("parents", "threads", "childs", "words"), [
    (1, 2, "", "forked from one that had already computed"),  # what the parent computed, qmix did not see
    (1, 1, "", "answered"),
    (0, 2, "", "answered"),
    (1, 2, "native", "forked from one that had already computed"),  # other threads are no sign that OpenMP works
    (0, 2, "native", "answered"),
    (0, 2, "torch", "answered"),  # the child's own OpenMP threads, which a trial in a child of it would lack
])
def test_a_child_of_a_process_that_computed_without_qmix(store: Path, parents: int, threads: int, childs: str,
                                                         words: str, warm_python: WarmPython) -> None:
    done = warm_python.run("-c", "import qmix.errors\n" + FORK_BESIDE_TORCH, store, parents, threads, childs)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(words in line for line in lines), done.stdout


def test_what_a_device_could_not_do_is_said_once_whenever_it_happens(store: Path) -> None:
    """After the start, too: a graph that is captured later may fail."""
    said: list[str] = []
    with load(store, threads=1, context=64, placement=Placement(StandIn()), say=said.append) as engine:
        session = engine.session()
        engine.step([session], [[1, 5]], "prefill")
        assert engine.device is not None
        engine.device.trouble = "no CUDA graphs here"
        for token in (6, 7):
            engine.step([session], [[token]], "decode")
    assert said.count("no CUDA graphs here") == 1

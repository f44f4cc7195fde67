"""Files of a repository into the cache, several at a time, and the hub's library without its own bars and log lines."""

from __future__ import annotations

import queue
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qmix.errors import Interrupted, QmixError
from qmix.hub import blobs
from qmix.hub.errors import AGAIN, hub_error
from qmix.hub.etags import check_etags

CONNECTIONS = 4  # files that are fetched at a time
GRACE = 1.0  # seconds that a thread has to put down its file

Say = Callable[[str], None]


class Progress(Protocol):
    def __call__(self, done: int, total: int, label: str) -> None: ...


Bar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True, slots=True)
class File:
    """A file of weights that is not here yet; begun: bytes of it that are."""

    name: str
    size: int
    etag: str
    begun: int

    @property
    def left(self) -> int:
        return max(0, self.size - self.begun)


def fetch_files(repo: str, where: str, commit: str | None, storage: Path, files: Sequence[File], say: Say,
                bar: Bar | None) -> None:
    """The bytes of `files` into the cache, several at a time. where: the repository as an error names it; storage: its
    folder there. CheckpointError, DoesNotFit or Interrupted where that fails; what came stays."""
    from huggingface_hub import hf_hub_url

    stop, lock = threading.Event(), threading.Lock()
    total, done = sum(file.size for file in files), 0

    def fetch(file: File, progress: Progress) -> None:
        def count(nbytes: int) -> None:
            nonlocal done
            with lock:
                done += nbytes
                progress(done, total, file.name)

        blobs.fetch_blob(storage, file.etag, file.size,
                         hf_hub_url(repo, file.name, revision=commit), count, stop)

    todo, outcomes = deque(files), queue.SimpleQueue[BaseException | None]()

    def work(progress: Progress) -> None:
        while todo and not stop.is_set():
            with suppress(IndexError):  # another thread was faster
                file = todo.popleft()
                try:
                    fetch(file, progress)
                    outcomes.put(None)
                except BaseException as e:
                    outcomes.put(e)

    with quiet(say), (bar or _no_bar)("fetch") as progress:
        # Daemons, since one that waits for a silent server must not keep the user waiting who pressed Ctrl-C.
        threads = [threading.Thread(target=work, args=(progress,), name="qmix-hub", daemon=True)
                   for _ in range(min(CONNECTIONS, len(files)))]
        for thread in threads:
            thread.start()
        try:
            for _ in files:
                if (failed := outcomes.get()) is not None:
                    raise failed
        except KeyboardInterrupt:
            raise Interrupted(f"{where}: stopped while it was fetched", AGAIN) from None
        except QmixError:
            raise
        except Exception as e:
            raise hub_error(where, e) from None
        finally:
            stop.set()
            for thread in threads:
                thread.join(GRACE)


@contextmanager
def _no_bar(title: str) -> Iterator[Progress]:
    yield lambda done, total, label: None


@contextmanager
def quiet(say: Say | None) -> Iterator[None]:
    """The library with check_etags, and without its own bars and log lines; its warnings, such as of a connection that
    is tried again, go to `say`, the first line of each."""
    import logging

    from huggingface_hub.utils.logging import get_logger
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if say is not None:
                text = record.getMessage().splitlines()
                say("the hub: " + " ".join([*text[:1], *text[-1:][len(text) < 2:]]))

    check_etags()
    get_logger("huggingface_hub")  # makes its handler, if nothing did before
    logger, lines = logging.getLogger("huggingface_hub"), Lines(logging.WARNING)
    before, shown = (logger.handlers[:], logger.propagate), not are_progress_bars_disabled()
    logger.handlers, logger.propagate = [lines], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            disable_progress_bars()
            yield
    finally:
        logger.handlers, logger.propagate = before
        if shown:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                enable_progress_bars()

"""What the routers of a model chose, summed over its runs: counts, recency and transitions, by phase. No torch.

    counts[l][e]            tokens that chose expert e in layer l
    last[l][e]              the number of the last of them, 0 where none did; tokens are numbered from 1
    transitions[l][a][b]    tokens that chose a in layer l and then b in layer l + 1

Prefill and decode are counted apart, because a prompt and an answer need not use the same experts.

On disk there is a file per store in the state folder. Several processes may run, and any of them may be killed. So each
one takes a lock, adds its counts to the counts in the file, and replaces the whole file. If anything is wrong with file
or folder, qmix says so and does without the statistics; an answer never fails because of them.

L layers, E experts, K chosen per token.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix.config import ExpertKey

PHASES = ("prefill", "decode")
FORMAT, VERSION = "qmix_router_stats", 1
LIMIT = 1 << 40  # tokens from which all counts are halved
LARGEST = 256 << 20  # bytes of a file; that of Mixtral has some 30 kB
PATIENCE = 5.0  # seconds that saving waits for another process
TOGETHER = 256  # tokens that are counted at a time
SMOOTHING = 16.0  # tokens' worth of "as often as on average" in a conditional frequency

Table = list[list[int]]  # [L][E], or [E][E]
Say = Callable[[str], None]


@dataclass(slots=True)
class Counts:
    """Those of one phase; see the top of the file."""

    tokens: int
    counts: Table
    last: Table
    transitions: list[Table]

    @classmethod
    def empty(cls, layers: int, experts: int) -> Counts:
        def table(rows: int) -> Table:
            return [[0] * experts for _ in range(rows)]

        return cls(0, table(layers), table(layers), [table(experts) for _ in range(layers - 1)])

    def count(self, tokens: Sequence[Sequence[Sequence[int]]]) -> None:
        """tokens[t][l]: the experts that token t chose in layer l. Layer by layer, so that a layer's table, which with
        many experts is large, is in the processor's caches for all tokens but the first."""
        for layer, (counts, last) in enumerate(zip(self.counts, self.last, strict=True)):
            for now, choices in enumerate(tokens, self.tokens + 1):
                for expert in choices[layer]:
                    counts[expert] += 1
                    last[expert] = now
        for layer, table in enumerate(self.transitions):
            for choices in tokens:
                following = choices[layer + 1]
                for expert in choices[layer]:
                    row = table[expert]
                    for after in following:
                        row[after] += 1
        self.tokens += len(tokens)

    def add(self, other: Counts) -> None:
        """What `other` counted, as though its tokens had come after these."""
        for mine, theirs in zip(self.last, other.last, strict=True):
            mine[:] = [self.tokens + new if new else old for old, new in zip(mine, theirs, strict=True)]
        self.tokens += other.tokens
        for to, more in zip([self.counts, *self.transitions], [other.counts, *other.transitions], strict=True):
            for mine, theirs in zip(to, more, strict=True):
                mine[:] = [old + new for old, new in zip(mine, theirs, strict=True)]

    def halve(self) -> None:
        """All alike, so that shares stay; what comes now counts for more than what was."""
        self.tokens //= 2
        for table in (self.counts, self.last, *self.transitions):
            for row in table:
                row[:] = [value // 2 for value in row]


class RouterStats:
    """Statistics of a model of that shape: what was loaded, and what this process has seen since."""

    def __init__(self, layers: int, experts: int):
        self.layers = layers
        self.experts = experts
        self._known = self._nothing()
        self._counted = self._nothing()  # see _fresh
        self._waiting: dict[str, list[Sequence[Sequence[int]]]] = {phase: [] for phase in PHASES}

    def _nothing(self) -> dict[str, Counts]:
        return {phase: Counts.empty(self.layers, self.experts) for phase in PHASES}

    def add_token(self, phase: str, choices: Sequence[Sequence[int]]) -> None:
        """One token; choices[l]: the K different experts it chose in layer l. Kept, not to be changed, and counted with
        others or when somebody asks."""
        assert len(choices) == self.layers, choices
        tokens = self._waiting[phase]
        tokens.append(choices)
        if len(tokens) == TOGETHER:
            self._count_waiting()

    @property
    def _fresh(self) -> dict[str, Counts]:
        """What this process has seen since."""
        self._count_waiting()
        return self._counted

    def _count_waiting(self) -> None:
        for phase, tokens in self._waiting.items():
            if tokens:
                self._counted[phase].count(tokens)
                tokens.clear()

    def add_counts(self, phase: str, tokens: int, counts: Sequence[Sequence[int]],
                   transitions: Sequence[Sequence[Sequence[int]]]) -> None:
        """Many tokens at once, counted by the caller: counts [L][E], transitions [L - 1][E][E]. For recency, an
        expert that any of them chose counts as chosen by the last of them."""
        last = [[tokens if count else 0 for count in row] for row in counts]
        self._fresh[phase].add(Counts(tokens, [list(row) for row in counts], last,
                                      [[list(row) for row in table] for table in transitions]))

    def total(self, phase: str | None = None) -> Counts:
        """The sum over what was loaded and seen; of both phases, prefill first, where none is named."""
        result = Counts.empty(self.layers, self.experts)
        for name in PHASES if phase is None else (phase,):
            result.add(self._known[name])
            result.add(self._fresh[name])
        return result

    def share(self, phase: str | None = None) -> dict[ExpertKey, float]:
        """Of the tokens of a phase, or of both, the fraction that chose each expert; {} where there were none."""
        parts = self._parts(phase)
        tokens = sum(part.tokens for part in parts)
        return {ExpertKey(layer, expert): sum(part.counts[layer][expert] for part in parts) / tokens
                for layer in range(self.layers) for expert in range(self.experts) if tokens}

    def next_probabilities(self, layer: int, chosen: Iterable[int]) -> list[float]:
        """P(expert e of layer + 1 is chosen) for each e, given what `layer` chose: the mean of the conditional
        frequencies given each of `chosen`, those seen seldom drawn towards the frequency of e alone.

        Example: of 100 tokens that chose 3, 80 went on to 5, as 25 % of all tokens do: (80 + 16 * 0.25) / 116.
        """
        parts = self._parts(None)
        tokens = sum(part.tokens for part in parts)
        if tokens == 0:
            return [0.0] * self.experts
        marginal = [sum(column) / tokens for column in zip(*(part.counts[layer + 1] for part in parts), strict=True)]
        means, given = [0.0] * self.experts, list(chosen)
        for expert in given:
            whole = (SMOOTHING + sum(part.counts[layer][expert] for part in parts)) * len(given)
            rows = zip(*(part.transitions[layer][expert] for part in parts), strict=True)
            means = [mean + (sum(row) + SMOOTHING * base) / whole
                     for mean, row, base in zip(means, rows, marginal, strict=True)]
        return means if given else marginal

    def _parts(self, phase: str | None) -> list[Counts]:
        """Those with any token in them."""
        found = [part[name] for name in (PHASES if phase is None else (phase,)) for part in (self._known, self._fresh)]
        return [part for part in found if part.tokens]

    def merge(self, other: RouterStats) -> None:
        """Add all that `other` has, as though it had been seen after this. ValueError where the shapes differ."""
        if (other.layers, other.experts) != (self.layers, self.experts):
            raise ValueError(f"statistics of {other.layers} x {other.experts} experts, want {self.layers} x "
                             f"{self.experts}")
        for phase in PHASES:
            self._fresh[phase].add(other.total(phase))

    def to_json(self) -> dict[str, Any]:
        """Plain data: the shape, and the total of each phase."""
        totals = {phase: self.total(phase) for phase in PHASES}
        return {"layers": self.layers, "experts": self.experts,
                "phases": {phase: {"tokens": one.tokens, "counts": one.counts, "last": one.last,
                                   "transitions": one.transitions} for phase, one in totals.items()}}

    @classmethod
    def from_json(cls, data: Any, layers: int, experts: int) -> RouterStats:
        """What to_json gave, for a model of that shape; ValueError says what is wrong with it."""
        if not isinstance(data, dict) or not isinstance(data.get("phases"), dict):
            raise ValueError("no router statistics")
        if (data.get("layers"), data.get("experts")) != (layers, experts):
            raise ValueError(f"of {data.get('layers')!r:.20} layers with {data.get('experts')!r:.20} experts, "
                             f"the model has {layers} with {experts}")
        stats = cls(layers, experts)
        for phase in PHASES:
            one = data["phases"].get(phase)
            if not isinstance(one, dict):
                raise ValueError(f"phases.{phase}: missing")
            tokens = one.get("tokens")
            if type(tokens) is not int or not 0 <= tokens < LIMIT << 20:
                raise ValueError(f"phases.{phase}.tokens: got {tokens!r:.40}")
            shapes = {"counts": (layers, experts), "last": (layers, experts),
                      "transitions": (layers - 1, experts, experts)}
            for name, shape in shapes.items():
                if not _fits(one.get(name), shape, tokens):
                    raise ValueError(f"phases.{phase}.{name}: want {' x '.join(map(str, shape))} counts up to {tokens}")
            stats._known[phase] = Counts(tokens, one["counts"], one["last"], one["transitions"])
        return stats

    def counted(self) -> tuple[int, Table]:
        """(tokens, counts [L][E]) of both phases since `saved`, copied: for whoever looks again and again. Tokens that
        wait are left waiting: counting their transitions takes least for many at a time."""
        parts, waiting = list(self._counted.values()), [token for some in self._waiting.values() for token in some]
        found = [list(map(sum, zip(*rows, strict=True))) for rows in zip(*(part.counts for part in parts), strict=True)]
        for token in waiting:
            for row, choices in zip(found, token, strict=True):
                for expert in choices:
                    row[expert] += 1
        return sum(part.tokens for part in parts) + len(waiting), found

    def fresh(self) -> RouterStats | None:
        """What was seen since it was loaded or saved last; None where that is nothing."""
        if not any(part.tokens for part in self._fresh.values()):
            return None
        found = RouterStats(self.layers, self.experts)
        found._known = self._fresh
        return found

    def saved(self) -> None:
        """What `fresh` gave is in the file."""
        for phase in PHASES:
            self._known[phase].add(self._fresh[phase])
        self._counted = self._nothing()

    def halve_if_large(self) -> None:
        for phase in PHASES:
            while self.total(phase).tokens > LIMIT:
                self._known[phase].halve()
                self._fresh[phase].halve()


def _fits(value: Any, shape: Sequence[int], most: int) -> bool:
    """Nested lists of that shape with integers of 0 to `most` inside."""
    if not shape:
        return type(value) is int and 0 <= value <= most
    return isinstance(value, list) and len(value) == shape[0] and all(_fits(v, shape[1:], most) for v in value)


def stats_file(folder: Path, fingerprint: str) -> Path:
    """Where the statistics of a store lie in a state folder."""
    plain = fingerprint if re.fullmatch(r"[\w-]{1,80}", fingerprint, re.ASCII) else hashlib.sha256(
        fingerprint.encode(errors="surrogatepass")).hexdigest()
    return folder / f"{plain}.json"


def load(folder: Path | None, fingerprint: str, layers: int, experts: int, say: Say) -> RouterStats:
    """The saved statistics of a store of that shape; empty ones where there are none or no folder, and, said in
    one line, where the file is not one of ours."""
    if folder is not None:
        path = stats_file(folder, fingerprint)
        try:
            data = json.loads(_read(path))
            if not isinstance(data, dict) or data.get(FORMAT) != VERSION:
                raise ValueError(f"not a file of {FORMAT}, version {VERSION}")
            if data.get("store") != fingerprint:
                raise ValueError("of another store")
            return RouterStats.from_json(data, layers, experts)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as e:
            say(f"{path}: ignored ({_reason(e)}); router statistics start from zero")
    return RouterStats(layers, experts)


def _read(path: Path) -> bytes:
    # Non-blocking, since opening a pipe that stands in the file's place would wait for its other end.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise ValueError("not a regular file, or a huge one")
        return file.read(status.st_size)  # read(LARGEST) would allocate as much first


def save(folder: Path, fingerprint: str, stats: RouterStats, say: Say, patience: float = PATIENCE) -> None:
    """Add what this process saw since the last save to the file of the store. Where that fails it is said in one
    line. patience: seconds to wait for another process that is saving."""
    path = stats_file(folder, fingerprint)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock"), say, patience) as alone:
            if (fresh := stats.fresh()) is None:
                return
            # What is wrong with the file was said when it was loaded, or is not ours to keep.
            merged = load(folder, fingerprint, stats.layers, stats.experts, lambda line: None)
            merged.merge(fresh)
            merged.halve_if_large()
            _replace(path, json.dumps({FORMAT: VERSION, "store": fingerprint, **merged.to_json()}), alone)
            stats.saved()
    except OSError as e:
        say(f"{path}: router statistics were not saved: {_reason(e)}")


@contextlib.contextmanager
def _locked(path: Path, say: Say, patience: float) -> Iterator[bool]:
    """Hold the lock file; whether it is really held: some network file systems have no locks. TimeoutError where
    another process does not let go."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600), "rb") as file:
        until = time.monotonic() + patience
        alone = False
        while not alone:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise TimeoutError(f"{path} is locked by another process") from None
                time.sleep(0.02)
            except OSError as e:
                say(f"{path}: cannot be locked ({_reason(e)}): what another qmix saves now may be lost")
                break
        yield alone


def _replace(path: Path, text: str, alone: bool) -> None:
    """Write `path` whole or not at all. Where nobody else is at it, what killed processes left is removed."""
    prefix = f".{path.stem}."
    for stale in path.parent.glob(f"{prefix}*.tmp") if alone else ():
        stale.unlink(missing_ok=True)
    fd, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or str(error).splitlines()[0] or type(error).__name__)[:200]

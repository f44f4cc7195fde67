"""The engine: the one place where a store, a placement plan, the model and the experts meet.

load(folder) -> Engine; Engine.session() -> Session with a KV cache of its own; Engine.step advances
sessions together. One pass runs at a time (a lock), on the caller's thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from qmix import hardware
from qmix.config import DTYPES, Cancel, ModelConfig, QuantConfig, SamplingParams, Step
from qmix.errors import DoesNotFit, UsageError
from qmix.generate import Token, generate
from qmix.kernels.attention import choose_attention
from qmix.kernels.native import Native
from qmix.kernels.rows import bound_formats
from qmix.kernels.table import KernelTable, select
from qmix.model.kvcache import KVCache
from qmix.model.kvint8 import Int8KVCache
from qmix.model.mixtral import BLOCK, Mixtral
from qmix.model.weights import load_dense
from qmix.offload import router_stats
from qmix.offload.forecast import Speeds, forecast, known_shares
from qmix.offload.plan import MARGIN, Needs, Plan, choose_context
from qmix.offload.plan import plan as make_plan
from qmix.offload.setup import Offload, OffloadOptions, open_offload
from qmix.offload.trace import TraceHeader, TraceWriter
from qmix.offload.watch import Recorder
from qmix.render import Progress
from qmix.sizes import MIB, format_bytes
from qmix.speculation import LONGEST, Pace
from qmix.store import Store
from qmix.tokenizer import Message, Tokenizer
from qmix.tokenizer import load as load_tokenizer


def load(folder: str | Path, *, threads: int | None = None, context: int = 0, ram: int | None = None,
         margin: int | None = None, policy: str = "auto", prefetch: str = "auto", verify: str = "first",
         activations: str = "auto", kv: str = "bf16", trace: Path | Recorder | None = None,
         state: Path | None = None, speeds: Speeds | None = None, base: int | None = None, scoring: bool = False,
         say: Callable[[str], None] = lambda line: None, progress: Progress | None = None) -> Engine:
    """Open a store and bring it into memory, within a budget.

    threads: compute threads, default the physical cores, or 1 for a very small model; context: tokens,
    0 = min(model, 8192); ram: bytes for the whole process, None = what is free but for `margin` bytes; policy,
    prefetch, verify: see OffloadOptions; activations: see kernels.table.select; kv: how keys and values are kept,
    "bf16" (that is, in the compute dtype) or "int8", in about half the bytes; trace: a file, or an object, that gets
    every routing decision; state: the folder that keeps router statistics, None = nowhere; speeds: this machine's, for
    a forecast; base: bytes that the process counts as taken already, None = what it holds now; scoring: with room for
    what Session.read needs; say: told every choice a user should know of, a line each.
    Raises DoesNotFit or UsageError before anything large is loaded, StoreError where the store is damaged.
    """
    options = OffloadOptions(policy, prefetch, verify)
    with ExitStack() as opened:
        store = opened.enter_context(Store.open(Path(folder)))
        threads = _default_threads(store) if threads is None else hardware.check_threads(threads)
        torch.set_num_threads(threads)
        config = store.config
        needs = needs_of(store, context, kv, scoring)
        tokenizer = load_tokenizer(store.path, config.vocab_size)
        kernels = select_kernels(config, store.quant, say, activations)
        attention = choose_attention(config.head_dim, kv, say)
        plan = make_plan(needs, *budget(ram, margin, base))
        stats = router_stats.load(state, store.identity, config.num_layers, config.num_experts, say)
        writer = opened.enter_context(_trace_writer(trace, store)) if isinstance(trace, Path) else trace
        for line in plan.lines():
            say(line)
        if kv == "int8":
            say(f"int8 KV cache: {format_bytes(needs.kv // needs.context)} a token, "
                f"{format_bytes(Needs.of(config, store.quant, needs.context).kv // needs.context)} without")
        say(f"{threads} compute thread{'s' if threads > 1 else ''}" + (
            "; " + forecast(plan, speeds, known_shares(stats)).line() if speeds and not plan.resident else ""))
        with ThreadPoolExecutor(1, "qmix-dense") as beside:  # small reads, in the gaps of the experts' large ones
            dense = beside.submit(load_dense, store, kernels)

            def watched(done: int, total: int, label: str) -> None:
                if dense.done():
                    dense.result()  # where it is damaged, nobody need read the rest
                if progress is not None:
                    progress(done, total, label)

            offload = open_offload(store, kernels, plan, options, stats, writer, say, watched)
            opened.callback(offload.close)
            weights = dense.result()
        model = Mixtral(config, weights, kernels, offload.experts, offload.experts.ahead, offload.experts.depth,
                        partial(Int8KVCache if kv == "int8" else KVCache, native=attention),
                        offload.experts.guesses_prompts)
        if state is not None:
            opened.callback(router_stats.save, state, store.identity, stats, say)
        return Engine(store, plan, tokenizer, kernels, model, offload, opened.pop_all())


def needs_of(store: Store, context: int = 0, kv: str = "bf16", scoring: bool = False) -> Needs:
    """What `load` with these arguments plans for."""
    return Needs.of(store.config, store.quant, _context(store.config, context), kv, scoring)


def budget(ram: int | None, margin: int | None, base: int | None = None) -> tuple[int, int]:
    """(bytes for the whole process, bytes it has taken already). DoesNotFit where `ram` is more than there is."""
    available = hardware.memory().available
    base = hardware.resident_bytes() if base is None else base
    if ram is None and margin is not None and margin >= available:
        raise DoesNotFit(f"--margin {format_bytes(margin)}: only {format_bytes(available)} is free",
                         "name a smaller one")
    if ram is None:
        return base + available - (min(MARGIN, available // 8) if margin is None else margin), base
    if margin is not None:
        raise UsageError("--margin: only says what --ram auto leaves free", "drop one of --ram and --margin")
    if ram > base + available:
        raise DoesNotFit(f"--ram {format_bytes(ram)}: only {format_bytes(base + available)} can be had, short of "
                         f"{format_bytes(ram - base - available)}", "name a smaller budget, or close other programs")
    return ram, base


def _trace_writer(path: Path, store: Store) -> TraceWriter:
    config = store.config
    return TraceWriter(path, TraceHeader(config.num_layers, config.num_experts, config.experts_per_token,
                                         config.experts_per_token, store.identity, store.path.resolve().name))


def select_kernels(config: ModelConfig, quant: QuantConfig, say: Callable[[str], None],
                   activations: str = "auto") -> KernelTable:
    """The kernels for the formats that this store uses."""
    plain = DTYPES[config.dtype]
    formats = {plain if f == "keep" else f for f in (*quant.expert_formats, quant.dense)} | {plain}
    return select(formats, {quant.block} if quant.grouped else set(), say=say, activations=activations)


def _native_throughout(store: Store, kernels: KernelTable) -> bool:
    """Whether the native kernels compute all large matrices. Then torch gets one thread while decoding: its own
    second one, after an operation of microseconds, spins for milliseconds on the core that the native one needs (19
    tok/s instead of 26 with two cores)."""
    quant, native = store.quant, kernels.native
    return native is not None and {*quant.expert_formats, quant.dense} <= set(native.formats) and \
        not store.config.tie_embeddings


def _default_threads(store: Store) -> int:
    """The physical cores; but with experts as small as the demo's, handing out the work costs more than a
    second thread brings (a prompt: 5,700 tok/s with two, 10,900 with one), and many times more on a busy machine."""
    return 1 if store.layout.record_bytes < MIB // 8 else hardware.physical_cores()


def _context(config: ModelConfig, asked: int) -> int:
    if asked > config.max_positions:
        raise UsageError(f"--ctx-size {asked}: the model was trained for {config.max_positions} positions",
                         f"choose at most {config.max_positions}")
    return choose_context(config, asked)


class Session:
    """One conversation's positions: its KV cache and the ids whose keys and values are in it."""

    def __init__(self, engine: Engine, number: int, cache: KVCache):
        self._engine = engine
        self.number = number
        self.cache = cache
        self.ids: list[int] = []
        self._drafts = 0  # of the last ids, verified and not settled

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def context(self) -> int:
        """Positions that fit."""
        return self.cache.capacity

    def prefill(self, ids: Sequence[int], cancel: Cancel | None = None) -> Tensor:
        """Append `ids`; logits [V] fp32 after the last one. When interrupted or failing the session is
        as it was before."""
        return self._engine.step([self], [ids], "prefill", cancel)[0]

    def decode(self, token: int, cancel: Cancel | None = None) -> Tensor:
        """Append one token; logits [V] fp32 after it."""
        return self._engine.step([self], [[token]], "decode", cancel)[0]

    def read(self, ids: Sequence[int], skip: int = 0, cancel: Cancel | None = None) -> Iterator[Tensor]:
        """Append `ids`, then give the logits after each of them but the first `skip`, in order: pieces [n, V] fp32 of
        at most BLOCK rows, each computed when it is asked for. Let go of one before asking for the next: a piece of
        Mixtral's is 64 MiB. Errors come at the call, as of prefill. The engine must have been loaded for `scoring`."""
        return self._engine.read(self, ids, skip, cancel)

    def verify(self, ids: Sequence[int], cancel: Cancel | None = None) -> Tensor:
        """Append a token and drafts for those after it, at most 8 in all; logits [T, V] fp32 after each, bit for bit
        those of decode. `trim` must follow: the drafts that stay were right, and count in the statistics."""
        logits = self._engine.step([self], [ids], "decode", cancel, drafts=len(ids) - 1)
        self._drafts = len(ids) - 1
        return logits

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on."""
        drafts, self._drafts = self._drafts, 0
        if drafts:
            self._engine.settle(min(drafts, self.length - length))
        self.cache.trim(length)
        del self.ids[length:]


class Engine:
    """A loaded model. Close it, or use it as a context manager."""

    def __init__(self, store: Store, plan: Plan, tokenizer: Tokenizer, kernels: KernelTable, model: Mixtral,
                 offload: Offload, closing: ExitStack):
        self.store = store
        self.plan = plan
        self.tokenizer = tokenizer
        self._kernels = kernels
        self._threads = torch.get_num_threads()
        self._decode_threads = 1 if _native_throughout(store, kernels) else self._threads
        self._model = model
        self._offload = offload
        self._closing = closing
        self._caches: WeakSet[KVCache] = WeakSet()
        self._lock = threading.Lock()
        self._sessions = 0
        self._paces: dict[int, Pace] = {}

    @property
    def config(self) -> ModelConfig:
        return self.store.config

    @property
    def kernels(self) -> Mapping[str, str]:
        """{format: what computes it}."""
        return self._offload.experts.kernels.names

    @property
    def threads(self) -> int:
        """Compute threads."""
        return self._threads

    @property
    def native(self) -> Native | None:
        """What computes the experts, where the native kernels do."""
        return self._kernels.native if self._kernels.native and self.store.quant.expert_formats <= set(
            self._kernels.native.formats) else None

    def session(self) -> Session:
        """A new conversation with room for plan.context positions. The plan has room for one; DoesNotFit where
        another one, beside those still in use, would break the budget."""
        spare = self.plan.ram.budget - self.plan.ram.total
        used = sum(cache.nbytes for cache in self._caches)
        if used > spare:
            raise DoesNotFit(f"a KV cache of {format_bytes(self.plan.ram.kv)} beside {len(self._caches)} in use: the "
                             f"budget has {format_bytes(max(0, self.plan.ram.kv + spare - used))} left for it",
                             "let go of a session first, or load with a larger budget or a smaller context")
        self._sessions += 1
        cache = self._model.new_cache(self.plan.context)
        self._caches.add(cache)
        return Session(self, self._sessions - 1, cache)

    def step(self, sessions: Sequence[Session], tokens: Sequence[Sequence[int]], phase: str,
             cancel: Cancel | None = None, drafts: int = 0) -> Tensor:
        """Append tokens[i] to sessions[i], all in one pass; logits [P, V] fp32 after each one's last token. drafts: how
        many of the last tokens are guesses; then logits [T, V] after every token, and `settle` must follow.

        UsageError where a session would outgrow its context; on any error every session is unchanged.
        """
        return self._advance(sessions, tokens, phase, cancel, drafts, lambda flat, positions, step: self._model.forward(
            flat, positions, [s.cache for s in sessions], step, drafts > 0))

    def read(self, session: Session, ids: Sequence[int], skip: int, cancel: Cancel | None = None) -> Iterator[Tensor]:
        """See Session.read."""
        assert self.plan.needs.scoring, "load with scoring=True"
        residual = self._advance([session], [ids], "prefill", cancel, 0, lambda flat, positions, step: self._model.read(
            flat, positions, session.cache, step, skip))
        return map(self._logits, residual.split(BLOCK))

    def _logits(self, residual: Tensor) -> Tensor:
        with self._lock:
            torch.set_num_threads(self._threads)
            return self._model.logits(residual)

    def _advance(self, sessions: Sequence[Session], tokens: Sequence[Sequence[int]], phase: str, cancel: Cancel | None,
                 drafts: int, run: Callable[[Tensor, Tensor, Step], Tensor]) -> Tensor:
        """`run` a pass that appends tokens[i] to sessions[i]; what it returns."""
        vocabulary = self.config.vocab_size
        for session, ids in zip(sessions, tokens, strict=True):
            if not all(0 <= token < vocabulary for token in ids):
                raise UsageError(f"token {next(t for t in ids if not 0 <= t < vocabulary)}: want 0 to {vocabulary - 1}")
            if session.length + len(ids) > session.context:
                raise UsageError(f"{session.length} + {len(ids)} tokens do not fit a context of {session.context}",
                                 "raise -c/--ctx-size, or start over")
        flat = torch.tensor([t for ids in tokens for t in ids])
        positions = torch.cat([torch.arange(s.length, s.length + len(ids))
                               for s, ids in zip(sessions, tokens, strict=True)])
        sequence = tuple(s.number for s, ids in zip(sessions, tokens, strict=True) for _ in ids)
        step = Step(phase, sequence, Cancel() if cancel is None else cancel, drafts)  # type: ignore[arg-type]
        with self._lock:
            torch.set_num_threads(self._decode_threads if phase == "decode" else self._threads)
            start = time.perf_counter()
            try:
                found = run(flat, positions, step)
            except BaseException:
                for session in sessions:
                    session.cache.trim(session.length)
                raise
            finally:
                self._offload.end_pass(phase, len(flat), time.perf_counter() - start)
        for session, ids in zip(sessions, tokens, strict=True):
            session.ids.extend(ids)
        return found

    def settle(self, rejected: int) -> None:
        """Of the drafts of the last pass, the last `rejected` were wrong: the statistics count the others."""
        with self._lock:
            self._offload.settle(rejected)

    def pace(self, longest: int, say: Callable[[str], None] = lambda line: None) -> Pace | None:
        """For generate: drafts of up to `longest` ids, as far as they pay; the same one each time, since it learns.
        None, and a line, where they cannot be exact here, or would not be what a trace is to show."""
        if not longest or longest in self._paces:
            return self._paces.get(longest)
        if self._offload.experts.traces:
            say("no drafts while a trace is recorded: it shows one token a pass")
            return None
        if bound := bound_formats(self._kernels):
            say(f"no drafts: here a row of {' and '.join(bound)} depends on those beside it, so the text might differ")
            return None
        return self._paces.setdefault(longest, Pace(longest, self.config.experts_per_token / self.config.num_experts))

    def generate(self, prompt: str | Sequence[Message], params: SamplingParams | None = None,
                 cancel: Cancel | None = None, draft: int = LONGEST) -> Iterator[Token]:
        """Answer a prompt (a text is continued as it is) or a conversation, in a session of its own. draft: ids
        guessed at a time where that pays, 0 to 7; the answer is the same."""
        tokenizer, raw = self.tokenizer, isinstance(prompt, str)
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(list(prompt))
        return generate(self.session(), ids, params or SamplingParams(), tokenizer, cancel,
                        stops=() if raw else tokenizer.turn_stops, continuing=raw, pace=self.pace(draft))

    def stats(self) -> dict[str, Any]:
        """Since the last reset_stats: "experts", in percent where the chosen experts were (what was read ahead came
        from the disk); "memory", the budget and the peak of the whole process in bytes; and "offload", all figures
        of offload.setup.Offload.report."""
        report = self._offload.report()
        both = report["decode"] if report["decode"]["chosen"] else report["prefill"]
        ram = 100.0 * (both["hits"] - both["prefetched"]) / both["chosen"] if both["chosen"] else 100.0
        tiers = {"ram": 100.0} if self.plan.resident else {"ram": ram, "disk": 100.0 - ram}
        memory = {"budget": self.plan.ram.budget, "peak": hardware.peak_bytes()}
        return {"experts": tiers, "memory": memory, "offload": report}

    def reset_stats(self) -> None:
        """Start the figures anew."""
        self._offload.reset()

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

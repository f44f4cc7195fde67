"""The engine: the one place where a store, a placement plan, the model and the experts meet.

load(folder) -> Engine; Engine.session() -> Session with a KV cache of its own; Engine.step advances
sessions together. One pass runs at a time (a lock), on the caller's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from qmix import hardware
from qmix.config import DTYPES, Cancel, ModelConfig, QuantConfig, SamplingParams, Step
from qmix.errors import UsageError
from qmix.generate import Token, generate
from qmix.kernels.table import KernelTable, select
from qmix.model.kvcache import KVCache
from qmix.model.mixtral import Mixtral
from qmix.model.weights import load_dense
from qmix.offload.experts import ResidentExperts
from qmix.offload.plan import Plan, choose_context, plan_resident
from qmix.render import Progress
from qmix.sizes import MIB
from qmix.store import Store
from qmix.tokenizer import Message, Tokenizer
from qmix.tokenizer import load as load_tokenizer


def load(folder: str | Path, *, threads: int | None = None, context: int = 0,
         say: Callable[[str], None] = lambda line: None, progress: Progress | None = None) -> Engine:
    """Open a store and bring it into memory.

    threads: compute threads, default the physical cores, or 1 for a very small model; context: tokens,
    0 = min(model, 8192); say: told every choice a user should know of, a line each.
    Raises StoreError, DoesNotFit or UsageError before anything large is loaded.
    """
    store = Store.open(Path(folder))
    try:
        threads = _default_threads(store) if threads is None else hardware.check_threads(threads)
        torch.set_num_threads(threads)
        config = store.config
        tokenizer = load_tokenizer(store.path, config.vocab_size)
        plan = plan_resident(config, store.quant, _context(config, context), hardware.memory().available)
        say(f"{plan.line()}; {threads} compute thread{'s' if threads > 1 else ''}")
        kernels = select_kernels(config, store.quant, say)
        experts = ResidentExperts(store, kernels, progress=progress)
        model = Mixtral(config, load_dense(store, kernels), kernels, experts, experts.ahead)
        return Engine(store, plan, tokenizer, model)
    except BaseException:
        store.close()
        raise


def select_kernels(config: ModelConfig, quant: QuantConfig, say: Callable[[str], None]) -> KernelTable:
    """The kernels for the formats that this store uses."""
    plain = DTYPES[config.dtype]
    formats = {plain if f == "keep" else f for f in (quant.experts, quant.dense)} | {plain}
    return select(formats, {quant.block} if quant.uses_int4 else set(), say=say)


def _default_threads(store: Store) -> int:
    """The physical cores; but with experts as small as the demo's, handing out the work costs more than a
    second thread brings (487 tok/s with two, 541 with one), and many times more on a busy machine."""
    return 1 if store.layout.nbytes < MIB // 8 else hardware.physical_cores()


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

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.cache.trim(length)
        del self.ids[length:]


class Engine:
    """A loaded model. Close it, or use it as a context manager."""

    def __init__(self, store: Store, plan: Plan, tokenizer: Tokenizer, model: Mixtral):
        self.store = store
        self.plan = plan
        self.tokenizer = tokenizer
        self._model = model
        self._lock = threading.Lock()
        self._sessions = 0

    @property
    def config(self) -> ModelConfig:
        return self.store.config

    def session(self) -> Session:
        """A new conversation with room for plan.context positions."""
        self._sessions += 1
        return Session(self, self._sessions - 1, self._model.new_cache(self.plan.context))

    def step(self, sessions: Sequence[Session], tokens: Sequence[Sequence[int]], phase: str,
             cancel: Cancel | None = None) -> Tensor:
        """Append tokens[i] to sessions[i], all in one pass; logits [P, V] fp32 after each one's last token.

        UsageError where a session would outgrow its context; on any error every session is unchanged.
        """
        for session, ids in zip(sessions, tokens, strict=True):
            if session.length + len(ids) > session.context:
                raise UsageError(f"{session.length} + {len(ids)} tokens do not fit a context of {session.context}",
                                 "raise -c/--ctx-size, or start over")
        flat = torch.tensor([t for ids in tokens for t in ids])
        positions = torch.cat([torch.arange(s.length, s.length + len(ids))
                               for s, ids in zip(sessions, tokens, strict=True)])
        sequence = tuple(s.number for s, ids in zip(sessions, tokens, strict=True) for _ in ids)
        step = Step(phase, sequence, Cancel() if cancel is None else cancel)  # type: ignore[arg-type]
        with self._lock:
            try:
                logits = self._model.forward(flat, positions, [s.cache for s in sessions], step)
            except BaseException:
                for session in sessions:
                    session.cache.trim(session.length)
                raise
        for session, ids in zip(sessions, tokens, strict=True):
            session.ids.extend(ids)
        return logits

    def generate(self, prompt: str | Sequence[Message], params: SamplingParams | None = None,
                 cancel: Cancel | None = None) -> Iterator[Token]:
        """Answer a prompt (a text is continued as it is) or a conversation, in a session of its own."""
        tokenizer, raw = self.tokenizer, isinstance(prompt, str)
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(list(prompt))
        return generate(self.session(), ids, params or SamplingParams(), tokenizer, cancel,
                        stops=() if raw else tokenizer.turn_stops, continuing=raw)

    def stats(self) -> dict[str, dict[str, float]]:
        """Share of expert reads by tier, in percent; one tier so far."""
        return {"experts": {"ram": 100.0}}

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

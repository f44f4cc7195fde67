"""A loaded model: sessions, passes and figures."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from qmix import hardware, process
from qmix.config import Cancel, SamplingParams, Step
from qmix.device import Device
from qmix.device.device import failure
from qmix.engine.figures import tier_shares
from qmix.engine.kernels import native_throughout
from qmix.engine.mtp_states import collector
from qmix.engine.prompt import conversation
from qmix.engine.session import Session
from qmix.errors import DoesNotFit, QmixError, UsageError
from qmix.forward.kv_cache import SessionCache
from qmix.forward.mtp import Mtp, MtpState
from qmix.forward.passes import BLOCK
from qmix.forward.runner import Runner
from qmix.generate import Token, generate
from qmix.kernels.device_table import does_not_run
from qmix.kernels.native import NativeProducts
from qmix.kernels.rows import bound_formats
from qmix.kernels.table import KernelTable
from qmix.offload.expert_map import ExpertMap
from qmix.offload.plan import Plan
from qmix.offload.setup import Offload
from qmix.sizes import format_bytes
from qmix.spec import Model
from qmix.speculation import LONGEST, MtpPace, Pace
from qmix.store import Store
from qmix.tokenizer import Message, Tokenizer

T = TypeVar("T")
WARMED = (1, 2, 4, 8)  # tokens of a pass, of each of which the kernels are other ones


class Engine:
    """A loaded model. Close it, or use it as a context manager. exact: whoever keeps a session from turn to turn should
    empty it first, since a prompt that is read in pieces has other last bits."""

    def __init__(self, store: Store, plan: Plan, tokenizer: Tokenizer, kernels: KernelTable, model: Runner,
                 offload: Offload, closing: ExitStack, device: Device | None = None, exact: bool = False,
                 say: Callable[[str], None] = lambda line: None):
        self.store = store
        self.device = device
        self.exact = exact
        self.plan = plan
        self.tokenizer = tokenizer
        self._kernels = kernels
        self._threads = torch.get_num_threads()
        self._decode_threads = 1 if native_throughout(store, kernels) else self._threads
        self._model = model
        self._offload = offload
        self._closing = closing
        self._caches: WeakSet[SessionCache] = WeakSet()
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()
        self._sessions = 0
        self._say, self._said = say, ""
        self._paces: dict[int, Pace] = {}
        self._map = ExpertMap(store.model, plan.tiers, offload.stats)
        self._mtp: MtpPace | None = None  # of the pace that was asked for last

    @property
    def model(self) -> Model:
        return self.store.model

    @property
    def kernels(self) -> Mapping[str, str]:
        """{format: what computes it}."""
        return self._offload.experts.kernels.names

    @property
    def warm(self) -> bool:
        """Whether the last decode pass says how long another one will take: see Runner.warm."""
        return self._model.warm

    @property
    def threads(self) -> int:
        """Compute threads."""
        return self._threads

    @property
    def native(self) -> NativeProducts | None:
        """What computes the experts, where the native kernels do."""
        return self._kernels.native if self._kernels.native and self.store.quant.expert_formats <= set(
            self._kernels.native.formats) else None

    def session(self) -> Session:
        """A new conversation with room for plan.context positions. The plan has room for one; DoesNotFit where
        another one, beside those still in use, would break the budget; QmixError where the engine is closed, or this
        process was forked after it was loaded."""
        self._check_usable()
        tier = self.plan.tiers[0]
        spare = tier.budget - tier.total
        used = sum(cache.nbytes for cache in self._caches)
        if used > spare:
            raise DoesNotFit(f"a KV cache of {format_bytes(tier.kv)} beside {len(self._caches)} in use: the "
                             f"budget has {format_bytes(max(0, tier.kv + spare - used))} left for it",
                             "release a session first, or load with a larger budget or a smaller context")
        self._sessions += 1
        cache, head = self._model.new_cache(self.plan.context), self._model.mtp
        state = None if head is None else head.new_state(self.plan.context)
        self._caches.update([cache] if state is None else [cache, state.cache])
        return Session(self, self._sessions - 1, cache, state)

    def step(self, sessions: Sequence[Session], tokens: Sequence[Sequence[int]], phase: str,
             cancel: Cancel | None = None, drafts: int = 0) -> Tensor:
        """Append tokens[i] to sessions[i], all in one pass; logits [P, V] fp32 after each one's last token. drafts: how
        many of the last tokens are guesses; then logits [T, V] after every token, and `discard_drafts` must follow.

        UsageError where a session would outgrow its context; on any error every session is unchanged.
        """
        return self._advance(sessions, tokens, phase, cancel, drafts, lambda flat, positions, step: self._model.forward(
            flat, positions, [s.cache for s in sessions], step, drafts > 0,
            collector(self._model, self._mtp, sessions, tokens, step)))

    def draft(self, session: Session, token: int, count: int, cancel: Cancel | None = None) -> list[int]:
        """See Session.draft."""
        count = min(count, session.context - session.length - 1)
        return [] if count < 1 else self._ask_head(session, cancel, [], lambda head, state, following, step: head.draft(
            state, [*following, token], count, step))

    def catch_up(self, session: Session, cancel: Cancel | None = None) -> None:
        """See Session.catch_up."""
        self._ask_head(session, cancel, None, Mtp.catch_up)

    def _ask_head(self, session: Session, cancel: Cancel | None, otherwise: T,
                  work: Callable[[Mtp, MtpState, Sequence[int], Step], T]) -> T:
        """What `work` gives for the tokens after all hidden states that wait but the last; `otherwise` where the
        head has not seen the session's last token, or there is none."""
        self._check_usable()
        head, state = self._model.mtp, session.mtp
        if head is None or state is None or state.end != session.length or not session.length:
            return otherwise
        step = Step("decode", (session.number,), Cancel() if cancel is None else cancel)
        with self._lock, self._entered():
            torch.set_num_threads(self._decode_threads)
            start = time.perf_counter()
            try:
                return work(head, state, session.ids[state.first + 1:], step)
            except BaseException:
                state.trim(session.length)
                raise
            finally:
                self._offload.end_draft(time.perf_counter() - start)

    def read(self, session: Session, ids: Sequence[int], skip: int, cancel: Cancel | None = None) -> Iterator[Tensor]:
        """See Session.read."""
        self._check_usable()
        if not self.plan.needs.scoring:
            raise UsageError("Session.read: the engine was loaded without the memory that it needs",
                             "load it with scoring=True")
        residual = self._advance([session], [ids], "prefill", cancel, 0, lambda flat, positions, step: self._model.read(
            flat, positions, session.cache, step, skip))
        return map(self._logits, residual.split(BLOCK))

    def _logits(self, residual: Tensor) -> Tensor:
        self._check_usable()
        with self._lock, self._entered():
            torch.set_num_threads(self._threads)
            return self._model.logits(residual)

    def _say_trouble(self) -> None:
        """What the device could not do and did otherwise, once, as soon as a pass has met it."""
        if self.device is not None and self.device.trouble != self._said:
            self._said = self.device.trouble
            self._say(self._said)

    def _entered(self) -> AbstractContextManager[object]:
        return nullcontext() if self.device is None else self.device.entered()

    def _advance(self, sessions: Sequence[Session], tokens: Sequence[Sequence[int]], phase: str, cancel: Cancel | None,
                 drafts: int, run: Callable[[Tensor, Tensor, Step], Tensor]) -> Tensor:
        """`run` a pass that appends tokens[i] to sessions[i]; what it returns."""
        self._check_usable()
        vocabulary = self.model.vocab
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
        with self._lock, self._entered():
            torch.set_num_threads(self._decode_threads if phase == "decode" else self._threads)
            start = time.perf_counter()
            try:
                found = run(flat, positions, step)
            except BaseException as e:
                for session in sessions:
                    session.cache.trim(session.length)
                    if session.mtp is not None:
                        session.mtp.trim(session.length)
                if isinstance(e, torch.OutOfMemoryError):
                    raise DoesNotFit("the GPU's memory ran out in the middle of a pass: another program took it, or "
                                     "qmix planned too tightly", "name a smaller --vram, or close other programs that "
                                     "use the GPU") from None
                if isinstance(e, torch.AcceleratorError):  # in prompts any operation may be the one that meets it
                    raise failure(e) from None
                raise
            finally:
                self._offload.end_pass(phase, len(flat), time.perf_counter() - start)
        for session, ids in zip(sessions, tokens, strict=True):
            session.ids.extend(ids)
        self._say_trouble()
        return found

    def warm_up(self) -> None:
        """Passes that count nowhere: kernels are compiled, and graphs captured. QmixError where they do not run."""
        session = self.session()
        try:
            for tokens in [tokens for tokens in WARMED if tokens <= session.context] * 2:
                self.step([session], [[0] * tokens], "decode", drafts=tokens)
                self.discard_drafts(tokens)
                session.cache.trim(0)
                session.ids.clear()
        except QmixError:
            self.close()
            raise
        except Exception as e:
            self.close()
            raise does_not_run("the GPU's kernels do not run here", e) from e
        self.reset_stats()

    def rewind(self, cache: SessionCache, length: int) -> int:
        """See Session.trim; the length that is left."""
        if not cache.recurrent:
            cache.trim(length)
            return length
        with self._lock, self._entered():
            if self._closed:  # no pass follows, and the weights by which a state is computed again are gone
                return length
            torch.set_num_threads(self._decode_threads)
            return cache.rewind(length)

    def discard_drafts(self, rejected: int) -> None:
        """Of the drafts of the last pass, the last `rejected` were wrong: the statistics count the others. Nothing in
        a closed engine or a forked child, where an answer that was not read to its end is dropped."""
        if self._closed or self._forked:
            return
        with self._lock:
            self._offload.discard_drafts(rejected)

    def pace(self, longest: int, say: Callable[[str], None] = lambda line: None) -> Pace | None:
        """For generate: drafts of up to `longest` ids, as far as they pay; the same one each time, since it learns.
        None, and a line, where they cannot be exact here, or would not be what a trace is to show."""
        if not longest or longest in self._paces:
            found = self._paces.get(longest)
            self._mtp = None if found is None else found.mtp
            return found
        if self._offload.experts.traces:
            say("no drafts while a trace is recorded: it shows one token a pass")
            return None
        # A device's few tokens never depend on each other.
        if not self._model.on_device and (bound := bound_formats(self._kernels)):
            say(f"no drafts: here a row of {' and '.join(bound)} depends on those beside it, so the text might differ")
            return None
        pace = self._paces[longest] = Pace(longest, self.model.top_k / self.model.num_experts)
        if self._model.mtp is not None:
            self._mtp = pace.mtp = MtpPace(pace, say)
        return pace

    def generate(self, prompt: str | Sequence[Message], params: SamplingParams | None = None,
                 cancel: Cancel | None = None, draft: int = LONGEST) -> Iterator[Token]:
        """Answer a prompt (a text is continued as it is) or a conversation, in a session of its own. draft: ids
        guessed at a time where that pays, 0 to 7; the answer is the same."""
        self._check_usable()
        tokenizer, raw = self.tokenizer, isinstance(prompt, str)
        limit = self.plan.context
        ids = tokenizer.encode(prompt, limit=limit) if isinstance(prompt, str) else \
            tokenizer.encode_chat(conversation(prompt), limit)
        return generate(self.session(), ids, params or SamplingParams(), tokenizer, cancel,
                        stops=() if raw else tokenizer.turn_stops, continuing=raw, pace=self.pace(draft))

    def stats(self) -> dict[str, Any]:
        """Since the last reset_stats: "experts", in percent where the chosen experts were (what was read ahead came
        from the disk); "memory", the budget and the peak of the whole process in bytes; and "offload", all figures
        of offload.setup.Offload.report."""
        report = self._offload.report()
        both = report["decode"] if report["decode"]["chosen"] else report["prefill"]
        tiers = tier_shares(self.plan, both)
        memory = {"budget": self.plan.ram.budget, "peak": hardware.peak_bytes()}
        if self.device is not None:
            memory |= {"vram_budget": self.plan.tiers[0].budget, "vram_taken": self.device.taken(),
                       "vram_beside": self.device.beside()}
        return {"experts": tiers, "memory": memory, "offload": report}

    def on_layer(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever a layer's router has chosen, in the thread that computes: it may look at the figures.
        It must be quick, and not raise."""
        self._offload.experts.on_layer(notify)

    def expert_map(self) -> dict[str, Any]:
        """Where each expert is and how often the last tokens chose it; see offload.expert_map. Only in the thread that
        computes, or while nothing is computed."""
        return self._map.look(self._offload.tiers)

    def reset_stats(self) -> None:
        """Start the figures anew."""
        self._offload.reset()

    def close(self) -> None:
        """Free everything. A pass that another thread computes is waited for; the next one is refused, and so are
        answers that were not read to their end. A forked child only lets go: files and threads are its parent's."""
        if self._forked:
            self._closed = True
            self._closing.pop_all()
            return
        with self._lock:
            self._closed = True
        self._closing.close()

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._pid

    def _check_usable(self) -> None:
        """QmixError where a pass would hang, or read memory and files that are gone."""
        if self._closed:
            raise QmixError(f"{self.store.path}: the engine is closed",
                            "read an answer to its end before Engine.close, or inside the engine's `with` block")
        alone = self._threads == 1 and self.plan.resident and self.device is None and not self._offload.experts.traces
        if self._forked and not alone:
            raise QmixError(f"{self.store.path}: this process was forked after the model was loaded, and a forked "
                            "process has none of the model's threads", process.CURE)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

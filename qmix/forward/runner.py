"""A model without its experts, as the engine runs it: which runner takes which tokens.

    one token of one session, decoded     run_native.py, where the native kernels have what its layers do
    few tokens, decoded on a device       what the engine was given for that
    all else                              run_eager.py

All of them give a token the same bits, but for a device. T tokens, P sessions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from qmix.config import Step
from qmix.device import Device
from qmix.forward.joined import Resident
from qmix.forward.kv_cache import SessionCache, unchanged_on_error
from qmix.forward.mtp import Mtp
from qmix.forward.passes import counts_of
from qmix.forward.run_eager import NO_GUESSES, Collect, Eager, ExpertsBy, Guesses, MakeCache
from qmix.forward.run_native import NativeToken, unsupported
from qmix.forward.weights import DenseWeights, KernelWeights
from qmix.kernels.op import FEW
from qmix.kernels.table import KernelTable
from qmix.spec import Model


class DecodeFew(Protocol):
    """What decodes up to FEW tokens on a device. warm: whether the last call took as long as another one like it will:
    nothing was compiled or captured."""

    @property
    def warm(self) -> bool: ...

    def __call__(self, tokens: Tensor, positions: Tensor, caches: Sequence[SessionCache], step: Step, /) -> Tensor:
        """tokens, positions int64 [T] on the host; caches: of each token its session's -> logits [T, V] fp32 on the
        host. The caches' lengths are the caller's."""


class Runner:
    """weights, kernels: of the dense part; experts: see run_eager.ExpertsBy.

    guesses: how many experts of how many following layers with experts are guessed while decoding; none where nobody
    fetches. caches: makes the KV caches. device: where weights, caches and all tensors of a pass are; None for host
    memory. decode: what takes up to FEW tokens through the layers while decoding. resident: the experts as calls of the
    native library, where all of them are in memory. mtp: the multi-token-prediction head, where the model has one.
    """

    def __init__(self, model: Model, weights: DenseWeights, kernels: KernelTable, experts: ExpertsBy,
                 guesses: Guesses = NO_GUESSES, caches: MakeCache = SessionCache, device: Device | None = None,
                 decode: DecodeFew | None = None, resident: Resident | None = None):
        self.model = model
        self._kernels = kernels
        self._decode = decode
        self._resident = resident
        self._weights = KernelWeights(weights, kernels)
        self._eager = Eager(model, self._weights, experts, kernels.layer, guesses, caches,
                            None if device is None else device.torch_device)
        self.mtp: Mtp | None = None
        if model.mtp_head is not None:
            assert device is None, "a device computes no multi-token-prediction head"
            self.mtp = Mtp(model, self._weights, experts, kernels.layer, caches)
        self._native: NativeToken | None = None
        self._reason: str | None = None if device is None else "it is computed on a device"
        self._asked = device is not None  # whether `_reason` says if there can be one; the first cache shows it

    @property
    def on_device(self) -> bool:
        """Whether a few tokens are decoded by a device."""
        return self._decode is not None

    @property
    def warm(self) -> bool:
        """Whether the last decode pass took as long as another one like it will."""
        return self._decode is None or self._decode.warm

    def new_cache(self, capacity: int) -> SessionCache:
        """An empty cache for one session, with room for `capacity` positions."""
        return self._eager.new_cache(capacity)

    def forward(self, tokens: Tensor, positions: Tensor, caches: Sequence[SessionCache], step: Step,
                all_logits: bool = False, collect: Collect | None = None) -> Tensor:
        """Append tokens to P sessions; fp32 logits [P, V] after each one's last token, or all [T, V].

        tokens, positions: int64 [T], the sessions' new tokens one after another; a session's positions go on where its
        cache ends. step.sequence tells the sessions apart, in the order of `caches`, and may be empty for one. Example:
        caches of length 7 and 0, sequence (4, 9, 9), positions (7, 0, 1). collect: see Eager.forward; of all that is
        computed on the host, it gets what `hidden` takes.

        UsageError when a cache is full; Interrupted when step.cancel is set. On any error the caches are as they were.
        """
        counts = counts_of(len(tokens), len(caches), step)
        _check(positions, caches, counts)
        if step.phase == "decode":
            if self._decode is not None:
                return self._on_device(self._decode, tokens, positions, caches, step, counts, all_logits)
            if len(tokens) == 1 and (native := self._native_for(caches[0])) is not None:
                found = native.logits(int(tokens), caches[0], step)
                if collect is not None:
                    collect(0, native.residual.clone(), 0.0)
                return found
        return self._eager.forward(tokens, caches, step, all_logits, collect)

    def hidden(self, residual: Tensor) -> Tensor:
        """Of any rows of the residual stream behind the last layer, [n, H] fp32: behind the final norm."""
        return self._eager.final(residual)

    def read(self, tokens: Tensor, positions: Tensor, cache: SessionCache, step: Step, skip: int) -> Tensor:
        """Append tokens [T] to one session; the residual stream [T - skip, H] fp32 after the last layer of all but the
        first `skip`, of which `logits` makes logits. Errors as of forward."""
        _check(positions, [cache], [len(tokens)])
        return self._eager.read(tokens, cache, step, skip)

    def logits(self, residual: Tensor) -> Tensor:
        """Of at most BLOCK rows of `read`: fp32 [n, V] on the host, the bits that forward gives where the rows are cut
        as it cuts them."""
        return self._eager.head(residual).cpu()

    @property
    def single_tokens(self) -> str:
        """What decodes one token of one session: "native", or why it is not that; "" as long as no token has been."""
        return "native" if self._native is not None else self._reason or ""

    def _native_for(self, cache: SessionCache) -> NativeToken | None:
        if not self._asked:
            self._asked = True
            self._reason = unsupported(self._eager, self._weights, cache)
            if self._reason is None:
                self._native = NativeToken(self._eager, self._weights, cache, self._resident)
        return self._native

    def _on_device(self, decode: DecodeFew, tokens: Tensor, positions: Tensor, caches: Sequence[SessionCache],
                   step: Step, counts: Sequence[int], all_logits: bool) -> Tensor:
        """A decode pass, up to FEW tokens at a time."""
        own = [cache for cache, count in zip(caches, counts, strict=True) for _ in range(count)]
        logits = torch.empty(len(tokens), self.model.vocab)
        with unchanged_on_error(caches, counts), torch.inference_mode():
            for part in _chunks(caches, counts):
                logits[part] = decode(tokens[part], positions[part], own[part],
                                      replace(step, sequence=step.sequence[part]))
        for cache, count in zip(caches, counts, strict=True):
            cache.length += count
        return logits if all_logits else logits[[end - 1 for end in accumulate(counts)]]


def _chunks(caches: Sequence[SessionCache], counts: Sequence[int]) -> list[slice]:
    """Tokens that a device decodes together. A session with a recurrent state has up to FEW in one chunk, since only
    the last one can be taken back; of more none can, and the chunks end at the marks within."""
    if not any(cache.recurrent for cache in caches):
        return [slice(first, first + FEW) for first in range(0, sum(counts), FEW)]
    found: list[slice] = []
    first = 0
    for cache, count in zip(caches, counts, strict=True):
        marks = [mark - cache.length for mark in cache.marks]
        for begin, end in pairwise(sorted({*range(0, count, FEW), *marks, count})):
            if begin == 0 and found and first + end - found[-1].start <= FEW:
                found[-1] = slice(found[-1].start, first + end)
            else:
                found.append(slice(first + begin, first + end))
        first += count
    return found


def _check(positions: Tensor, caches: Sequence[SessionCache], counts: Sequence[int]) -> None:
    """A caller that appends elsewhere than where a cache ends is in error."""
    want = [cache.length + i for cache, count in zip(caches, counts, strict=True) for i in range(count)]
    assert positions.tolist() == want, "positions do not go on"

"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): the forward pass, top to bottom.

A pass takes the new tokens of one or several sessions and goes through the model layer by layer. In
each layer the tokens are first handled in blocks (attention, then router), then all of them meet the
experts at once, so that an expert is fetched once a layer however long the prompt is.

In prefill blocks are at most 512 tokens of one session, and passes at most 8192 tokens, counted from the first
new token: the cut, and with it every bit, depends on the prompt alone, never on a budget. In decode all tokens of
a pass are one block, and attention takes them one by one, also those of one session.

The residual stream, norms, rotation, router and logits are fp32; matrix products and keys and values
are in the compute dtype. The rows of up to 8 tokens do not depend on each other, with int4 and int8 kernels those
of any number: a token gets the same bits decoded among others as alone, be they other sessions' or drafts of its own.

T tokens of a pass, B of a block, P sessions, H hidden, E experts, K chosen per token, D head size,
V vocabulary, A experts guessed for each of D layers ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.config import ModelConfig, Step
from qmix.device import Device
from qmix.errors import Interrupted
from qmix.kernels.attend import rotation
from qmix.kernels.device_ops import FEW
from qmix.kernels.layer import TORCH, LayerOps
from qmix.kernels.table import KernelTable
from qmix.model.device_decode import DeviceDecode
from qmix.model.fused import Experts, FusedToken, Resident, fits
from qmix.model.kvcache import KVCache
from qmix.model.weights import LayerWeights, Weights

PASS = 8192  # tokens that meet the experts of a layer together
BLOCK = 512  # query positions of one attention call

MakeCache = Callable[[ModelConfig, int, torch.dtype], KVCache]  # (config, capacity, compute dtype)
Take = Callable[[int, Tensor, LayerOps], None]  # (which of the wanted rows comes first, residual [n, H], ops)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [begin, end) of a forward's tokens, all new positions of one session from `start` on."""

    cache: KVCache
    start: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of each token of a pass; a block is a slice of it that shares its memory.

    residual [T, H] fp32; normed [T, H] compute dtype, what the experts read; ids int64 and weights
    fp32 [T, K], the router's choice; ahead int64 [T, D, A], the next routers' guesses; cos, sin fp32 [T, 1, D].
    """

    spans: Sequence[Span]
    residual: Tensor
    normed: Tensor
    ids: Tensor
    weights: Tensor
    ahead: Tensor
    cos: Tensor
    sin: Tensor

    def block(self, spans: Sequence[Span]) -> Rows:
        """The rows of `spans`, which are neighbours, as views."""
        first = self.spans[0].begin
        part = slice(spans[0].begin - first, spans[-1].end - first)
        return Rows(spans, self.residual[part], self.normed[part], self.ids[part], self.weights[part],
                    self.ahead[part], self.cos[part], self.sin[part])


class Mixtral:
    """The model without its experts, which are the one callable

        experts(layer, x [T, H], ids [T, K], weights [T, K], step, ahead [T, D, A] or None, wanted) -> [n, H]

    wanted: the n rows to compute, None for all; others were routed and count, but nothing reads what they would give:
    in the last layer of a prompt, all but the last token's.

    ahead: how many experts of each of the next `depth` layers to guess for it while decoding; 0 where nobody
    fetches. Near the last layer D is smaller than depth, and for the last layer there is nothing to guess.
    guess_prompts: guess in prompts too.
    caches: makes the KV caches; their class decides how keys and values are kept and attended to.
    device: where weights, caches and all tensors of a pass are; None for host memory. decode: what takes up to FEW
    tokens through the layers while decoding, in place of `_pass`. resident: the experts as calls of the native library,
    where all of them are in memory.
    """

    def __init__(self, config: ModelConfig, weights: Weights, kernels: KernelTable, experts: Experts,
                 ahead: int | None = None, depth: int = 1, caches: MakeCache = KVCache,
                 guess_prompts: bool = False, device: Device | None = None, decode: DeviceDecode | None = None,
                 resident: Resident | None = None):
        self.config = config
        self._weights = weights
        self._kernels = kernels
        self._linear = kernels.linear
        self._linears = kernels.linears
        self._experts = experts
        self._ahead = min(config.num_experts, config.experts_per_token if ahead is None else ahead)
        self._depth = min(depth, config.num_layers - 1)
        self._guess_prompts = guess_prompts
        self._make_cache = caches
        self._place = torch.device("cpu") if device is None else device.place
        self._decode = decode
        self._resident = resident
        self._inverse = rotation(config.head_dim, config.rope_theta).to(self._place)
        self._fused: FusedToken | None = None
        self._fits: bool | None = None  # whether there can be one; the first cache shows it

    @property
    def on_device(self) -> bool:
        """Whether a few tokens are decoded by a device."""
        return self._decode is not None

    @property
    def warm(self) -> bool:
        """Whether the last decode pass took as long as another one like it will: nothing was compiled or captured."""
        return self._decode is None or self._decode.warm

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one session, with room for `capacity` positions."""
        return self._make_cache(self.config, capacity, self._weights.dtype)

    def forward(self, tokens: Tensor, positions: Tensor, caches: Sequence[KVCache], step: Step,
                all_logits: bool = False) -> Tensor:
        """Append tokens to P sessions; fp32 logits [P, V] after each one's last token, or all [T, V].

        tokens, positions: int64 [T], the sessions' new tokens one after another; a session's positions
        go on where its cache ends. step.sequence tells the sessions apart, in the order of `caches`, and
        may be empty for one. Example: caches of length 7 and 0, sequence (4, 9, 9), positions (7, 0, 1).

        UsageError when a cache is full; Interrupted when step.cancel is set. On any error the caches
        are as they were.
        """
        counts = _counts(len(tokens), len(caches), step)
        wanted = range(len(tokens)) if all_logits else [end - 1 for end in accumulate(counts)]
        if self._decode is not None and step.phase == "decode":
            return self._decode_few(self._decode, tokens, positions, caches, step, counts)[list(wanted)]
        # Made outside inference mode, so that the caller may change it in place.
        logits = torch.empty(len(wanted), self.config.vocab_size)

        def head(first: int, residual: Tensor, ops: LayerOps) -> None:
            self._head(residual, logits[first:first + len(residual)], ops)

        self._run(tokens, positions, caches, step, counts, wanted, head)
        return logits

    def read(self, tokens: Tensor, positions: Tensor, cache: KVCache, step: Step, skip: int) -> Tensor:
        """Append tokens [T] to one session; the residual stream [T - skip, H] fp32 after the last layer of all but
        the first `skip`, of which `logits` makes logits, a piece at a time: all at once they may be larger than the
        model. Errors as of forward."""
        kept = torch.empty(len(tokens) - skip, self.config.hidden_size, device=self._place)

        def keep(first: int, residual: Tensor, ops: LayerOps) -> None:
            kept[first:first + len(residual)] = residual

        self._run(tokens, positions, [cache], step, [len(tokens)], range(skip, len(tokens)), keep)
        return kept

    def logits(self, residual: Tensor) -> Tensor:
        """Of at most BLOCK rows of `read`: fp32 [n, V], the bits that forward gives where the rows are cut as it cuts
        them."""
        with torch.inference_mode():
            return self._project(residual, TORCH).float().cpu()

    def _run(self, tokens: Tensor, positions: Tensor, caches: Sequence[KVCache], step: Step, counts: Sequence[int],
             wanted: Sequence[int], take: Take) -> None:
        """All tokens through all layers, a pass at a time; `take` gets the residuals of the wanted rows."""
        for cache, count in zip(caches, counts, strict=True):
            cache.need(count)
        spans = list(_spans(counts, caches, 1 if step.phase == "decode" else BLOCK))
        assert all(int(positions[span.begin]) == span.start for span in spans), "positions do not go on"
        lengths = [cache.length for cache in caches]
        done = 0
        try:
            with torch.inference_mode():
                if len(tokens) == 1 and step.phase == "decode" and (fused := self._fused_for(caches[0])):
                    take(0, fused(int(tokens), caches[0], self._experts, step), self._kernels.layer)
                    return
                for group in _passes(spans):
                    inside = range(group[0].begin, group[-1].end)
                    rows = [row for row in wanted if row in inside]
                    self._pass(tokens, positions, group, step, rows, partial(take, done))
                    done += len(rows)
        except BaseException:
            for cache, length in zip(caches, lengths, strict=True):
                cache.length = length
            raise

    def _decode_few(self, decode: DeviceDecode, tokens: Tensor, positions: Tensor, caches: Sequence[KVCache],
                    step: Step, counts: Sequence[int]) -> Tensor:
        """Logits [T, V] after each of a decode pass's tokens, FEW of them at a time."""
        for cache, count in zip(caches, counts, strict=True):
            cache.need(count)
        own = [cache for cache, count in zip(caches, counts, strict=True) for _ in range(count)]
        logits = torch.empty(len(tokens), self.config.vocab_size)
        with torch.inference_mode():
            for first in range(0, len(tokens), FEW):
                part = slice(first, first + FEW)
                logits[part] = decode(tokens[part], positions[part], own[part],
                                      replace(step, sequence=step.sequence[part]))
        for cache, count in zip(caches, counts, strict=True):
            cache.length += count
        return logits

    def _fused_for(self, cache: KVCache) -> FusedToken | None:
        """What takes a single token through the layers, if anything does but `_pass`."""
        if self._fits is None:
            self._fits = fits(self._weights, self._kernels, cache)
        if self._fused is None and self._fits:
            self._fused = FusedToken(self.config, self._weights, self._kernels, cache, self._ahead,
                                     self._depth if self._ahead > 0 else 0, self._resident)
        return self._fused

    def _pass(self, tokens: Tensor, positions: Tensor, spans: Sequence[Span], step: Step,
              wanted: Sequence[int], take: Callable[[Tensor, LayerOps], None]) -> None:
        """The tokens of `spans`, at most PASS, through all layers; `take` gets the residuals [n, H] of the n `wanted`
        ones, if any."""
        first, end = spans[0].begin, spans[-1].end
        step = replace(step, sequence=step.sequence[first:end])
        ops = self._kernels.layer if step.phase == "decode" else TORCH
        rows = self._rows(tokens[first:end], positions[first:end], spans, ops)
        blocks = [rows.block(group) for group in _blocks(spans)]
        layers = self._weights.layers
        look = self._depth if (step.phase == "decode" or self._guess_prompts) and self._ahead > 0 else 0
        for index, layer in enumerate(layers):
            after = layers[index + 1:index + 1 + look]
            for block in blocks:
                if step.cancel:
                    raise Interrupted("cancelled")
                self._attention(index, layer, block, ops)
                self._route(layer, after, block, ops)
            ahead = rows.ahead[:, :len(after)] if after else None
            if index + 1 == len(layers) and len(wanted) < end - first:
                chosen = torch.tensor([row - first for row in wanted], dtype=torch.int64, device=self._place)
                residual = rows.residual[chosen]
                residual.add_(self._experts(index, rows.normed, rows.ids, rows.weights, step, ahead, chosen))
            else:
                rows.residual.add_(self._experts(index, rows.normed, rows.ids, rows.weights, step, ahead, None))
                residual = rows.residual
        for span in spans:
            span.cache.length = span.start + span.end - span.begin
        if wanted:
            take(residual, ops)

    def _rows(self, tokens: Tensor, positions: Tensor, spans: Sequence[Span], ops: LayerOps) -> Rows:
        """The pass before its first layer: embeddings, rotations, and room for the rest."""
        config, count = self.config, len(tokens)
        cos, sin = ops.angles(positions.to(self._place), self._inverse)
        empty = partial(torch.empty, device=self._place)
        return Rows(
            spans, residual=F.embedding(tokens.to(self._place), self._weights.embedding).float(),
            normed=empty(count, config.hidden_size, dtype=self._weights.dtype),
            ids=empty(count, config.experts_per_token, dtype=torch.int64),
            weights=empty(count, config.experts_per_token),
            ahead=empty(count, self._depth, self._ahead, dtype=torch.int64), cos=cos, sin=sin)

    def _attention(self, index: int, layer: LayerWeights, block: Rows, ops: LayerOps) -> None:
        """Add grouped-query attention over each span's own cache to the block's residual."""
        config, dtype, linear = self.config, self._weights.dtype, self._linear
        x = ops.norm(block.residual, layer.input_norm, config.rms_norm_eps, dtype)
        found = self._linears(x, *layer.heads)
        size = config.head_dim
        q, k, v = found if len(found) == 3 else found[0].split(
            (config.num_heads * size, config.num_kv_heads * size, config.num_kv_heads * size), 1)
        queries, keys = ops.rotate(q, k, block.cos, block.sin)
        values = v.unflatten(1, (-1, size))
        sizes = [span.end - span.begin for span in block.spans]
        parts = [(queries, keys, values)] if len(sizes) == 1 else zip(
            queries.split(sizes), keys.split(sizes), values.split(sizes), strict=True)
        out = [span.cache.attend(index, span.start, q, k, v, config.sliding_window)
               for span, (q, k, v) in zip(block.spans, parts, strict=True)]
        rows = out[0] if len(out) == 1 else torch.cat(out)
        block.residual.add_(linear(rows if self._kernels.computes_natively(layer.o) else rows.to(dtype), layer.o))

    def _route(self, layer: LayerWeights, after: Sequence[LayerWeights], block: Rows, ops: LayerOps) -> None:
        """Choose K experts a token: softmax over the K largest router logits, in fp32. Of `after`, the next
        layers, also guess what their routers will choose, by asking them now."""
        x, eps = block.residual, self.config.rms_norm_eps
        ops.route(x, layer.post_norm, layer.router, eps, block.normed, block.ids, block.weights)
        for distance, later in enumerate(after):
            ops.guess(x, later.post_norm, later.router, eps, block.ahead[:, distance])

    def _head(self, residual: Tensor, logits: Tensor, ops: LayerOps) -> None:
        """Final norm and head: [n, H] -> logits [n, V]."""
        for rows, out in zip(residual.split(BLOCK), logits.split(BLOCK), strict=True):
            out.copy_(self._project(rows, ops))

    def _project(self, rows: Tensor, ops: LayerOps) -> Tensor:
        """`_head` of at most BLOCK rows, in what the head computes in."""
        weights = self._weights
        dtype = torch.float32 if self._kernels.computes_natively(weights.head) else weights.dtype
        return self._linear(ops.norm(rows, weights.final_norm, self.config.rms_norm_eps, dtype), weights.head)


def _counts(tokens: int, sessions: int, step: Step) -> list[int]:
    """New tokens of each session: sequence (4, 9, 9) -> [1, 2]."""
    counts = [len(list(run)) for _, run in groupby(step.sequence)] or [tokens]
    if sum(counts) != tokens or len(counts) != sessions or tokens == 0:
        raise ValueError(f"{tokens} tokens, {sessions} caches, but sequence has runs of {counts}")
    return counts


def _spans(counts: Sequence[int], caches: Sequence[KVCache], size: int) -> Iterator[Span]:
    """The new tokens of each session, cut into pieces of `size`."""
    first = 0
    for cache, count in zip(caches, counts, strict=True):
        for begin in range(0, count, size):
            yield Span(cache, cache.length + begin, first + begin, first + min(count, begin + size))
        first += count


def _passes(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans in order, as many to a pass as fit PASS tokens."""
    group: list[Span] = []
    for span in spans:
        if group and span.end - group[0].begin > PASS:
            yield group
            group = []
        group.append(span)
    yield group


def _blocks(spans: Sequence[Span]) -> Iterator[tuple[Span, ...]]:
    """A longer span is a block of its own, so that it is computed as it would be alone; neighbouring
    single tokens, of sessions that decode together or of one with drafts, share one."""
    for single, group in groupby(spans, lambda span: span.end - span.begin == 1):
        if single:
            yield tuple(group)
        else:
            yield from ((span,) for span in group)

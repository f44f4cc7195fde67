"""A token as a few calls of the native library beside the same token Op by Op, bit for bit: on packed weights by this
process' kernels, with paged experts, guesses, an int8 KV cache, several sessions and drafts. What the experts are given
is compared as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import UNQUANTIZED, offloaded, write_tiny_checkpoint
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import DTYPES, Cancel, QuantConfig, Step
from qmix.errors import Interrupted, StoreError, UsageError
from qmix.forward.kv_cache import SessionCache
from qmix.forward.run_eager import Guesses
from qmix.forward.runner import Runner
from qmix.forward.weights import DenseWeights, assemble, compute_dtype, load_dense
from qmix.kernels import native
from qmix.kernels.attention import choose_native_attentions
from qmix.kernels.table import KernelTable, select
from qmix.quantize import quantize_checkpoint
from qmix.store import Store

IDS = [(7 * i * i + 3 * i) % 128 for i in range(700)]
BEST = next(iter(native.levels()), "off")
STORES: dict[str, tuple[QuantConfig, dict[str, Any]]] = {
    "int4": (QuantConfig(dense="int4"), {"sliding_window": 40}),
    "int4 g32, dense int8": (QuantConfig(group_size=32), {}),
    "int8": (QuantConfig("int8", "int8", "", 0, 0), {"num_local_experts": 5, "num_experts_per_tok": 3}),
    "keep": (UNQUANTIZED, {"tie_word_embeddings": True}),
    "keep fp32": (UNQUANTIZED, {"dtype": torch.float32, "num_key_value_heads": 1}),
}


def folder_of(base: Path, name: str) -> Path:
    """A tiny store of `STORES`, made once."""
    folder = base / name
    if not folder.exists():
        quant, changes = STORES[name]
        source = write_tiny_checkpoint(base / f"{name} source", **{"max_position_embeddings": 1024, **changes})
        with Checkpoint.open(source) as opened:
            quantize_checkpoint(opened, folder, quant, threads=1)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


def kernels_of(store: Store, activations: str = "auto") -> KernelTable:
    plain = DTYPES[store.model.dtype]
    quant = store.quant
    formats = {plain if f == "keep" else f for f in (quant.experts, quant.dense)} | {plain}
    return select(formats, say=lambda line: None, activations=activations)


def dense_of(store: Store) -> DenseWeights:
    model = store.model
    dtype = compute_dtype(model, store.quant)
    return load_dense(model, dtype, store.dense)


class Pair:
    """Two runners on the same store, each with experts of its own, of which one computes single tokens Op by Op; seen:
    what the experts of each were given."""

    def __init__(self, store: Store, kv: str = "bf16", slots: int | None = None, activations: str = "auto",
                 window: bool = True):
        kernels, model = kernels_of(store, activations), store.model
        self.offloads = [offloaded(store, kernels, slots, prefetch="ahead") for _ in range(2)]
        self.seen: list[list[tuple[Any, ...]]] = [[], []]
        experts = [self._watched(offload.experts, seen) for offload, seen in zip(
            self.offloads, self.seen, strict=True)]
        ahead, depth = self.offloads[0].experts.ahead, 2
        caches = partial(SessionCache, kv=kv, native=choose_native_attentions(model, kv, lambda line: None))
        self.by_ops, self.runner = (Runner(model, dense_of(store), kernels, one, Guesses(depth, ahead), caches)
                                    for one in experts)
        self.by_ops._asked = True  # its single tokens are never one call a layer

    @staticmethod
    def _watched(experts: Callable[..., Tensor], seen: list[tuple[Any, ...]]) -> Callable[..., Tensor]:
        def call(layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, step: Step, ahead: Tensor | None,
                 wanted: Tensor | None) -> Tensor:
            rows = x if wanted is None else x[wanted]  # others are not read
            seen.append((layer, step.phase, step.sequence, *(None if t is None else t.clone() for t in (
                rows, ids, topk_weights, ahead, wanted))))
            return experts(layer, x, ids, topk_weights, step, ahead, wanted)

        return call

    def close(self) -> None:
        for offload in self.offloads:
            offload.close()

    def agree(self, scenario: Callable[[Any], Iterator[Tensor]]) -> int:
        """Run it on both: how many logits it gave."""
        want, got = list(scenario(self.by_ops)), list(scenario(self.runner))
        assert len(got) == len(want) > 0
        for number, (one, other) in enumerate(zip(got, want, strict=True)):
            assert one.dtype == other.dtype and torch.equal(one, other), number
        assert len(self.seen[0]) == len(self.seen[1])
        for one, other in zip(*self.seen, strict=True):
            assert one[:3] == other[:3]
            for mine, theirs in zip(one[3:], other[3:], strict=True):
                assert (mine is None) == (theirs is None)
                assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
        return len(got)


def append(model: Any, ids: list[int], caches: list[Any], phase: str, counts: list[int] | None = None,
           all_logits: bool = False, cancel: Cancel | None = None) -> Tensor:
    counts = counts or [len(ids)]
    positions = torch.cat([torch.arange(cache.length, cache.length + count) for cache, count in zip(
        caches, counts, strict=True)])
    sequence = tuple(number for number, count in enumerate(counts) for _ in range(count))
    step = Step(phase, sequence, Cancel() if cancel is None else cancel)  # type: ignore[arg-type]
    return model.forward(torch.tensor(ids), positions, caches, step, all_logits)


def everything(model: Any) -> Iterator[Tensor]:
    """Prompts of several lengths, single tokens, drafts, several sessions; a cancelled pass and a full cache."""
    long, short = model.new_cache(640), model.new_cache(64)
    yield append(model, IDS[:600], [long], "prefill")
    yield append(model, IDS[:1], [short], "prefill")
    yield append(model, IDS[1:8], [short], "prefill", all_logits=True)
    for token in IDS[8:12]:
        yield append(model, [token], [short], "decode")
        yield append(model, [token], [long], "decode", all_logits=True)
    for count in range(2, 9):
        yield append(model, IDS[20:20 + count], [long], "decode", all_logits=True)
        long.trim(long.length - count + 1)
    yield append(model, IDS[3:5], [long, short], "decode", [1, 1])
    yield append(model, IDS[5:8], [long, short], "decode", [1, 2], all_logits=True)
    yield append(model, IDS[:25], [short, long], "prefill", [20, 5])
    yield from failures(model, short)
    yield append(model, [5], [short], "decode")


def failures(model: Any, cache: Any) -> Iterator[Tensor]:
    cancel, length = Cancel(), cache.length
    cancel.set()
    for count, phase in ((9, "prefill"), (1, "decode"), (3, "decode")):
        with pytest.raises(Interrupted):
            append(model, IDS[:count], [cache], phase, cancel=cancel)
        with pytest.raises(UsageError, match=f"{length} \\+ 60 tokens do not fit a context of 64"):
            append(model, IDS[:60], [cache], "prefill")
        assert cache.length == length
        yield append(model, [7], [cache], "decode")
        cache.trim(length)


def reading(model: Any) -> Iterator[Tensor]:
    """Logits after every token of a prompt, a piece at a time."""
    cache = model.new_cache(640)
    for begin, end, skip in ((0, 530, 3), (530, 560, 0)):
        ids = torch.tensor(IDS[begin:end])
        residual = model.read(ids, torch.arange(begin, end), cache, Step("prefill"), skip)
        yield residual
        for rows in residual.split(512):
            yield model.logits(rows)


@pytest.mark.parametrize(("name", "level", "kv"), [  # each store with both, one of them native and one not
    (name, level, ("bf16", "int8")[(i + j) % 2])
    for i, name in enumerate(STORES) for j, level in enumerate([BEST, "off"])])
def test_the_same_bits(name: str, level: str, kv: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMIX_NATIVE", level)
    with Store.open(folder_of(base, name)) as store:
        pair = Pair(store, kv, slots=7)
        try:
            pair.agree(everything)
            pair.agree(reading)
        finally:
            pair.close()
        ahead = [found[6] for found in pair.seen[1] if found[1] == "decode"]
        assert {None if a is None else a.shape[1] for a in ahead} == {2, 1, None}
        wanted = [found[7] for found in pair.seen[1]]
        assert any(w is not None and len(w) == 1 for w in wanted)
        all_native = level != "off" and (name in ("int4", "int4 g32, dense int8", "int8"))
        assert (pair.runner.single_tokens == "native") == (all_native and level != "portable")


@pytest.mark.parametrize("activations", ["auto", "bf16"])
@pytest.mark.parametrize("level", [*native.levels(), "off"])
def test_at_every_level(level: str, activations: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMIX_NATIVE", level)
    with Store.open(folder_of(base, "int4")) as store:
        pair = Pair(store, "int8", activations=activations)
        try:
            pair.agree(everything)
        finally:
            pair.close()


def broken(read: Callable[[str], Any], name: str, found: Any) -> Callable[[str], Any]:
    return lambda asked: found if asked == name else read(asked)


def test_weights_that_do_not_fit_are_refused(base: Path) -> None:
    with Store.open(folder_of(base, "int4")) as store:
        model, read = store.model, store.dense

        asked: list[str] = []
        dense = assemble(model, torch.bfloat16, lambda name: (asked.append(name), read(name))[1])
        assert asked == [t.name for t in model.tensors()]
        assert {*dense.matrices, *dense.tensors} == set(asked)
        for name, found, message in (
                ("layers.1.attention.o", read("layers.1.attention.k"),
                 r"got int4 \[32, 64\], want a matrix \[64, 64\]"),
                ("layers.0.before_mlp", torch.zeros(3), r"got a tensor \[3\], want a tensor \[64\]"),
                ("layers.2.router.weight", read("head"), r"got int4 \[128, 64\], want a tensor \[4, 64\]"),
                ("head", torch.zeros(128, 64), r"got a tensor \[128, 64\], want a matrix")):
            with pytest.raises(StoreError, match=f"{name}: {message}"):
                assemble(model, torch.bfloat16, broken(read, name, found))

"""The eager runner beside today's Mixtral, bit for bit; several sessions, blocks and passes, drafts, errors, observers;
and the cache of a session: windows, trimming, snapshots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forward_models import IDS, eager, run
from torch import Tensor

from qmix.config import Cancel, Step
from qmix.errors import Interrupted, UsageError
from qmix.forward import passes, run_eager
from qmix.forward.kv_cache import SessionCache
from qmix.forward.kv_layers import FullLayer, WindowLayer
from qmix.forward.program import model_program
from qmix.forward.recurrent import RecurrentLayer
from qmix.kernels import ops
from qmix.kernels.kv_size import SLACK, reserved_bytes
from qmix.kernels.op import Op
from qmix.sizes import pass_tokens
from qmix.spec import Attention, DeltaNet, Expert, Layer, Mlp, Model, Moe, Norm, Norms, Rope, Router

NORM = Norm(1e-5)
ATTENTION = Attention(4, 2, 8, Rope(1000.0, 8))
WINDOW = 6
DELTA = DeltaNet(2, 4, 8, 8, 4, NORM)
MOE = Moe(Router(5, 2, over="all"), Expert(32))  # whole vectors at every instruction level
KINDS = {"full": [ATTENTION] * 3, "window": [replace(ATTENTION, window=WINDOW), ATTENTION] * 2,
         "delta": [DELTA, ATTENTION, replace(ATTENTION, window=WINDOW)]}


def spec_of(kind: str, moe: Moe | Mlp = MOE) -> Model:
    layers = tuple(Layer(mixer, moe, Norms(NORM, NORM)) for mixer in KINDS[kind])
    return Model("test", 32, 96, 512, layers, NORM, "float32")


def random_weights(spec: Model, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    tensors = [*spec.tensors(), *(t for key in spec.expert_keys for t in spec.expert_tensors(key))]
    return {t.name: torch.randn(t.shape, generator=random) * (2 * t.shape[-1] ** -0.5 if len(t.shape) > 1 else 0.5)
            + (t.role == "norm") for t in tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_that_decode_together_get_what_they_get_alone(kind: str) -> None:
    model = eager(spec_of(kind), random_weights(spec_of(kind)))
    alone, together = [], []
    caches = [model.new_cache(64) for _ in range(4)]
    for i, (length, token) in enumerate(((20, 5), (3, 6))):
        model.forward(IDS[:length], [caches[2 * i]], Step("prefill"))
        model.forward(IDS[:length], [caches[2 * i + 1]], Step("prefill"))
        alone.append(model.forward(torch.tensor([token]), [caches[2 * i]], Step("decode")))
    step = Step("decode", (7, 9))
    together = model.forward(torch.tensor([5, 6]), [caches[1], caches[3]], step)
    assert torch.equal(together, torch.cat(alone))
    assert [cache.length for cache in caches] == [21, 21, 4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_passes_change_nothing_but_rounding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(kind)
    weights = random_weights(spec)
    want = run(eager(spec, weights), IDS, 40)
    for module in (run_eager, passes):
        monkeypatch.setattr(module, "BLOCK", 8)
    monkeypatch.setattr(run_eager, "pass_tokens", lambda model: 16)
    model = eager(spec, weights)
    got = run(model, IDS, 40)
    assert want.std() > 0.5
    assert (got - want).norm() < 1e-4 * want.norm()  # a token too many or too few moves a logit by a tenth and more
    last = model.forward(IDS[:40], [model.new_cache(40)], Step("prefill"))
    assert (last[0] - want[39]).norm() < 1e-4 * want[39].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_scored_as_alone_and_taken_back(kind: str) -> None:
    """A token with drafts gets the bits that each gets alone; trimming takes the drafts back without a trace."""
    model = eager(spec_of(kind), random_weights(spec_of(kind)))
    cache = model.new_cache(64)
    model.forward(IDS[:30], [cache], Step("prefill"))
    before = cache.snapshot()
    one_by_one = torch.cat([model.forward(IDS[at:at + 1], [cache], Step("decode")) for at in range(30, 38)])
    cache.restore(before)
    drafts = model.forward(IDS[30:38], [cache], Step("decode"), all_logits=True)
    assert torch.equal(drafts, one_by_one)
    cache.trim(31)
    other = model.new_cache(64)
    model.forward(IDS[:30], [other], Step("prefill"))
    model.forward(IDS[30:31], [other], Step("decode"))
    assert torch.equal(*(model.forward(IDS[:5], [c], Step("decode"), all_logits=True) for c in (cache, other)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 40])
def test_a_pass_that_fails_leaves_the_session_as_it_was(kind: str, count: int) -> None:
    """In the last layer, when all others have written; the session had tokens already, and had none."""
    spec = spec_of(kind)
    broken: list[int] = []

    def fail(op: Op, inputs: tuple[Tensor, ...]) -> None:
        if broken and isinstance(op, ops.Experts) and op.layer == len(spec.layers) - 1:
            raise MemoryError

    model = eager(spec, random_weights(spec), seen=fail)
    for begin in (0, 25):
        caches = model.new_cache(80), model.new_cache(80)
        for cache in caches if begin else ():
            model.forward(IDS[:begin], [cache], Step("prefill"))
        broken.append(1)
        with pytest.raises(MemoryError):
            model.forward(IDS[:count], [caches[0]], Step("decode" if count < 8 else "prefill"))
        broken.clear()
        assert caches[0].length == begin
        found = [model.forward(IDS[10:14], [cache], Step("decode"), all_logits=True) for cache in caches]
        assert torch.equal(*found)


def test_a_cancelled_pass_and_a_full_cache() -> None:
    model = eager(spec_of("window"), random_weights(spec_of("window")))
    cache, cancel = model.new_cache(20), Cancel()
    cancel.set()
    with pytest.raises(Interrupted):
        model.forward(IDS[:9], [cache], Step("prefill", cancel=cancel))
    with pytest.raises(UsageError, match="0 \\+ 30 tokens do not fit a context of 20"):
        model.forward(IDS[:30], [cache], Step("prefill"))
    assert cache.length == 0


def test_an_observer_sees_every_op_and_what_it_reads() -> None:
    spec, seen = spec_of("delta"), []
    model = eager(spec, random_weights(spec),
                  seen=lambda op, inputs: seen.append((op, [tuple(x.shape) for x in inputs])))
    model.forward(IDS[:9], [model.new_cache(9)], Step("prefill"))
    assert [op for op, _ in seen] == [op for op in model_program(spec) if not isinstance(op, ops.Take | ops.Combine)]
    shapes = {(type(op), op.weight.name): shape for op, shape in seen if isinstance(op, ops.Linear)}
    assert shapes[ops.Linear, "layers.1.attention.o"] == [(9, 32)]
    assert [shape for op, shape in seen if isinstance(op, ops.Add)][-1] == [(1, 32), (1, 32)]  # one row is wanted
    last = [shape for op, shape in seen if isinstance(op, ops.Experts)]
    assert last == [[(9, 32), (9, 2)]] * 3


def test_a_window_takes_no_more_memory_than_itself() -> None:
    cache = SessionCache(spec_of("window"), 500, rings=True)
    assert [type(layer) for layer in cache.layers] == [WindowLayer, FullLayer] * 2
    row = 2 * 2 * 8 * 4  # keys and values of two heads of 8, fp32
    assert cache.nbytes == 2 * row * (WINDOW + SLACK) + 2 * row * 500
    short = SessionCache(spec_of("window"), WINDOW + SLACK, rings=True)
    assert [type(layer) for layer in short.layers] == [FullLayer] * 4
    delta = SessionCache(spec_of("delta"), 500).layers[0]
    assert isinstance(delta, RecurrentLayer)
    assert delta.nbytes == reserved_bytes(DELTA)


def test_a_layer_that_others_read_keeps_every_position() -> None:
    window = replace(ATTENTION, window=WINDOW)
    mixers = [window, window, replace(window, kv_source=0)]
    spec = Model("test", 32, 96, 512, tuple(Layer(m, MOE, Norms(NORM, NORM)) for m in mixers), NORM, "float32")
    assert [type(layer) for layer in SessionCache(spec, 500, rings=True).layers] == [FullLayer, WindowLayer, type(None)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_starts_over(kind: str) -> None:
    model = eager(spec_of(kind), random_weights(spec_of(kind)))
    cache = model.new_cache(64)
    first = run(model, IDS, 30, cache)
    cache.trim(0)
    assert torch.equal(run(model, IDS, 30, cache), first)


def test_a_snapshot_of_tokens_that_are_gone_is_refused() -> None:
    model = eager(spec_of("full"), random_weights(spec_of("full")))
    cache = model.new_cache(64)
    model.forward(IDS[:30], [cache], Step("prefill"))
    snapshot = cache.snapshot()
    model.forward(IDS[30:33], [cache], Step("decode"))
    cache.trim(31)
    cache.restore(snapshot)
    assert cache.length == 30
    cache.trim(12)
    with pytest.raises(ValueError, match="cut back below 30"):
        cache.restore(snapshot)
    for length in (-1, 13):
        with pytest.raises(ValueError, match="want 0 to 12"):
            cache.trim(length)


def test_a_window_or_a_state_that_is_gone_cannot_be_trimmed_to() -> None:
    places = {"window": [0, *range(30 - SLACK - 1, 31)], "delta": [0, 30]}
    for kind, want in places.items():
        model = eager(spec_of(kind), random_weights(spec_of(kind)))
        cache = model.new_cache(64)
        model.forward(IDS[:30], [cache], Step("prefill"))
        assert [length for length in range(31) if cache.can_trim(length)] == want
        with pytest.raises(ValueError, match="restore a snapshot"):
            cache.trim(9)


def test_tokens_of_a_pass_are_a_function_of_the_model() -> None:
    def model(hidden: int, chosen: int) -> Model:
        moe = Moe(Router(128, chosen, over="all"), Expert(64))
        return Model("test", hidden, 96, 512, (Layer(ATTENTION, moe, Norms(NORM, NORM)),), NORM)

    assert [pass_tokens(model(*sizes)) for sizes in ((4096, 2), (2048, 8), (4096, 8), (64, 1))] == [
        8192, 4096, 2048, 8192]

"""Gate and up of different types side by side: each keeps its bits and is computed in its own format, and a store of
such records is paged, planned and verified as any other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("gguf")
import bounds
import gguf_models as models
from architectures import random_model
from carried_files import WIDE, TypeOf, decoded, matrices, narrow, q4_k_m, write
from fast_interpreter import HAVE_TRITON
from model_configs import with_keys
from test_architectures import IDS, logits, paged
from test_carried_stores import Files, reread
from test_cli import qmix
from test_native import LEVELS, SUMS, TIES, needs_library, operand, relative, want
from test_native_carried import carried_matrix
from torch import Tensor

from qmix.config import QuantConfig
from qmix.device import StandIn
from qmix.device.cuda import open_cuda
from qmix.engine import Placement, load
from qmix.errors import ConfigError
from qmix.formats import Packed, unpack
from qmix.kernels.native import NativeProducts, Product
from qmix.kernels.table import select
from qmix.kernels.torch_ops import activate
from qmix.models import read_model
from qmix.offload.needs import Needs
from qmix.sizes import HALVES, MatrixSpec
from qmix.spec import Activation
from qmix.store import Store, manifest

PAIRS = [("q4_k", "q6_k"), ("q8_0", "iq4_xs"), ("q6_k", "q5_0")]
ACTIVATIONS = [Activation(), Activation("swiglu_clamped", 1.7, 7.0)]


def side_by_side(types: TypeOf, up: str, other: str) -> TypeOf:
    """`types`, but for the up of the layers 0 and 2, and for the gate of layer 1."""
    return lambda name: up if "ffn_up_exps" in name and "blk.1." not in name else \
        other if "ffn_gate_exps" in name and "blk.1." in name else types(name)


TYPES: dict[str, TypeOf] = {
    "mixtral": side_by_side(q4_k_m, "Q6_K", "Q8_0"),
    "gpt_oss": lambda name: "Q8_0" if "ffn_up_exps" in name else narrow(name)}  # all alike, or all fit
KINDS = {"mixtral": {"q4_k+q6_k", "q8_0+q4_k"}, "gpt_oss": {"q5_0+q8_0"}}


def beside(gate: str, up: str, inner: int, cols: int, activation: Activation = ACTIVATIONS[0],
           bias: bool = False) -> Packed:
    """Random."""
    spec = MatrixSpec(f"{gate}+{up}", 2 * inner, cols, parts=2, block=64, bias=bias, activation=activation)
    halves = [carried_matrix(kind, inner, cols, seed=i) for i, kind in enumerate((gate, up))]
    tensors = {f"{part}.{name}": t for part, m in zip(HALVES, halves, strict=True) for name, t in m.tensors.items()}
    if bias:
        tensors["bias"] = torch.randn(2 * inner, generator=torch.Generator().manual_seed(9))
    return Packed.of(spec, tensors)


@needs_library
@pytest.mark.parametrize(("level", "activations"), LEVELS)
class TestEveryLevel:
    @pytest.mark.parametrize("pair", PAIRS, ids=str)
    @pytest.mark.parametrize("how", ACTIVATIONS, ids=lambda how: how.kind)
    def test_gated_is_two_products_joined(self, level: str, activations: str, pair: tuple[str, str],
                                          how: Activation) -> None:
        """The bits of both alone, joined as those of one format are; in the places that are asked for."""
        m, kernels = beside(*pair, 100, 512, how, bias=how.kind != "swiglu"), NativeProducts(level, activations)
        x = operand(7, 512)
        alone = kernels.linear(x, *m.halves)
        for half, got in zip(m.halves, alone, strict=True):
            exact = want(x, Packed(half.spec.without_bias, half.tensors), activations)
            exact = exact + (half["bias"] if half.spec.bias else 0)
            assert relative(got, exact) < (TIES if activations == "int8" else SUMS)
        joined = activate(how, *alone)
        got = kernels.gated(x, m)
        assert relative(got, joined.double()) < bounds.chain(8, bounds.FP32)
        rows, places = torch.tensor([4, 0, 4]), torch.tensor([2, 0, 5])
        there = torch.full((6, 110), 7.0)
        kernels.run([Product(x, m, there[:, :100], rows, places, gated=True)])
        assert torch.equal(there[places, :100], got[rows])
        assert (there[:, 100:] == 7).all() and (there[[1, 3, 4]] == 7).all()

    def test_rows_do_not_depend_on_their_company(self, level: str, activations: str) -> None:
        """Nor on threads and jobs: some of one format are between."""
        m, plain = beside("q4_k", "q6_k", 130, 512), carried_matrix("q5_k", 2 * 130, 512, 2)
        kernels, x = NativeProducts(level, activations), operand(300, 512)
        whole, other = kernels.gated(x, m), kernels.gated(x, plain)
        kernels.threads = 3
        found = [torch.empty(300, 130) for _ in range(5)]
        kernels.run([Product(x, w, y, gated=True) for w, y in zip((m, plain, m, plain, m), found, strict=True)])
        assert all(torch.equal(y, whole) for y in found[::2]) and all(torch.equal(y, other) for y in found[1::2])
        for count in (1, 2, 3, 4, 5, 9, 25):
            for first in (0, 270):
                assert torch.equal(kernels.gated(x[first:first + count], m), whole[first:first + count])
        half = torch.empty(300, 130, dtype=torch.bfloat16)
        kernels.run([Product(x, m, half, gated=True)])
        assert torch.equal(half, whole.bfloat16())


def test_columns_may_be_padded_differently() -> None:
    """A store may say so, though no file has it: whole blocks of 256 columns beside some of 32."""
    spec = MatrixSpec("q4_k+q5_0", 2 * 64, 96, parts=2, block=64)
    zeros = Packed.of(spec, {t.name: torch.zeros(t.shape, dtype=torch.uint8) for t in spec.tensors})
    kernels = select({"q4_k", "q5_0"}, activations="auto")
    assert torch.equal(kernels.gated(operand(3, 96), zeros), torch.zeros(3, 64))
    assert torch.equal(unpack(zeros), torch.zeros(128, 96))


def test_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the native kernels give for activations that are rounded no more, and the biases."""
    monkeypatch.setenv("QMIX_NATIVE", "off")
    kernels, x = select({"q4_k", "q6_k"}, say=lambda line: None), operand(5, 512)
    for how in ACTIVATIONS:
        m = beside("q4_k", "q6_k", 100, 512, how, bias=True)
        exact = x.double() @ unpack(m).double().T + m["bias"]
        wanted = activate(how, *exact.float().chunk(2, 1))
        assert relative(kernels.gated(x, m), wanted.double()) < bounds.chain(2 * 512 + 16, bounds.FP32)  # both sums


@pytest.fixture(scope="module", params=list(TYPES))
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = random_model(with_keys(models.CONFIGS[kind], WIDE[kind]))
    path = write(folder / "m.gguf", kind, TYPES[kind], model)
    ran = qmix("quantize", path, folder / "store", "--threads", 1)
    assert ran.returncode == 0, ran.stderr
    return Files(kind, path, folder / "store", ran.stderr, reread(model, kind, TYPES[kind]))


@pytest.fixture(scope="module")
def resident(files: Files) -> Tensor:
    with load(files.store, threads=1, context=64) as engine:
        assert engine.plan.resident
        return logits(engine)


def test_both_keep_their_bits(files: Files) -> None:
    """As the package gguf decodes them; nothing is quantized again, and nothing differs from the file."""
    there = decoded(files.gguf)
    with Store.open(files.store) as store:
        assert store.verify(deep=True) == []
        assert {pair[0] for pair in store.quant.kinds} == KINDS[files.kind]
        found = matrices(store)
        assert found.keys() == there.keys()
        for name, m in found.items():
            assert torch.equal(unpack(m).view(torch.int32), there[name].view(torch.int32)), name
            assert len(m.halves) == (2 if "gate" in name[0] else 0)
        assert all(r.error["all"] == 0 for r in store.manifest.records.values())
        assert store.manifest.version == manifest.FORMAT_VERSION
    said = " ".join(files.said.split())
    assert all(kind in said for kind in KINDS[files.kind]) and "again" not in said
    shown = qmix("show", files.store)
    assert shown.returncode == 0 and all(kind in shown.stdout for kind in KINDS[files.kind])


@pytest.mark.parametrize("prefetch", ["off", "both"])
def test_paged_equals_resident(files: Files, resident: Tensor, prefetch: str) -> None:
    with paged(files.store, prefetch=prefetch) as engine:
        assert not engine.plan.resident
        assert torch.equal(logits(engine), resident)
        assert engine.stats()["offload"]["decode"]["misses"] > 0


def test_drafts_have_the_bits_of_single_tokens(files: Files, resident: Tensor) -> None:
    with load(files.store, threads=1, context=64) as engine:
        session = engine.session()
        session.prefill(IDS[:33])
        assert torch.equal(session.verify(IDS[33:39]), resident[1:7])


def test_plan_decides_as_quantize(files: Files) -> None:
    planned = qmix("plan", files.gguf, "--ram", "4G", "--device", "cpu", "--json")
    stored = qmix("plan", files.store, "--ram", "4G", "--device", "cpu", "--json")
    assert planned.returncode == stored.returncode == 0, planned.stderr + stored.stderr
    a, b = (json.loads(found.stdout)["memory"] for found in (planned, stored))
    assert a == b
    lines = [line for line in planned.stderr.splitlines() if line.startswith("experts: ")]
    assert lines and all(line in files.said for line in lines)


def test_a_device_that_the_cpu_stands_in_for(files: Files) -> None:
    with torch.inference_mode():
        exact = files.theirs(torch.tensor([IDS[:46]]), use_cache=False).logits[0][32:]
    with load(files.store, threads=1, context=64, activations="bf16", placement=Placement(StandIn())) as engine:
        there = logits(engine)
        layers = len(engine.store.model.layers)
    apart = bounds.chain(bounds.ACTIVATIONS_OF_A_LAYER * layers + 1, bounds.BF16)
    assert ((there - exact).norm(dim=1) / exact.norm(dim=1)).median() < apart


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
def test_tritons_kernels_one_expert_at_a_time() -> None:
    """Of both kinds of records that such a store has: fp32 as the reference, for one token and for some."""
    from qmix.kernels import cuda_ops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops, w2 = cuda_ops.TritonOps(), carried_matrix("q6_k", 256, 256, seed=3)
    for how in ACTIVATIONS:
        plain = carried_matrix("q4_k", 2 * 256, 256, 2)
        plain = Packed(replace(plain.spec, activation=how), plain.tensors)
        for w13 in (beside("q4_k", "q6_k", 256, 256, how, bias=how.kind != "swiglu"), plain):
            for tokens in (1, 3):
                x = operand(tokens, 256) / 2**14
                both = x.double() @ unpack(w13).double().T + (w13["bias"] if w13.spec.bias else 0)
                wanted = activate(how, *both.float().chunk(2, 1)).double() @ unpack(w2).double().T
                got = ops.expert(x.to(device), w13.to(device), w2.to(device)).cpu()
                assert relative(got, wanted) < bounds.chain(2 * 256 + 256 + 16, bounds.FP32)  # sums of both halves


@pytest.mark.models
@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
def test_tritons_kernels_in_the_engine(files: Files) -> None:
    """Under the interpreter, or on a GPU: the numbers of the CPU's kernels, for a prompt and two tokens at once."""
    # The interpreter gets bf16 products wrong.
    triton = open_cuda(0) if torch.cuda.is_available() else StandIn(half=torch.float16, triton=True)
    found = []
    for device in (StandIn(), triton):
        with load(files.store, threads=1, context=64, activations="bf16", placement=Placement(device)) as engine:
            assert engine.device is not None
            session = engine.session()
            session.prefill(IDS[:3])
            found.append(session.verify(IDS[3:5]).cpu())
    errors = (found[1] - found[0]).norm(dim=1) / found[0].norm(dim=1)
    assert errors.max() < bounds.model_apart(engine.model.num_layers)


def test_logits_are_those_of_transformers(files: Files) -> None:
    """Activations in bf16 are the only thing that is rounded otherwise."""
    with torch.inference_mode():
        exact = files.theirs(torch.tensor([IDS[:46]]), use_cache=False).logits[0][32:]
    with load(files.store, threads=1, context=64, activations="bf16") as engine:
        got = logits(engine)
        layers = len(engine.store.model.layers)
    apart = (got - exact).norm(dim=1) / exact.norm(dim=1)
    assert apart.median() < bounds.chain(bounds.ACTIVATIONS_OF_A_LAYER * layers + 1, bounds.BF16)


def test_native_and_torch_differ_by_their_roundings(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rounds activations to bf16, elsewhere."""
    found = []
    for native in ("", "off"):
        if native:
            monkeypatch.setenv("QMIX_NATIVE", native)
        with load(files.store, threads=1, context=64, activations="bf16", say=lambda line: None) as engine:
            found.append(logits(engine, count=4))
            layers = len(engine.store.model.layers)
    apart = (found[1] - found[0]).norm(dim=1) / found[0].norm(dim=1)
    assert apart.median() < bounds.model_apart(layers)


@pytest.mark.parametrize("kind", ["q4_k+q4_k", "q4_k+int4g64", "q4_k+q6_k+q6_k", "q4_k+", "+"])
def test_what_cannot_lie_side_by_side_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="kinds"):
        QuantConfig("mixed", "int8", "", 0, 0, kinds=((kind, "q4_k"),), mix=("0",))
    with pytest.raises(ConfigError, match="kinds"):  # w2 is one matrix
        QuantConfig("mixed", "int8", "", 0, 0, kinds=(("q4_k", "q4_k+q6_k"),), mix=("0",))


def test_the_plan_counts_two_products_of_a_chunk() -> None:
    """Their fp32 results beside the inner activations: 12 bytes a number where one product has 8."""
    model = read_model(with_keys(models.CONFIGS["mixtral"], {"hidden_size": 256, "intermediate_size": 8192}))
    one, two = (QuantConfig("mixed", kinds=((w13, "q6_k"),), mix=("0" * model.num_experts,) * len(model.layers),
                            method="", group_size=0, block=0) for w13 in ("q4_k", "q4_k+q6_k"))
    assert Needs.of(model, two, 512).workspace - Needs.of(model, one, 512).workspace == 512 * 8192 * 4

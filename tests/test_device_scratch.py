"""What a plan counts for a GPU's computing, beside the memory that the code asks for: on torch's meta device, which
holds nothing, with kernels that do nothing, so that models of any width pass. No part is taken from the count itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from types import MappingProxyType
from typing import Any

import pytest
import torch
from model_configs import ON_DEVICE, TINY
from test_cuda import needs_triton
from test_cuda_rooms import NoKernels
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qmix.config import QuantConfig
from qmix.device import StandIn
from qmix.formats import nf4
from qmix.formats.packed import TORCH_DTYPES, Packed
from qmix.forward.device_buffers import DeviceWeights, FewBuffers, Room, Shared
from qmix.forward.device_pieces import cut, decode_program
from qmix.forward.kv_cache import SessionCache
from qmix.forward.lower_device import lower
from qmix.forward.run_eager import Guesses
from qmix.forward.steps import RopeFrequencies
from qmix.forward.weights import DenseWeights, assemble
from qmix.kernels import cuda, cuda_delta, cuda_ops, cuda_prompt, cuda_router
from qmix.kernels.configs import Configs, Gemv
from qmix.kernels.device_ops import ExpertSlots
from qmix.kernels.device_scratch import Scratch, decoded_bytes, most_splits, split_of, splits_of
from qmix.kernels.op import FEW
from qmix.kernels.trials import MIXTRAL_8X7B
from qmix.kernels.tuning import candidates
from qmix.models import read_model
from qmix.offload.device_needs import FARTHEST, decode_bytes, scratch_of
from qmix.offload.host_rows import Upload
from qmix.offload.needs import Needs
from qmix.sizes import MIB, PLAIN_DTYPES, MatrixSpec, dense_spec, plain_format, record_layouts
from qmix.spec import Model
from qmix.spec import Tensor as Named

META = torch.device("meta")
MIXTRAL_8X22B = MappingProxyType({**MIXTRAL_8X7B, "vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384,
                                  "num_hidden_layers": 56, "num_attention_heads": 48})
DENSE_INT4 = QuantConfig(dense="int4")
ATTENTION = {"q": "q4_k", "k": "q8_0", "v": "q6_k", "o": "q5_k"}
Q4_K_M = QuantConfig(
    "mixed", "int8", "", 0, 0, kinds=(("q4_k", "q4_k"), ("q4_k", "q6_k")), mix=("1" * 8, *["0" * 8] * 3),
    dense_formats=(
        ("head", "q6_k"), *((f"layers.{i}.attention.{name}", ATTENTION[name]) for i in range(4) for name in ATTENTION)))
MODELS: list[tuple[str, Mapping[str, Any], QuantConfig]] = [
    *((kind, TINY[kind], QuantConfig()) for kind in ON_DEVICE),
    ("many taps", {**TINY["qwen3_next"], "linear_conv_kernel_dim": 64}, QuantConfig()),
    ("8x7b", {**MIXTRAL_8X7B, "num_hidden_layers": 4}, QuantConfig()),
    ("8x7b-q4_k_m", {**MIXTRAL_8X7B, "num_hidden_layers": 4}, Q4_K_M),
    ("8x22b-dense-int4", {**MIXTRAL_8X22B, "num_hidden_layers": 4}, DENSE_INT4)]


class MetaDevice(StandIn):
    """Tensors of the device are shapes; those of the host are real."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_device = META


class Allocations(TorchDispatchMode):
    """Bytes that live on one device of what was made since it began, and the most that did at once."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.peak = device, 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def live(self) -> int:
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(nbytes for _, nbytes in self._made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.device == self.device and t.untyped_storage()._cdata not in given:
                storage = t.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.live)
        return out


def packed(spec: MatrixSpec) -> Packed:
    return Packed.of(spec, {t.name: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype], device=META)
                            for t in spec.tensors})


def weights_of(model: Model, quant: QuantConfig) -> DenseWeights:
    def read(name: str) -> Packed | Tensor:
        named: Named = next(t for t in model.tensors() if t.name == name)
        spec = dense_spec(model, quant, named)
        dtype = TORCH_DTYPES[PLAIN_DTYPES[plain_format(model, named)]]
        return torch.empty(named.shape, dtype=dtype, device=META) if spec is None else packed(spec)

    return assemble(model, torch.bfloat16, read, META)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cuda, cuda_delta, cuda_ops, cuda_router):
        monkeypatch.setattr(module, "device_code", lambda name: NoKernels())
    monkeypatch.setattr(cuda, "_check_weights", lambda tensor, spec: None)
    # All of meta's addresses are 0, but the code tells tensors apart by them.
    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", lambda self: 64 * self._cdata)
    monkeypatch.setattr(Tensor, "data_ptr", lambda self: 64 * self.untyped_storage()._cdata +
                        self.storage_offset() * self.itemsize)


def decode_all(model: Model, quant: QuantConfig, device: MetaDevice, ops: cuda_ops.TritonOps, weights: DenseWeights,
               cache: SessionCache, slabs: Sequence[ExpertSlots]) -> list[object]:
    """Passes of 1 to FEW tokens, with guesses, experts in slots and rows from the CPU; what has to be held."""
    by_name = DeviceWeights(weights)
    lowered = [lower(piece) for piece in cut([op for _, op in decode_program(model, Guesses(FARTHEST, model.top_k))])]
    shared, held = Shared(device, model.vocab), list[object]()
    frequencies = RopeFrequencies(model, META, {})
    table = torch.zeros(len(model.record_layers), model.num_experts, dtype=torch.int32, device=META)
    for tokens in range(1, FEW + 1):
        few = FewBuffers(model, shared, tokens, FARTHEST, model.top_k)
        few.caches = [cache] * tokens
        room = Room(model, ops, by_name, few, frequencies, few.caches)
        for piece in lowered:
            for bind in piece:
                bind(room)()
            for slots in slabs:
                ops.experts(few.routed.x, slots, few.routed.ids, table[0], few.routed.rows)
        held += [few, room, Upload(device, few.routed)]
    return [*held, shared, by_name, table]


@needs_triton
@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("raw", "quant"), [case[1:] for case in MODELS], ids=[case[0] for case in MODELS])
def test_decoding_takes_what_is_counted(raw: Mapping[str, Any], quant: QuantConfig) -> None:
    model, context = read_model(raw), 8192 if raw.get("vocab_size", 0) >= 32000 else 200
    ops = cuda_ops.TritonOps(Configs(), scratch_of(model, quant, context, Gemv()))
    weights, cache = weights_of(model, quant), SessionCache(model, context, torch.bfloat16, device=META,
                                                       placed=True)
    slabs = [ExpertSlots(torch.empty(3, layout.nbytes, dtype=torch.uint8, device=META), layout, ())
             for layout in record_layouts(model, quant)]
    with closing(MetaDevice()) as device, Allocations(META) as made:
        held = decode_all(model, quant, device, ops, weights, cache, slabs)
        taken = made.live
    counted = scratch_of(model, quant, context, Gemv())
    assert all(len(rooms) == 1 for rooms in ops._rooms.values()), "a buffer that a larger one replaced is kept"
    assert {use: rooms[0].nbytes for (use, _, _), rooms in ops._rooms.items()} == {
        use: 4 * numbers for use in Scratch.__slots__ if (numbers := getattr(counted, use))}
    assert held and taken - counted.nbytes <= decode_bytes(model, quant) <= 1.5 * (taken - counted.nbytes)


SPECS = {"int4": MatrixSpec("int4", 28672, 4096, 2, 64, 64), "mxfp4": MatrixSpec("mxfp4", 28672, 4096, 2, 32, 64),
         "q6_k": MatrixSpec("q6_k", 28672, 4096, 2, 16, 64), "q5_1": MatrixSpec("q5_1", 28672, 2880, 2, 32, 64),
         "int8": MatrixSpec("int8", 32000, 4096), "narrow int8": MatrixSpec("int8", 30000, 520),
         "bf16": MatrixSpec("bf16", 32000, 4096), "nf4": MatrixSpec("nf4", 28672, 4096, 2),
         "nf4 twice": MatrixSpec("nf4", 28672, 4096, 2, double_quant=True)}


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("tokens", [12, 512])
@pytest.mark.parametrize("name", list(SPECS))
def test_a_prompts_product_takes_what_is_counted(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that decodes all formats computes in fp16. What int8 scales after its product in bf16 is counted too."""
    monkeypatch.setattr(cuda_prompt, "capability", lambda device: (7, 5))
    # bitsandbytes keeps its table where the first tensor lies that needs it: for other tests, meta's has no numbers.
    monkeypatch.setattr(nf4.functional(), "name2qmap", {})
    spec, x = SPECS[name], torch.empty(tokens, SPECS[name].cols, dtype=torch.float16, device=META)
    peaks = []
    for dtype in (torch.float16,) if spec.in_blocks else (torch.float16, torch.bfloat16):
        x, m = x.to(dtype), packed(spec)
        with Allocations(META) as made:
            y = cuda_prompt.linear_many(x, m)
        peaks.append(made.peak - y.nbytes)
    assert max(peaks) <= decoded_bytes(spec, 2, tokens) <= 1.1 * max(peaks)


@pytest.mark.parametrize(("spec", "raw"), [(SPECS["int4"], MIXTRAL_8X7B)])
def test_splits_of_all_configurations(spec: MatrixSpec, raw: Mapping[str, Any]) -> None:
    """Fewer threads make more pieces: the plan counts those of the configuration that was measured."""
    model, needs = read_model(raw), Needs.of(read_model(raw), QuantConfig(), 8192)
    for gemv in candidates("gemv"):
        assert isinstance(gemv, Gemv)
        ours = needs.with_kernels(model, QuantConfig(), gemv).scratch - needs.scratch
        assert ours == 8 * FEW * 28672 * 4 * (splits_of(spec, gemv) - splits_of(spec, Gemv()))


def test_what_mixtral_takes() -> None:
    """Less than the 128 MiB that were set aside for every model; 8x22B takes more. 45 MiB are for decoding 8x7B."""
    small, large = (Needs.of(read_model(raw), DENSE_INT4, 8192).scratch for raw in (MIXTRAL_8X7B, MIXTRAL_8X22B))
    assert 120 * MIB < small < 128 * MIB < 139 * MIB < large < 160 * MIB
    assert 45 * MIB < scratch_of(read_model(MIXTRAL_8X7B), QuantConfig(), 8192, Gemv()).nbytes < 46 * MIB


def test_most_splits() -> None:
    assert all(most_splits(n) == max(split_of(m)[1] for m in range(1, n + 1)) for n in (1, 64, 65, 8192, 8193, 20000))

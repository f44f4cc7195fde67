"""What llama.cpp's converter did to Qwen3-Next, Qwen3.5 and Gemma 4, and how it is undone; frequencies in a tensor.
That the stores are those of the same weights in safetensors shows tests/test_gguf_checkpoint.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")

import gguf
import gguf_models as models
from gguf_late_models import tiled
from test_gguf_checkpoint import changed, compare, model_of

from qmix import sources
from qmix.checkpoint import Checkpoint
from qmix.errors import CheckpointError, ConfigError
from qmix.gguf.header import open_header
from qmix.gguf.model import gguf_config
from qmix.kernels.rope import inv_freq
from qmix.models.source import ColumnsPerHead, LogOfNegative, PerHead, Source
from qmix.spec import Llama3, LongRope

THETA, POSITIONS, DIM = 10000.0, 512, 16  # of the tiny Mixtral


def write(path: Path, kind: str, type_name: str = "F32", **how: Any) -> Path:
    return models.write(path / "m.gguf", model_of(kind, torch.float32), kind, lambda name: type_name, **how)


def test_experts_and_q_k_v_z_as_first_files_had_them(tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    compare(tmp_path / "next", "qwen3_next", "F32", experts="legacy").close()
    (tmp_path / "moe").mkdir()
    compare(tmp_path / "moe", "qwen3_5_moe", "F32", experts="joined").close()


def test_columns_that_move_in_whole_blocks_are_carried(tmp_path: Path) -> None:
    """A head of values is one block of Q8_0 wide: the output projection keeps its blocks, in another order."""
    path = write(tmp_path, "qwen3_5_moe", "Q8_0")
    there = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ssm_out.weight")
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.carriable("layers.0.delta.o") == "q8_0"
        numbers = checkpoint.blocks("layers.0.delta.o").numbers(torch.float32)
        config = checkpoint.raw_config
    exact = torch.from_numpy(gguf.dequantize(there.data, there.tensor_type).copy())
    assert torch.equal(tiled(numbers, Named(config), 32, dim=1), exact)
    narrow = Source("x", (ColumnsPerHead(2, (32, 32)),))
    assert sources.keeps_blocks(narrow, 32) and not sources.keeps_blocks(narrow, 256)


class Named:
    """Keys of a config.json as attributes."""

    def __init__(self, raw: Any):
        self.__dict__.update(raw)


def test_the_exponential_is_undone() -> None:
    """Of what bfloat16 has exactly; of other numbers as far as the exponential in fp32 tells them apart, 2 ulps of it:
    2^-22, beside half an ulp of the logarithm."""
    short = torch.cat((torch.linspace(-8, 3, 500), torch.tensor([0.0, 2.0**-9, -(2.0**-12)]))).bfloat16().float()
    assert torch.equal(sources.apply(-torch.exp(short), (LogOfNegative(),)), short)
    some = torch.linspace(-8, 3, 997)
    found = sources.apply(-torch.exp(some), (LogOfNegative(),))
    assert ((found - some).abs() <= 2.0**-22 + 2.0**-8 * 2.0**-14 + some.abs() * 2.0**-24).all()


def test_rows_before_the_heads_stay() -> None:
    rows = torch.arange(8)[:, None]
    assert sources.apply(rows, (PerHead(2, (1, 2), before=2),)).flatten().tolist() == [0, 1, 2, 5, 3, 4, 6, 7]
    assert sources.apply(rows.T, (ColumnsPerHead(2, (2, 2)),)).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_a_prediction_head_of_qwen_is_skipped(tmp_path: Path) -> None:
    """Its layer lies behind the last one, and block_count includes it."""
    layers = model_of("qwen3_5_moe", torch.float32).config.num_hidden_layers

    def keys(writer: Any) -> None:
        changed("qwen35moe.block_count", layers + 1)(writer)
        writer.add_nextn_predict_layers(1)

    path = write(tmp_path, "qwen3_5_moe", keys=keys, **{f"blk__{layers}__nextn__eh_proj__weight": torch.ones(64, 128)})
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.skipped == (f"blk.{layers}.nextn.eh_proj.weight",)
        assert checkpoint.model.num_layers == layers and checkpoint.model.mtp == 1 and not checkpoint.has_mtp_head


def llama3(factor: float, original: int = 8192) -> torch.Tensor:
    """The factors that the converter writes for Llama 3 (the published formula, for high 4 and low 1)."""
    inv = THETA ** (-torch.arange(0, DIM, 2).double() / DIM)
    wave = 2 * torch.pi / inv
    smooth = (original / wave - 1) / 3
    between = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(wave < original / 4, 1.0, torch.where(wave > original, factor, between)).float()


@pytest.mark.parametrize("factors, want", [
    (llama3(8.0), Llama3(8.0, 1.0, 4.0, 8192)),
    (llama3(32.0), Llama3(32.0, 1.0, 4.0, 8192)), (torch.ones(8), None),
    (llama3(8.0, original=512), LongRope(POSITIONS, tuple(llama3(8.0, 512).tolist()), tuple(llama3(8.0, 512).tolist()),
                                         1.0))])
def test_frequencies_in_a_tensor(tmp_path: Path, factors: torch.Tensor, want: object) -> None:
    with Checkpoint.open(write(tmp_path, "mixtral", rope_freqs__weight=factors)) as checkpoint:
        rope = checkpoint.model.layers[0].mixer.rope  # type: ignore[union-attr]
        assert rope.scaling == want and rope.dim == DIM and not checkpoint.notes


def test_frequencies_are_those_of_the_factors(tmp_path: Path) -> None:
    """As llama.cpp divides: an angle by its factor, at every position."""
    factors = llama3(8.0, original=512)
    with Checkpoint.open(write(tmp_path, "mixtral", rope_freqs__weight=factors)) as checkpoint:
        rope = checkpoint.model.layers[0].mixer.rope  # type: ignore[union-attr]
        found, scale = inv_freq(rope, 512, 512)
    exact = THETA ** (-torch.arange(0, DIM, 2).double() / DIM) / factors.double()
    assert scale == 1.0 and ((found.double() / exact - 1).abs() < 4 * 2.0**-24).all()


WINDOWS = "gemma4.attention.sliding_window_pattern"


@pytest.mark.parametrize("kind, how, said", [
    ("mixtral", {"rope_freqs__weight": torch.zeros(8)}, "llama.rope_freqs.weight: got 0.0, want numbers > 0"),
    ("mixtral", {"rope_freqs__weight": torch.tensor([1.0] * 7 + [1e-40])},
     "llama.rope_freqs.weight: got 9.99994610111476e-41, want numbers from 9.53674e-07 to 1.09951e+12"),
    ("mixtral", {"rope_freqs__weight": torch.tensor([1.0] * 7 + [1e30])}, "llama.rope_freqs.weight: got 1.0000000150"),
    ("gemma4", {"rope_freqs__weight": torch.tensor([1.0] * 4 + [3e38] * 12)}, "gemma4.rope_freqs.weight: got 3"),
    ("mixtral", {"rope_freqs__weight": torch.ones(8), "keys": lambda w: (
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), w.add_rope_scaling_factor(2.0))},
     "llama.rope_freqs.weight: got (1.0"),
    ("gemma4", {"left_out": ("rope_freqs.weight",)}, "gemma4.rope_freqs.weight: missing"),
    ("gemma4", {"keys": changed("gemma4.embedding_length_per_layer_input", 256)}, "reads no per-layer embeddings yet"),
    ("gemma4", {"keys": changed("gemma4.rope.dimension_count", 16)}, "gemma4.rope.dimension_count: got 16, want"),
    ("gemma4", {"keys": changed("gemma4.attention.key_length_swa", 8)}, "attention.value_length_swa: got 16, want"),
    ("gemma4", {"keys": lambda w: w.kv_data[0].pop(WINDOWS)}, f"{WINDOWS}: missing"),
    ("qwen3_5_moe", {"keys": changed("qwen35moe.ssm.inner_size", 129)}, "ssm.inner_size: got 129, want a multiple of"),
    ("qwen3_5_moe", {"keys": changed("qwen35moe.ssm.group_count", 3)}, "linear_num_value_heads: got 4, want"),
    ("qwen3_5_moe", {"keys": changed("qwen35moe.ssm.group_count", 4)}, "blk.0.attn_qkv.weight: "),
    ("qwen3_next", {"left_out": ("blk.1.ssm_a",)}, "blk.1.ssm_a: missing"),
])
def test_refused_by_name(tmp_path: Path, kind: str, how: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(write(tmp_path, kind, **how))
    assert said in caught.value.message and "m.gguf: " in caught.value.message and caught.value.exit_code == 4
    assert "\n" not in caught.value.message and caught.value.cure


@pytest.mark.parametrize("kind, key, value, said", [
    ("gemma4", "gemma4.feed_forward_length", (), "got 0, want one number, or block_count = "),
    ("gemma4", "gemma4.feed_forward_length", (64,) * 99, "got 99, want one number"),
    ("gemma4", "gemma4.feed_forward_length", (64, 128), "got 2, want one number"),
    ("gemma4", "gemma4.attention.head_count_kv", (), "got 0, want one number"),
    ("gemma4", WINDOWS, (), r"got \(\), want block_count = "),
    ("qwen3_5_moe", "qwen35moe.attention.head_count_kv", (2,), "got 1, want one number"),
    ("qwen3_5_moe", "qwen35moe.attention.recurrent_layers", (), r"got \(\), want block_count = "),
])
def test_lists_have_a_number_for_each_layer(tmp_path: Path, kind: str, key: str, value: tuple[int, ...], said: str
                                            ) -> None:
    path = write(tmp_path, kind)
    header, shapes = open_header(path), {t.name: tuple(t.shape[::-1]) for t in gguf.GGUFReader(path).tensors}
    freqs = (1.0,) * 4 + (1e30,) * 12 if "rope_freqs.weight" in shapes else None
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: {said}"):
        gguf_config({**header.metadata, key: value}, shapes, freqs)

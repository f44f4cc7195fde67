"""Broken and hostile checkpoints of quantized weights: refused by the tensor at fault, with the cure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowbit_checkpoints import write_lowbit
from test_checkpoint import refused
from test_cli import qmix
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.errors import CheckpointError
from qmix.spec import ExpertKey

W1 = "model.layers.0.block_sparse_moe.experts.0.w1"
Q = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def put(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    """A change of one tensor."""
    return lambda tensors, raw: tensors.update({name: value(tensors[name]).contiguous()})


def filled(value: float, at: int = 0) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[at] = value
        return t
    return change


@pytest.mark.parametrize(("case", "change", "words"), [
    ("fp8-blocks", lambda t, r: t.pop(f"{W1}.weight_scale_inv"), (f"{W1}.weight_scale_inv: missing, the scales of",)),
    ("fp8-blocks", put(f"{W1}.weight_scale_inv", lambda t: t.T), (f"{W1}.weight", "want [6, 3]", "FP8")),
    ("fp8-blocks", put(f"{W1}.weight_scale_inv", lambda t: t.view(-1)), (f"{W1}.weight", "want [6, 3]")),
    ("fp8-blocks", put(f"{W1}.weight_scale_inv", lambda t: t.int()), ("weight_scale_inv: got dtype I32", "want F16")),
    ("fp8-blocks", put(f"{W1}.weight", lambda t: t[:-1]), (f"{W1}.weight", "95")),
    ("fp8-blocks", put(f"{W1}.weight", lambda t: t.view(-1)), (f"{W1}.weight", "want a matrix")),
    ("fp8-blocks", put(f"{W1}.weight", lambda t: t[:0]), (f"{W1}.weight",)),
    ("fp8-blocks", lambda t, r: r["quantization_config"].update(modules_to_not_convert=["self_attn.q_proj"]),
     (f"{Q}.weight: is quantized, but", "'self_attn.q_proj'")),
    ("fp8-blocks", lambda t, r: r["quantization_config"].update(weight_block_size=[128, 128]),
     ("want [1, 1]",)),
    ("fp8-blocks", lambda t, r: r.pop("quantization_config"), ("got dtype F8_E4M3", "quantized already")),
    ("awq", lambda t, r: t.pop(f"{Q}.qzeros"), (f"{Q}.qzeros: missing, the zeros of {Q}.qweight",)),
    ("awq", lambda t, r: t.pop(f"{Q}.qweight"), (f"{Q}.weight: missing",)),
    ("awq", lambda t, r: t.update({f"{Q}.weight": torch.zeros(64, 64)}), (f"{Q}.weight: is there beside",)),
    ("awq", lambda t, r: r["quantization_config"].update(group_size=64), ("want scales [1, 96]",)),
    ("awq", lambda t, r: r["quantization_config"].update(group_size=48), ("64 rows, want a multiple of",)),
    ("awq", put(f"{Q}.qweight", lambda t: t.short()), (f"{Q}.weight: missing",)),
    ("gptq-desc-act", lambda t, r: t.pop(f"{Q}.g_idx"), (f"{Q}.g_idx: missing, the order",)),
    ("gptq-desc-act", put(f"{Q}.g_idx", lambda t: t[1:]), (f"{Q}.qweight", "want g_idx [64]")),
    ("gptq", lambda t, r: r["quantization_config"].update(bits=8), ("want",)),
    ("gptq", lambda t, r: t.update({f"{Q}.zeros": torch.zeros(3)}), (f"{Q}.zeros: not a tensor of this model",)),
    ("pack4", put(f"{Q}.weight_shape", lambda t: torch.tensor([64, 2**40])), (f"{Q}.weight_packed", "int32")),
    ("pack4", put(f"{Q}.weight_shape", lambda t: torch.tensor([-64, -64])), (f"{Q}.weight_packed", "want -64 rows")),
    ("pack4", put(f"{Q}.weight_shape", lambda t: torch.tensor([64])), ("weight_shape: got shape [1], want [2]",)),
    ("pack4", put(f"{Q}.weight_shape", lambda t: torch.tensor([64, 57])), (f"{Q}.weight", "want [64, 64]")),
    ("pack4", lambda t, r: t.pop(f"{Q}.weight_shape"), (f"{Q}.weight_shape: missing",)),
    ("pack4", lambda t, r: r["quantization_config"]["ignore"].append("re:.*w1$"),
     (f"{W1}.weight_packed: is quantized,",)),
    ("nvfp4", put(f"{Q}.weight_global_scale", lambda t: t.repeat(2)), ("want one global scale",)),
    ("nvfp4", put(f"{Q}.weight_scale", lambda t: t.float()), ("weight_scale: got dtype F32, want F8_E4M3",)),
    ("mxfp4", put(f"{Q}.weight_packed", lambda t: t[:, :-8]), (f"{Q}.weight_packed", "a multiple of 32")),
])
def test_what_does_not_fit_together_is_refused_at_once(case: str, change: Change, words: tuple[str, ...],
                                                       tmp_path: Path) -> None:
    write_lowbit(tmp_path / "c", "mixtral", case, change=change)
    refused(tmp_path / "c", *words)


@pytest.mark.parametrize(("case", "change", "words"), [
    ("fp8-blocks", put(f"{W1}.weight_scale_inv", filled(float("nan"))), f"{W1}.weight_scale_inv: holds a scale"),
    ("awq", put(f"{W1}.scales", filled(float("inf"), 5)), f"{W1}.scales: holds a scale"),
    ("nvfp4", put(f"{W1}.weight_scale", filled(float("nan"))), f"{W1}.weight_scale: holds a scale"),
    ("nvfp4", put(f"{W1}.weight_global_scale", filled(0.0)), f"{W1}.weight_global_scale: is 0"),
    ("nvfp4", put(f"{W1}.weight_global_scale", filled(float("inf"))), f"{W1}.weight_global_scale: holds a scale"),
    ("mxfp4", put(f"{W1}.weight_scale", filled(255)), f"{W1}.weight_scale: holds a scale"),
    ("mxfp8", put(f"{W1}.weight_scale", filled(255)), f"{W1}.weight_scale: holds a scale"),
    ("gptq-desc-act", put(f"{W1}.g_idx", filled(2)), f"{W1}.g_idx: holds 0 to 2, want numbers of 2 groups"),
    ("gptq-desc-act", put(f"{W1}.g_idx", filled(-1)), f"{W1}.g_idx: holds -1"),
    ("pack4-zeros", lambda t, r: t.update({f"{W1}.weight_zero_point": torch.full((96, 2), 8, dtype=torch.int8)}),
     f"{W1}.weight_zero_point: holds 8 to 8, want zero points of 4 bits, -8 to 7"),
    ("pack4-zeros", lambda t, r: t.update({f"{W1}.weight_zero_point": torch.full((96, 2), -9, dtype=torch.int8)}),
     f"{W1}.weight_zero_point: holds -9 to -9, want"),
    ("pack4-actorder", put(f"{W1}.weight_g_idx", filled(2**31 - 1)), f"{W1}.weight_g_idx: holds 0 to 2147483647")])
def test_numbers_that_no_weight_has_are_refused_when_they_are_read(case: str, change: Change, words: str,
                                                                   tmp_path: Path) -> None:
    write_lowbit(tmp_path / "c", "mixtral", case, change=change)
    with Checkpoint.open(tmp_path / "c") as checkpoint, pytest.raises(CheckpointError) as caught:
        checkpoint.expert(ExpertKey(0, 0))
    assert words in caught.value.message and caught.value.cure


def test_codes_that_are_no_number_are_refused_by_the_command(tmp_path: Path) -> None:
    """FP8 has a NaN of its own."""
    def change(tensors: dict[str, Tensor], raw: dict[str, Any]) -> None:
        tensors[f"{W1}.weight"].view(torch.uint8)[3, 5] = 0x7F

    write_lowbit(tmp_path / "c", "mixtral", "fp8-matrix", change=change)
    done = qmix("quantize", tmp_path / "c", tmp_path / "out", "-t", 1)
    assert done.returncode == 4 and f"{W1}.weight[3, 5] is nan" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_config_that_outlived_its_codes_is_noted(tmp_path: Path) -> None:
    """Weights that somebody decoded, with the old quantization_config: the files are what counts."""
    def change(tensors: dict[str, Tensor], raw: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            del tensors[name]
            name = name.removesuffix("_scale_inv")
            tensors[name] = tensors[name].float()

    write_lowbit(tmp_path / "c", "mixtral", "fp8-blocks", change=change)
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        (note,) = checkpoint.notes
        assert "but the files have all weights in float32: read so" in note and not checkpoint.lowbit


def test_scales_of_activations_are_skipped_by_name(tmp_path: Path) -> None:
    names = (f"{Q}.input_scale", "model.layers.0.self_attn.k_proj.k_scale", f"{W1}.activation_scale",
             "model.layers.0.self_attn.kv_scale", "model.layers.0.self_attn.prob_scale")
    write_lowbit(tmp_path / "c", "mixtral", "fp8-matrix",
                 change=lambda tensors, raw: tensors.update({name: torch.ones(()) for name in names}))
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        assert sorted(checkpoint.skipped) == sorted(names)


def test_biases_of_zeros_are_skipped_by_name(tmp_path: Path) -> None:
    """AutoGPTQ gives every module that it quantizes a bias."""
    def change(tensors: dict[str, Tensor], raw: dict[str, Any]) -> None:
        tensors.update({f"{name}.bias": torch.zeros(tensors[f"{name}.scales"].shape[1], dtype=torch.float16)
                        for name in (Q, W1)})

    write_lowbit(tmp_path / "c", "mixtral", "gptq", change=change)
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        assert sorted(checkpoint.skipped) == sorted((f"{Q}.bias", f"{W1}.bias"))


@pytest.mark.parametrize("value", [2.0**-24, float("nan")])
def test_a_bias_that_the_model_has_not_is_refused(value: float, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], raw: dict[str, Any]) -> None:
        tensors[f"{W1}.bias"] = filled(value, 5)(torch.zeros(96, dtype=torch.float16))

    write_lowbit(tmp_path / "c", "mixtral", "gptq", change=change)
    refused(tmp_path / "c", f"{W1}.bias", "has no bias", "not all zeros")


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    """hf_quant_config.json, as NVIDIA's older checkpoints have it."""
    def change(tensors: dict[str, Tensor], raw: dict[str, Any]) -> None:
        del raw["quantization_config"]

    path = tmp_path / "c"
    decoded = write_lowbit(path, "mixtral", "nvfp4-modelopt", change=change)
    (path / "hf_quant_config.json").write_text(
        '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", '
        '"group_size": 16, "exclude_modules": ["lm_head"]}}')
    with Checkpoint.open(path) as checkpoint:
        assert torch.equal(checkpoint.dense("layers.0.attention.q"), decoded[f"{Q}.weight"])
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "INT4_AWQ"}}')
    refused(path, "hf_quant_config.json", "quant_algo: got 'INT4_AWQ'")

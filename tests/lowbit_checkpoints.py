"""Checkpoints whose weights are quantized already, packed here by independent code: each number by number, in Python
integers and float64 (numpy), from the public descriptions of the layouts. What they decode to is computed beside them.

`PACKERS[name](w, random)` gives the tensors of a matrix [N, K], by the ending of their names, and its numbers in
float64; CONFIGS[name] the quantization_config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from architectures import FIRST, random_model, write
from model_configs import with_keys
from safetensors.torch import load_file, save_file
from tokenizer_files import DEMO_TEMPLATE, spm_model
from torch import Tensor

Packed = tuple[dict[str, Tensor], np.ndarray]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M1 = np.array([*E2M1, *(-x for x in E2M1)], np.float64)


def to_int32(words: np.ndarray) -> Tensor:
    """Of unsigned words in int64."""
    return torch.from_numpy(np.where(words >= 2**31, words - 2**32, words).astype(np.int32))


def pack_words(codes: np.ndarray, bits: int) -> Tensor:
    """compressed-tensors: along the last dimension, 32 // bits codes a word, the first in the lowest bits."""
    each = 32 // bits
    rows, k = codes.shape
    words = np.zeros((rows, -(-k // each)), np.int64)
    for j in range(k):
        words[:, j // each] |= codes[:, j].astype(np.int64) << bits * (j % each)
    return to_int32(words)


def pack_stream(codes: np.ndarray, bits: int) -> Tensor:
    """GPTQ: along the first dimension, bit by bit."""
    k, columns = codes.shape
    words = np.zeros((-(-k * bits // 32), columns), np.int64)
    for i in range(k):
        for bit in range(bits):
            place = i * bits + bit
            words[place // 32] |= (codes[i].astype(np.int64) >> bit & 1) << place % 32
    return to_int32(words)


def pack_awq(codes: np.ndarray) -> Tensor:
    """AutoAWQ: the nibble at 4 i of word c has column 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.int64)
    for c in range(columns // 8):
        for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, c] |= codes[:, 8 * c + place].astype(np.int64) << 4 * i
    return to_int32(words)


def scales_for(w: Tensor, shape: tuple[int, ...], random: torch.Generator, dtype: torch.dtype, steps: float) -> Tensor:
    """About w's size over `steps`, none alike."""
    size = w.float().std().item() * 3 / steps
    return (size * (0.5 + torch.rand(shape, generator=random))).to(dtype)


def float64(t: Tensor) -> np.ndarray:
    return t.double().numpy()


def grouped(scales: np.ndarray, group: int, k: int) -> np.ndarray:
    """[N, G] -> [N, K]."""
    return scales[:, np.arange(k) // (group or k)]


def fp8(block: tuple[int, int], ending: str = "_scale_inv",
        dtype: torch.dtype = torch.float32) -> Callable[..., Packed]:
    """block: rows and columns of a scale, 0 = all."""
    def packer(w: Tensor, random: torch.Generator) -> Packed:
        n, k = w.shape
        rows, cols = block[0] or n, block[1] or k
        scales = scales_for(w, (-(-n // rows), -(-k // cols)), random, dtype, 448)
        whole = float64(scales)[np.arange(n) // rows][:, np.arange(k) // cols]
        codes = torch.from_numpy(float64(w) / whole).float().clamp(-448, 448).to(torch.float8_e4m3fn)
        shape = () if block == (0, 0) else tuple(scales.shape)
        return {"": codes, ending: scales.view(shape)}, (float64(codes.float()) * whole).astype(np.float32)
    return packer


def int8(block: tuple[int, int], zeros: bool = False) -> Callable[..., Packed]:
    def packer(w: Tensor, random: torch.Generator) -> Packed:
        n, k = w.shape
        rows, cols = block[0] or n, block[1] or k
        scales = scales_for(w, (-(-n // rows), -(-k // cols)), random, torch.bfloat16, 127)
        found, spread = {"_scale": scales}, np.zeros((n, k))
        if zeros:
            found["_zero_point"] = torch.randint(-20, 20, scales.shape, generator=random).to(torch.int8)
            spread = float64(found["_zero_point"])[np.arange(n) // rows][:, np.arange(k) // cols]
        whole = float64(scales)[np.arange(n) // rows][:, np.arange(k) // cols]
        codes = np.clip(np.rint(float64(w) / whole + spread), -128, 127)
        return {"": torch.from_numpy(codes.astype(np.int8)), **found}, (codes - spread) * whole
    return packer


def pack_quantized(bits: int, group: int, zeros: bool = False, actorder: bool = False,
                   dtype: torch.dtype = torch.bfloat16, stream: bool = True, moved: int = 0) -> Callable[..., Packed]:
    """moved: columns by which the groups are, all together."""
    def pack(codes: np.ndarray) -> Tensor:
        return pack_stream(codes.T, bits).T.contiguous() if stream else pack_words(codes, bits)

    def packer(w: Tensor, random: torch.Generator) -> Packed:
        n, k = w.shape
        groups, middle = -(-k // (group or k)), 2 ** (bits - 1)
        scales = scales_for(w, (n, groups), random, dtype, middle)
        order = np.arange(k) // (group or k)
        found = {".weight_scale": scales, ".weight_shape": torch.tensor([n, k])}
        if actorder or moved:
            order = np.roll(order, moved) if moved else order[torch.randperm(k, generator=random).numpy()]
            found[".weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
        spread = np.zeros((n, k))
        if zeros:
            zero = torch.randint(-middle, middle, (n, groups), generator=random).numpy()
            found[".weight_zero_point"] = pack((zero + middle).T).T.contiguous()
            spread = zero[:, order].astype(np.float64)
        whole = float64(scales)[:, order]
        codes = np.clip(np.rint(float64(w) / whole + spread), -middle, middle - 1)
        found[".weight_packed"] = pack(codes.astype(np.int64) + middle)
        return found, (codes - spread) * whole
    return packer


def fp4_codes(w: np.ndarray, random: torch.Generator) -> tuple[np.ndarray, Tensor]:
    """(codes, packed) of the E2M1 numbers nearest to w."""
    codes = np.abs(w[..., None] - E2M1).argmin(-1)
    return codes, torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8))


def nvfp4(endings: tuple[str, str, str], divides: bool) -> Callable[..., Packed]:
    """endings: of codes, scales, and the number for the whole matrix."""
    def packer(w: Tensor, random: torch.Generator) -> Packed:
        whole = np.float32(433.7 if divides else 1 / 433.7)
        scales = scales_for(w * 433.7, (w.shape[0], w.shape[1] // 16), random, torch.float8_e4m3fn, 6)
        each = scales.float().numpy() / whole if divides else scales.float().numpy() * whole  # rounded to fp32
        spread = grouped(each.astype(np.float64), 16, w.shape[1])
        codes, packed = fp4_codes(float64(w) / spread, random)
        found = {endings[0]: packed, endings[1]: scales,
                 endings[2]: torch.tensor([whole]) if divides else torch.tensor(whole)}
        return found, (E2M1[codes] * spread).astype(np.float32)
    return packer


def mxfp8(w: Tensor, random: torch.Generator) -> Packed:
    n, k = w.shape
    exponent = int(w.float().std().log2().floor()) - 6
    scales = torch.randint(125 + exponent, 128 + exponent, (n, k // 32), dtype=torch.uint8, generator=random)
    spread = grouped(2.0 ** (scales.numpy().astype(np.float64) - 127), 32, k)
    codes = torch.from_numpy(float64(w) / spread).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scales}, float64(codes.float()) * spread


def mxfp4(w: Tensor, random: torch.Generator) -> Packed:
    n, k = w.shape
    exponent = int(w.float().std().log2().floor())
    scales = torch.randint(125 + exponent, 128 + exponent, (n, k // 32), dtype=torch.uint8, generator=random)
    spread = grouped(2.0 ** (scales.numpy().astype(np.float64) - 127), 32, k)
    codes, packed = fp4_codes(float64(w) / spread, random)
    return {".weight_packed": packed, ".weight_scale": scales}, E2M1[codes] * spread


def awq(group: int) -> Callable[..., Packed]:
    def packer(w: Tensor, random: torch.Generator) -> Packed:
        n, k = w.shape
        scales = scales_for(w, (k // group, n), random, torch.float16, 8)
        zeros = torch.randint(0, 16, (k // group, n), generator=random).numpy()
        at = np.arange(k) // group
        codes = np.clip(np.rint(float64(w).T / float64(scales)[at] + zeros[at]), 0, 15).astype(np.int64)
        found = {".qweight": pack_awq(codes), ".qzeros": pack_awq(zeros), ".scales": scales}
        return found, ((codes - zeros[at]) * float64(scales)[at]).T
    return packer


def gptq(bits: int, group: int, version: int = 1, desc_act: bool = False, symmetric: bool = False,
         dtype: torch.dtype = torch.float16, moved: int = 0) -> Callable[..., Packed]:
    """moved: as in pack_quantized."""
    def packer(w: Tensor, random: torch.Generator) -> Packed:
        n, k = w.shape
        groups, middle = k // (group or k), 2 ** (bits - 1)
        scales = scales_for(w, (groups, n), random, dtype, middle)
        zeros = np.full((groups, n), middle) if symmetric else \
            torch.randint(1, 2**bits, (groups, n), generator=random).numpy()
        at = np.roll(np.arange(k) // (group or k), moved)
        if desc_act:
            at = at[torch.randperm(k, generator=random).numpy()]
        codes = np.clip(np.rint(float64(w).T / float64(scales)[at] + zeros[at]), 0, 2**bits - 1).astype(np.int64)
        stored = zeros - 1 if version == 1 else zeros
        found = {".qweight": pack_stream(codes, bits), ".qzeros": pack_stream(stored.T, bits).T.contiguous(),
                 ".scales": scales, ".g_idx": torch.from_numpy(at.astype(np.int32))}
        return found, ((codes - zeros[at]) * float64(scales)[at]).T
    return packer


def weights(**arguments: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
            "observer": "minmax", "observer_kwargs": {}, "block_structure": None, "actorder": None, **arguments}


def compressed(form: str, **arguments: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": weights(**arguments), "input_activations": None,
             "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*gate$"], "kv_cache_scheme": None,
            "global_compression_ratio": 1.5}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.1,
        "true_sequential": True, "static_groups": False, "checkpoint_format": "gptq", "meta": {"quantizer": "x"}}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
       "modules_to_not_convert": ["gate"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 24],
       "modules_to_not_convert": ["lm_head"]}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
CT_NVFP4 = (".weight_packed", ".weight_scale", ".weight_global_scale")
CASES: Mapping[str, tuple[dict[str, Any], Callable[..., Packed]]] = {
    "fp8-blocks": (FP8, fp8((16, 24))),
    "fp8-matrix": ({**FP8, "weight_block_size": None, "activation_scheme": "static"}, fp8((0, 0))),
    "fp8-rows": (compressed("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None),
                 fp8((1, 0), "_scale", torch.bfloat16)),
    "fp8-compressed-blocks": (compressed("float-quantized", num_bits=8, type="float", strategy="block", group_size=None,
                                         block_structure=[16, 24]), fp8((16, 24), "_scale", torch.bfloat16)),
    "fp8-naive": (compressed("naive-quantized", num_bits=8, type="float", strategy="tensor", group_size=None),
                  fp8((0, 0), "_scale")),
    "fp8-modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"],
                      "producer": {"name": "modelopt", "version": "0.40"}}, fp8((0, 0), "_scale")),
    "int8-rows": (compressed("int-quantized", num_bits=8, strategy="channel", group_size=None), int8((1, 0))),
    "int8-zeros": (compressed("int-quantized", num_bits=8, strategy="channel", group_size=None, symmetric=False),
                   int8((1, 0), zeros=True)),
    "int8-groups": (compressed("naive-quantized", num_bits=8, strategy="group", group_size=32), int8((1, 32))),
    "pack4": (compressed("pack-quantized"), pack_quantized(4, 32)),
    "pack4-fp16": (compressed("pack-quantized"), pack_quantized(4, 32, dtype=torch.float16)),
    "pack4-zeros": (compressed("pack-quantized", symmetric=False), pack_quantized(4, 32, zeros=True)),
    "pack4-actorder": (compressed("pack-quantized", actorder="group"), pack_quantized(4, 32, actorder=True)),
    "pack4-rows": (compressed("pack-quantized", strategy="channel", group_size=-1), pack_quantized(4, 0)),
    "pack8": (compressed("pack-quantized", num_bits=8), pack_quantized(8, 32)),
    "pack3": (compressed("pack-quantized", num_bits=3, symmetric=False), pack_quantized(3, 32, zeros=True)),
    "pack5-old": (compressed("pack-quantized", num_bits=5, symmetric=False),
                  pack_quantized(5, 32, zeros=True, stream=False)),
    "mxfp8": (compressed("mxfp8-quantized", num_bits=8, type="float", group_size=32), mxfp8),
    "nvfp4": (compressed("nvfp4-pack-quantized", **NVFP4), nvfp4(CT_NVFP4, divides=True)),
    "mxfp4": (compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32), mxfp4),
    "nvfp4-modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
                       nvfp4(("", "_scale", "_scale_2"), divides=False)),
    "awq": (AWQ, awq(32)),
    "gptq": (GPTQ, gptq(4, 32, symmetric=True)),
    "gptq-bf16": (GPTQ, gptq(4, 32, symmetric=True, dtype=torch.bfloat16)),
    "gptq-zeros": ({**GPTQ, "sym": False}, gptq(4, 32)),
    "gptq-desc-act": ({**GPTQ, "desc_act": True}, gptq(4, 32, desc_act=True)),
    "gptq-v2": ({**GPTQ, "checkpoint_format": "gptq_v2", "sym": False}, gptq(4, 32, version=2)),
    "gptq-rows": ({**GPTQ, "group_size": -1}, gptq(4, 0)),
    "gptq8": ({**GPTQ, "bits": 8}, gptq(8, 32, symmetric=True)),
    "gptq2": ({**GPTQ, "bits": 2, "sym": False}, gptq(2, 32)),
    "gptq3": ({**GPTQ, "bits": 3, "sym": False}, gptq(3, 32)),
}


def is_quantized(name: str, tensor: Tensor) -> bool:
    """Experts, attention and MLPs; not norms, routers, embedding and head."""
    module = name.removesuffix(".weight")
    return tensor.ndim == 2 and not module.endswith((".gate", "embed_tokens", "lm_head"))


@cache
def plain(kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """(the tensors of a checkpoint as published, its config.json, transformers' model) of two layers."""
    raw = with_keys(FIRST[kind], {"num_hidden_layers": 2})
    model = random_model(raw, dtype)
    with TemporaryDirectory() as folder:
        path = write(model, raw, Path(folder) / "plain")
        return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_bytes()), model


def write_lowbit(path: Path, kind: str, case: str, dtype: torch.dtype = torch.float32,
                 change: Callable[[dict[str, Tensor], dict[str, Any]], Any] | None = None) -> dict[str, Tensor]:
    """A checkpoint of the architecture `kind` at `path`. Its tensors as they are decoded, by the names of an
    unquantized checkpoint, rounded to `dtype` once. change: of the tensors and config.json, before they are written."""
    config, packer = CASES[case]
    tensors, raw, _ = plain(kind, dtype)
    random, decoded, written = torch.Generator().manual_seed(3), {}, {}
    for name, tensor in tensors.items():
        if not is_quantized(name, tensor):
            decoded[name] = written[name] = tensor
            continue
        parts, numbers = packer(tensor, random)
        for ending, part in parts.items():
            written[(name.removesuffix(".weight") if ending.startswith(".") else name) + ending] = part.contiguous()
        decoded[name] = torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype)
    raw = {**json.loads(json.dumps(raw)), "quantization_config": json.loads(json.dumps(config))}
    if change is not None:
        change(written, raw)
    path.mkdir(parents=True)
    save_file(written, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(raw))
    (path / "tokenizer.model").write_bytes(spm_model())
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>",
                                                            "chat_template": DEMO_TEMPLATE}))
    return decoded


def write_fused(path: Path, kind: str, case: str) -> dict[str, Tensor]:
    """The same with a layer's experts in one tensor, as transformers 5 has them in memory; all else is unquantized."""
    config, packer = CASES[case]
    _, raw, model = plain(kind, torch.float32)
    random, decoded, written = torch.Generator().manual_seed(3), {}, {}
    for name, tensor in model.state_dict().items():
        decoded[name] = written[name] = tensor
        if tensor.ndim != 3:
            continue
        each = [packer(w, random) for w in tensor]
        written |= {name + ending: torch.stack([parts[ending] for parts, _ in each]) for ending in each[0][0]}
        decoded[name] = torch.stack([torch.from_numpy(np.ascontiguousarray(numbers)) for _, numbers in each]).float()
    path.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    return decoded


def decoded_model(kind: str, decoded: Mapping[str, Tensor], folder: Path) -> Any:
    """transformers' model with these tensors."""
    _, raw, model = plain(kind, next(iter(decoded.values())).dtype)
    folder.mkdir()
    save_file(dict(decoded), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    return type(model).from_pretrained(folder, dtype=model.dtype)

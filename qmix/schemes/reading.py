"""quantization_config of a config.json (or hf_quant_config.json) as records.

Every method, version and key that changes what the codes mean is read, and one that is not known is refused by name: a
checkpoint that is decoded almost right is worse than none. Which tensors are quantized is seen in the files; what the
config says of it must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qmix.errors import ConfigError
from qmix.models.keys import Keys
from qmix.schemes.compressed import read_compressed
from qmix.schemes.patterns import Names
from qmix.schemes.record import Awq, Fp4, Gptq, Scaled, Scheme

METHODS = "fp8, compressed-tensors, modelopt (NVFP4, FP8), awq, gptq, and mxfp4 in gpt_oss"
ORIGINAL = "give the original bf16, fp16 or fp32 checkpoint, or a GGUF file"
WHERE = "quantization_config."


@dataclass(frozen=True, slots=True)
class Quantization:
    """title: the method for people. groups: (modules, scheme), of which the first that is about a module is its own; no
    names stand for all. apart: modules that are not quantized."""

    title: str
    groups: tuple[tuple[Names, Scheme], ...]
    apart: Names

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Each once."""
        return tuple(dict.fromkeys(scheme for _, scheme in self.groups))

    def scheme_of(self, module: str) -> Scheme | None:
        """Of a module that the files have quantized; None where no group is about it."""
        if len(self.groups) == 1:
            return self.groups[0][1]
        named = (scheme for targets, scheme in self.groups if targets.which(module) is not None)
        return next(named, next((scheme for targets, scheme in self.groups if not targets), None))


MODELOPT = "hf_quant_config.json"  # where NVIDIA's older checkpoints say how they are quantized


def modelopt_config(raw: Mapping[str, object]) -> object:
    """What such a file would say as quantization_config of a config.json."""
    inner = raw.get("quantization")
    return {**inner, "quant_method": "modelopt"} if isinstance(inner, Mapping) else inner


def read_quantization(found: object) -> Quantization:
    """Of the value of quantization_config; ConfigError names what qmix does not know, and the cure."""
    if not isinstance(found, Mapping):
        raise ConfigError(f"quantization_config: got {found!r:.60}, want an object", ORIGINAL)
    method = found.get("quant_method")
    read = READERS.get(method) if isinstance(method, str) else None
    if read is None:
        how = f", as {method}" if isinstance(method, str) and method else ""
        raise ConfigError(f"quantization_config: the weights are quantized already{how:.60}, which qmix does not read "
                          f"(it reads {METHODS})", CURES.get(str(method), ORIGINAL))
    keys = Keys(found, WHERE)
    keys.harmless("quant_method")
    try:
        quantization = read(keys)
        keys.finish()
    except ConfigError as e:
        raise ConfigError(e.message if e.message.startswith(WHERE) else WHERE + e.message, e.cure or ORIGINAL) from None
    return quantization


def _apart(keys: Keys, *names: str) -> Names:
    """Lists of modules that are not quantized, under whichever of `names` they are."""
    return Names.of([text for name in names for text in keys.texts(name, ())], names[0])


def _fp8(keys: Keys) -> Quantization:
    """DeepSeek's and Qwen's: FP8 in blocks; or with one scale a matrix."""
    keys.text("activation_scheme", "dynamic", "static", default="dynamic")
    keys.text("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    keys.text("weight_dtype", "e4m3", "float8_e4m3fn", default="e4m3")
    keys.text("scale_fmt", "float", "ue8m0", default="float")
    keys.text("expert_dtype", "fp8", default="fp8")
    keys.harmless("dequantize", "modules_to_convert", "kv_cache_scheme")  # how transformers loads it
    block = keys.integers("weight_block_size", (0, 0))
    keys.want(len(block) == 2 and (block == (0, 0) or min(block) > 0), "weight_block_size", block,
              "two whole numbers, or null")
    scheme = Scaled("fp8", (block[0], block[1]))
    return Quantization(f"fp8: {scheme.title}", ((Names(), scheme),),
                        _apart(keys, "modules_to_not_convert", "ignored_layers"))


def _modelopt(keys: Keys) -> Quantization:
    """NVIDIA's modelopt."""
    keys.harmless("producer", "quant_library", "kv_cache_scheme", "kv_cache_quant_algo", "config_groups")
    algorithm = keys.text("quant_algo", "NVFP4", "FP8")
    keys.want(keys.integer("group_size", None) in (None, *((16,) if algorithm == "NVFP4" else ())), "group_size",
              keys.get("group_size", None), "16" if algorithm == "NVFP4" else "none")
    for name in ("pre_quant_scale", "has_zero_point"):
        keys.fixed(name, False)
    scheme: Scheme = Fp4("nvfp4", packed=False, divides=False) if algorithm == "NVFP4" else Scaled("fp8", (0, 0))
    return Quantization(f"modelopt: {scheme.title}", ((Names(), scheme),),
                        _apart(keys, "exclude_modules", "ignore"))


def _group(keys: Keys, name: str = "group_size") -> int:
    """Columns that share a scale; 0 = all, -1 in the file."""
    group = keys.integer(name, 128)
    keys.want(group == -1 or 1 <= group <= 2**20, name, group, "-1, or >= 1")
    return max(0, group)


# Of optimum, auto-gptq, gptqmodel and autoawq: how the weights were found, and how their own programs compute.
TOOLS = ("dataset", "tokenizer", "damp_percent", "damp_auto_increment", "true_sequential", "model_seqlen", "batch_size",
         "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "pad_token_id",
         "use_exllama", "disable_exllama", "max_input_length", "exllama_config", "cache_block_outputs", "use_cuda_fp16",
         "meta", "backend", "model_name_or_path", "model_file_base_name", "static_groups", "act_group_aware",
         "group_aware", "mse", "use_triton", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "lm_head",
         "offload_to_disk", "offload_to_disk_path", "is_marlin_format", "pack_impl", "hyb_act", "device",
         "parallel_packing")


def _awq(keys: Keys) -> Quantization:
    keys.harmless(*TOOLS, "format", "checkpoint_format", "sym", "desc_act")
    for name in ("bits", "w_bit"):  # AutoAWQ's own name, and that of its quant_config.json
        bits = keys.integer(name, None)
        keys.want(bits in (None, 4), name, bits, "4")
    groups = {_group(keys, name) for name in ("group_size", "q_group_size") if name in keys} or {_group(keys)}
    keys.want(len(groups) == 1, "q_group_size", keys.get("q_group_size", None), "the same as group_size, or none")
    keys.harmless("group_size", "q_group_size")  # null
    version = str(keys.get("version", None) or keys.get("format", None) or "gemm").lower()
    keys.want(version == "gemm", "version", version, "'gemm' (gemv, gemv_fast, marlin and llm-awq are other layouts)")
    backend = keys.get("backend", None)
    keys.want(backend != "llm-awq", "backend", backend, "another: its layout is not gemm's")
    keys.fixed("zero_point", True)
    scheme = Awq(groups.pop())
    return Quantization(f"awq: {scheme.title}", ((Names(), scheme),), _apart(keys, "modules_to_not_convert"))


def _gptq(keys: Keys) -> Quantization:
    keys.harmless(*TOOLS)
    bits = keys.integer("bits")
    keys.want(bits in (2, 3, 4, 8), "bits", bits, "2, 3, 4 or 8")
    form = str(keys.get("checkpoint_format", None) or keys.get("format", None) or "gptq").lower()
    keys.harmless("format", "checkpoint_format")
    keys.want(form in ("gptq", "gptq_v2"), "checkpoint_format", form, "'gptq' or 'gptq_v2'")
    keys.text("pack_dtype", "int32", default="int32")
    for name in ("rotation", "adapter", "lora", "eora"):
        keys.want(not keys.get(name, None), name, keys.get(name, None), "none: qmix does not undo it")
    dynamic = keys.get("dynamic", None) or {}
    keys.want(isinstance(dynamic, Mapping) and all(str(name).startswith("-") for name in dynamic), "dynamic", dynamic,
              "only rules that leave modules out (-:...): all quantized ones must be alike")
    desc_act = keys.boolean("desc_act", False)
    scheme = Gptq(bits, _group(keys), 2 if form == "gptq_v2" else 1, desc_act, keys.boolean("sym", True))
    return Quantization(f"gptq: {scheme.title}", ((Names(), scheme),), _apart(keys, "modules_to_not_convert"))


def _compressed(keys: Keys) -> Quantization:
    groups, apart, title = read_compressed(keys)
    return Quantization(f"compressed-tensors: {title}", groups, apart)


READERS = {"fp8": _fp8, "compressed-tensors": _compressed, "modelopt": _modelopt, "awq": _awq, "gptq": _gptq}
CURES = {
    "mxfp4": "qmix takes MXFP4 in the experts of gpt_oss alone: have transformers decode the weights "
             "(Mxfp4Config(dequantize=True), then save_pretrained), and give what it saved",
    "bitsandbytes": "give the original bf16 or fp16 checkpoint: qmix quantize --format nf4 makes the same of its "
                    "experts",
}

"""Checkpoints whose weights are quantized already: what quantization_config says of them, as records. No torch."""

from qmix.schemes.reading import MODELOPT, Quantization, modelopt_config, read_quantization
from qmix.schemes.record import Awq, Fp4, Gptq, PackedInts, Part, Scaled, Scheme

__all__ = ["MODELOPT", "Awq", "Fp4", "Gptq", "PackedInts", "Part", "Quantization", "Scaled", "Scheme",
           "modelopt_config", "read_quantization"]

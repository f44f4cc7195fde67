"""Checkpoints whose weights are quantized already: what quantization_config says of them, as records. No torch."""

from qmix.schemes.reading import Quantization, read_quantization
from qmix.schemes.record import Awq, Fp4, Gptq, PackedInts, Part, Scaled, Scheme

__all__ = ["Awq", "Fp4", "Gptq", "PackedInts", "Part", "Quantization", "Scaled", "Scheme", "read_quantization"]

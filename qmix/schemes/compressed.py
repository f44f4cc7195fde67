"""compressed-tensors' quantization_config, as llm-compressor and others write it: groups of modules, each with the
arguments of its weights (`config_groups`), and a list of modules that are not quantized (`ignore`)."""

from __future__ import annotations

from qmix.errors import ConfigError
from qmix.models.keys import Keys
from qmix.schemes.patterns import Names
from qmix.schemes.record import Fp4, PackedInts, Scaled, Scheme

FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized",
           "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision")
CLASSES = ("Linear", "LinearBase")  # targets that stand for every module
MOST_GROUPS = 64
Groups = tuple[tuple[Names, Scheme], ...]


def read_compressed(keys: Keys) -> tuple[Groups, Names, str]:
    """((modules, scheme) in order, modules that are not quantized, a title)."""
    keys.text("quantization_status", "compressed", "frozen", default="compressed")
    keys.harmless("version", "global_compression_ratio", "kv_cache_scheme", "run_compressed")
    for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        found = keys.get(name, None) or {}
        keys.want(not found or (isinstance(found, dict) and found.get("format") == "dense"), name, found,
                  "none: qmix does not undo it")
    whole = keys.text("format", *FORMATS)
    ignore = Names.of(keys.texts("ignore", ()), "ignore")
    named = keys.object("config_groups")
    keys.want(1 <= len(named.names()) <= MOST_GROUPS, "config_groups", list(named.names()),
              f"1 to {MOST_GROUPS} groups")
    found_groups = []
    for name in named.names():
        group = named.object(name)
        form = whole if whole != "mixed-precision" and "format" not in group else group.text("format", *FORMATS[:-1])
        group.harmless("input_activations", "output_activations", "format")  # qmix computes with its own activations
        targets = group.texts("targets")
        group.want("weights" in group, "weights", None, "an object: a group of activations alone is not read")
        scheme = _scheme(group.object("weights"), form)
        names = [] if {*targets} & {*CLASSES} else targets
        found_groups.append((Names.of(names, f"config_groups.{name:.40}.targets"), scheme))
    schemes = dict.fromkeys(scheme for _, scheme in found_groups)
    return tuple(found_groups), ignore, "; ".join(scheme.title for scheme in schemes)


def _scheme(weights: Keys, form: str) -> Scheme:
    """Of the arguments of a group's weights."""
    weights.harmless("observer", "observer_kwargs", "actorder", "dynamic", "scale_dtype", "zp_dtype")
    kind, bits = weights.text("type", "int", "float"), weights.integer("num_bits")
    group, strategy = weights.integer("group_size", None), weights.get("strategy")
    block = _block(weights.get("block_structure", None))
    zeros = not weights.boolean("symmetric", True)
    weights.want(strategy in ("tensor", "channel", "group", "block", "tensor_group"), "strategy", strategy,
                 "'tensor', 'channel', 'group', 'block' or 'tensor_group'")
    if strategy in ("group", "tensor_group"):
        weights.want(isinstance(group, int) and 1 <= group <= 2**20, "group_size", group, ">= 1")
    weights.want(strategy != "block" or block is not None, "block_structure", None, "two whole numbers")
    shared = {"tensor": (0, 0), "channel": (1, 0), "group": (1, group or 0), "tensor_group": (1, group or 0),
              "block": block or (0, 0)}[strategy]
    if form == "nvfp4-pack-quantized":
        weights.want((kind, bits, strategy, group) == ("float", 4, "tensor_group", 16), "group_size", group,
                     "16, of 4-bit floats")
        return Fp4("nvfp4")
    if form == "mxfp4-pack-quantized":
        weights.want((kind, bits, strategy, group) == ("float", 4, "group", 32), "group_size", group,
                     "32, of 4-bit floats")
        return Fp4("mxfp4")
    if form == "pack-quantized":
        weights.want(kind == "int" and 2 <= bits <= 8, "num_bits", bits, "integers of 2 to 8 bits")
        weights.want(strategy in ("group", "channel"), "strategy", strategy, "'group' or 'channel'")
        return PackedInts(bits, shared[1], zeros)
    weights.want(bits == 8, "num_bits", bits, "8")
    if form == "mxfp8-quantized":
        weights.want((kind, strategy, group) == ("float", "group", 32), "group_size", group, "32, of 8-bit floats")
        return Scaled("fp8", shared, powers=True)
    weights.want(kind == "int" or not zeros, "symmetric", False, "true of floats")
    wanted = {"float-quantized": "float", "int-quantized": "int"}.get(form, kind)
    weights.want(kind == wanted, "type", kind, repr(wanted))
    return Scaled("fp8" if kind == "float" else "int8", shared, zeros)


def _block(found: object) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where it says nothing."""
    if isinstance(found, str):  # "128x128", as older versions write it
        found = [int(part) if part.isdecimal() and len(part) < 8 else 0 for part in found.split("x")]
    if found is None:
        return None
    if not isinstance(found, list | tuple) or len(found) != 2 or not all(type(i) is int and i > 0 for i in found):
        raise ConfigError(f"weights.block_structure: got {found!r:.60}, want two whole numbers")
    return found[0], found[1]

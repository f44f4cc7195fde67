"""Frozen records that every floor shares: the store's formats, how to sample, a pass (qmix/spec has the model).

They check themselves when made and name the field at fault. No torch here: `qmix --help` and
`qmix plan` read these records without it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal

from qmix.errors import ConfigError
from qmix.spec import DTYPES as DTYPES
from qmix.spec import ExpertKey as ExpertKey
from qmix.spec import Model

GROUPED_BITS = MappingProxyType({"int4": 4, "int3": 3, "int2": 2})  # formats with scale and zero per group of columns
CARRIED_NAMES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k",  # ggml's, which GGUF files
                 "iq4_nl", "iq4_xs")  # have
EXPERT_FORMATS = ("int8", "int4", "int3", "int2", "nf4", "fp4", "mxfp4", "q8_0", "keep", "mixed")
DENSE_FORMATS = ("int8", "int4", "q8_0", "bf16", "keep")
METHODS = ("rtn", "hqq", "gptq")
CALIBRATED = ("gptq",)  # those that want a text
GROUP_SIZES = (32, 64, 128)
BLOCKS = (64, 32)
EFFORTS = ("low", "medium", "high")  # of reasoning, as gpt-oss names them
KIND_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
BESIDE = "+"  # joins the formats of gate and up where they differ


def _want(condition: bool, name: str, got: object, want: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: got {got!r:.200}, want {want}")


def strings(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """`value` as a tuple of strings. A plain string is one of them, not its letters: "ab" -> ("ab",). ConfigError for
    anything else, which names the parameter `name`."""
    if isinstance(value, str):
        return (value,)
    _want(isinstance(value, Iterable) and not isinstance(value, bytes | Mapping), name, value,
          "a string or a list of strings")
    found = tuple(value)
    _want(all(isinstance(text, str) for text in found), name, found, "a string or a list of strings")
    return found


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """What `qmix quantize` writes: formats and method, per class of matrix.

    method, group_size and block apply where a grouped format is used (experts or dense) and are empty or 0 elsewhere;
    double_quant applies to nf4 and fp4 experts.

    In a mixed store a record is of one of `kinds`: the formats of its w13 and its w2, as ("int3g64", "int4g32"). mix
    has a line for each layer, with a letter for each of its experts: the number of its kind. group_size then counts
    for a dense int4 only. Both are empty for other stores. A kind may also name formats of ggml's, as ("q4_k", "q6_k"),
    and for w13 two of these, of gate and of up where they differ, as ("q4_k+q6_k", "q6_k").

    dense_formats: (tensor, format of ggml's) of the dense matrices that a GGUF file has in one and that stay in it;
    `dense` is that of the others.
    """

    experts: str = "int4"
    dense: str = "int8"
    method: str = "hqq"
    group_size: int = 64
    block: int = 64
    double_quant: bool = False
    kinds: tuple[tuple[str, str], ...] = ()
    mix: tuple[str, ...] = ()
    dense_formats: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _want(self.experts in EXPERT_FORMATS, "format", self.experts, " or ".join(EXPERT_FORMATS))
        _want(self.dense in DENSE_FORMATS, "dense", self.dense, " or ".join(DENSE_FORMATS))
        for kind in self.kinds if self.experts == "mixed" else ():
            _want(len(kind) == 2, "kinds", kind, "the formats of w13 and w2")
            both = parts_of(kind[0])
            _want(len(both) == 1 or (len({*both} & {*CARRIED_NAMES}) == len(both) == 2), "kinds", kind[0],
                  "one format, or two different ones of ggml's")
            for name in (*both, kind[1]):
                parse_kind(name)
        for pair in self.dense_formats:
            _want(pair[1] in CARRIED_NAMES, "dense_formats", pair, " or ".join(CARRIED_NAMES))
        _want(len(dict(self.dense_formats)) == len(self.dense_formats), "dense_formats", self.dense_formats,
              "each tensor once")
        if self.grouped or (self.experts == "mixed" and not self.kinds):
            _want(self.method in METHODS, "method", self.method, " or ".join(METHODS))
            _want(self.group_size in GROUP_SIZES, "group_size", self.group_size, "32, 64 or 128")
            _want(self.block in BLOCKS, "block", self.block, "64 or 32")
        else:
            _want(self.method == "", "method", self.method, "'' (only int4, int3 and int2 have a choice of method)")
            _want(self.group_size == 0, "group_size", self.group_size, "0 (only int4, int3 and int2 have groups)")
            _want(self.block == 0, "block", self.block, "0 (only int4, int3 and int2 have blocks)")
        _want(not self.double_quant or self.experts in ("nf4", "fp4"), "double_quant", self.double_quant,
              "false (only nf4 and fp4 have it)")
        if self.experts != "mixed":
            _want(not self.kinds and not self.mix, "mix", self.mix, "nothing (only mixed stores have kinds)")
            return
        _want(1 <= len(self.kinds) <= len(KIND_LETTERS) and len(set(self.kinds)) == len(self.kinds), "kinds",
              self.kinds, f"1 to {len(KIND_LETTERS)} different ones")
        letters = KIND_LETTERS[:len(self.kinds)]
        _want(not isinstance(self.mix, str), "mix", self.mix, "a line for each layer")
        for line in self.mix:
            _want(set(line) <= set(letters), "mix", line, f"letters of {letters}")
        _want(set("".join(self.mix)) == set(letters), "mix", self.mix, f"an expert of each kind, {letters}")

    def to_json(self) -> dict[str, Any]:
        """Plain data; what only mixed stores have is left out of the others, as it was before there were any."""
        found = asdict(self) | {"kinds": [list(kind) for kind in self.kinds], "mix": list(self.mix),
                                "dense_formats": [list(pair) for pair in self.dense_formats]}
        left_out = ((() if self.experts == "mixed" else ("kinds", "mix"))
                    + (() if self.dense_formats else ("dense_formats",)))
        return {k: v for k, v in found.items() if k not in left_out}

    @property
    def grouped(self) -> set[str]:
        """The grouped formats that are used."""
        return (self.expert_formats | {self.dense}) & GROUPED_BITS.keys()

    @property
    def expert_formats(self) -> set[str]:
        """Those of the experts' matrices, "keep" as it stands."""
        parts = {part for kind in self.kinds for name in kind for part in parts_of(name)}
        return {parse_kind(part)[0] for part in parts} or {self.experts}

    @property
    def dense_kinds(self) -> dict[str, str]:
        """`dense_formats` by name."""
        return dict(self.dense_formats)

    @property
    def formats(self) -> set[str]:
        """All that matrices may have, "keep" as it stands."""
        return self.expert_formats | {self.dense} | {kind for _, kind in self.dense_formats}

    @property
    def unrounded(self) -> bool:
        """Whether all weights may be the checkpoint's own numbers."""
        return self.dense == "keep" and self.experts in ("keep", "mxfp4")

    def kind_of(self, key: ExpertKey) -> int:
        """Which of `kinds` a record is; 0 where all are alike."""
        return KIND_LETTERS.index(self.mix[key.layer][key.expert]) if self.mix else 0

    def check_model(self, model: Model) -> None:
        """ConfigError unless `mix` has a letter for each expert of that model, which has no multi-token-prediction
        head: nothing measures what its experts are worth."""
        if self.experts == "mixed":
            _want(model.mtp_head is None, "mix", "a model with a multi-token-prediction head", "one without")
            got, want = [len(line) for line in self.mix], [model.experts_in(i) for i in range(model.num_layers)]
            _want(got == want, "mix", f"{len(got)} lines of {sorted(set(got))[:8]} letters",
                  f"{len(want)} of {sorted(set(want))[:8]}")


def parts_of(name: str) -> tuple[str, ...]:
    """The formats of the parts of a matrix, if they differ: "q4_k+q6_k" -> ("q4_k", "q6_k"), "q4_k" -> ("q4_k",)."""
    return tuple(name.split(BESIDE)) if isinstance(name, str) else (name,)


def parse_kind(name: str) -> tuple[str, int]:
    """A grouped format with its group size, "int3g64" -> ("int3", 64), or one of ggml's, "q4_k" -> ("q4_k", 0).
    ConfigError for any other text."""
    if isinstance(name, str) and name in CARRIED_NAMES:
        return name, 0
    kind, _, group = name.partition("g") if isinstance(name, str) else ("", "", "")
    _want(kind in GROUPED_BITS and group in map(str, GROUP_SIZES), "kinds", name, "a format as int3g64 or q4_k")
    return kind, int(group)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and
    repeat_penalty 1 switch that step off; max_tokens -1 means until the context is full. stop also takes one plain
    string, which is one stop string, and any list of strings. frequency_penalty and presence_penalty are subtracted
    from the logits of ids that the answer has already, the first as often as it has them; logit_bias is added: pairs of
    id and value, or a mapping. ConfigError names the field that is wrong."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _want(isinstance(value, Real) and not isinstance(value, bool), name, value, "a number")
        for name in ("top_k", "max_tokens"):
            value = getattr(self, name)
            _want(isinstance(value, Integral) and not isinstance(value, bool), name, value, "an integer")
        _want(self.seed is None or (isinstance(self.seed, Integral) and not isinstance(self.seed, bool)), "seed",
              self.seed, "an integer or None")
        object.__setattr__(self, "stop", strings("stop", self.stop))
        _want(0 <= self.temperature <= 100, "temperature", self.temperature, "0 to 100")
        _want(0 < self.top_p <= 1, "top_p", self.top_p, "> 0 and <= 1")
        _want(self.top_k >= 0, "top_k", self.top_k, ">= 0")
        _want(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _want(0 < self.repeat_penalty <= 100, "repeat_penalty", self.repeat_penalty, "> 0 and <= 100")
        _want(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        _want(self.max_tokens >= -1 and self.max_tokens != 0, "max_tokens", self.max_tokens, "-1 or >= 1")
        _want(all(self.stop), "stop", self.stop, "non-empty strings")
        for name in ("frequency_penalty", "presence_penalty"):
            _want(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "-2 to 2")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """SamplingParams.logit_bias as pairs, by id."""
    pairs = value.items() if isinstance(value, Mapping) else value
    _want(isinstance(pairs, Iterable) and not isinstance(pairs, str | bytes), "logit_bias", value,
          "pairs of id and value")
    found: dict[int, float] = {}
    for pair in pairs:
        _want(isinstance(pair, tuple) and len(pair) == 2, "logit_bias", pair, "pairs of id and value")
        token_id, bias = pair
        _want(isinstance(token_id, Integral) and not isinstance(token_id, bool) and int(token_id) >= 0, "logit_bias",
              token_id, "a token id")
        _want(isinstance(bias, Real) and not isinstance(bias, bool) and -100 <= float(bias) <= 100, "logit_bias", bias,
              "-100 to 100")
        found[int(token_id)] = float(bias)
    return tuple(sorted(found.items()))


class Cancel:
    """A token that one thread sets and the compute thread checks between expert records."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def clear(self) -> None:
        self._event.clear()

    def __bool__(self) -> bool:
        return self._event.is_set()


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass as the experts see it.

    sequence: for each of the T tokens, the number of the session it belongs to. drafts: how many of the last
    ones are guesses that may turn out wrong. again: the last layer's router has spoken already for these tokens, and
    been counted: other rows of it are wanted.
    """

    phase: Literal["prefill", "decode"]
    sequence: tuple[int, ...] = ()
    cancel: Cancel = field(default_factory=Cancel)
    drafts: int = 0
    again: bool = False

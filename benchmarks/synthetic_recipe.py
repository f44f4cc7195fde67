"""What a synthetic model is made of: Mixtral's shape, its gains, the values that both file formats share, and the token
sequences to run through it. No weights of the experts here: those are only random.

Routing must behave as in a trained model, or a cache and a prefetcher are measured on nothing:
  - every weight has mean zero, or all tokens drift the same way and routing collapses onto a few experts;
  - a token's embedding is sqrt(c) * centre of its cluster + sqrt(1 - c) * noise, all of deviation 1, and the
    cluster of a token is its id // 500. Tokens of different clusters route independently, tokens of
    one cluster share an expert about as often as neighbours do in Mixtral;
  - each layer adds to the residual a vector `drift` times as long as the residual, so that what the next
    layer's router says one layer early is right about as often in every layer, and the residual grows by
    sqrt(1 + drift^2) a layer;
  - three quarters of that (in energy) come from attention, which sees mostly the token itself, since each
    query head is a copy of its key head: a fixed linear map, which keeps tokens of a cluster alike in
    deep layers as well, and does not depend on the length of the context. One quarter comes from the experts.

H hidden, F expert inner, E experts, V vocabulary, D head size, L layers, l a layer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

VOCAB = 32000  # Mixtral's, whose ids all sequences are made of
CLUSTER = 500  # token ids of one cluster
CLUSTERS = VOCAB // CLUSTER
ALIKE = 0.33  # c, the share of a cluster's centre in an embedding, in energy
STAY = 0.96  # chance that the local sequence stays in its cluster
EXPERT_SHARE = 0.25  # of the energy that a layer adds

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The shape of Mixtral 8x7B with `layers` layers; hidden and inner are smaller only to try things out. block: of a
    store's int4, 0 for the one that `qmix quantize` chooses on this machine. Other models: synthetic_models.py.

    recalls: (drift, recall of the chosen experts asked one layer early), in order of the drift, from normal logits.
    chosen_length: root mean square of the length of a token's weights, the softmax of the largest of E normal logits.
    activated: root mean square of what an expert's activation makes of a normal gate and up.
    """

    layers: int
    recall: float = 0.85
    hidden: int = 4096
    inner: int = 14336
    seed: int = 0
    block: int = 0

    experts: ClassVar[int] = 8
    chosen: ClassVar[int] = 2  # experts of a token in a layer
    expert_format: ClassVar[str] = "int4"  # of a store
    vocab: ClassVar[int] = VOCAB
    head_dim: ClassVar[int] = 128  # D
    eps: ClassVar[float] = 1e-5  # of every norm
    theta: ClassVar[float] = 1e6  # of the rotary embedding
    widths: ClassVar[tuple[int, int]] = (512, 256)  # what hidden and inner are multiples of
    recalls: ClassVar[tuple[tuple[float, float], ...]] = (
        (0.0, 1.0), (0.14, 0.913), (0.203, 0.879), (0.251, 0.854), (0.292, 0.833), (0.363, 0.798), (0.426, 0.769),
        (0.484, 0.744), (0.62, 0.692), (0.75, 0.649))
    chosen_length: ClassVar[float] = 0.7441
    activated: ClassVar[float] = 0.5964
    gguf: ClassVar[str] = "llama"  # llama.cpp's name of the architecture
    gguf_names: ClassVar[Mapping[str, str]] = MappingProxyType({})  # where they differ from synthetic_gguf.py's NAMES

    def __post_init__(self) -> None:
        hidden, inner = self.widths
        if self.hidden % hidden or self.inner % inner or self.layers < 1:
            raise ValueError(f"want layers >= 1, hidden a multiple of {hidden}, inner of {inner}")
        least = self.recalls[-1][1]
        if not least <= self.recall < 1:
            raise ValueError(f"recall: got {self.recall}, want {least} to 1")

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.heads // 4

    def raw_config(self) -> dict[str, object]:
        """config.json, that of Mixtral 8x7B v0.1 with other counts."""
        return {**self.common_config(), "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
                "intermediate_size": self.inner, "num_local_experts": self.experts, "max_position_embeddings": 32768,
                "rope_theta": self.theta, "sliding_window": None}

    def common_config(self) -> dict[str, object]:
        return {"hidden_act": "silu", "vocab_size": self.vocab, "hidden_size": self.hidden,
                "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "num_experts_per_tok": self.chosen,
                "rms_norm_eps": self.eps, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
                "torch_dtype": "bfloat16"}

    def gguf_keys(self) -> dict[str, object]:
        """{what gguf's writer adds: the value}."""
        return {"rope_dimension_count": self.head_dim}

    def stream(self, kind: str, *place: int) -> np.random.Generator:
        """The random numbers of one tensor, the same whatever else is drawn."""
        return np.random.Generator(np.random.PCG64DXSM([self.seed, zlib.crc32(kind.encode()), *place]))

    @property
    def drift(self) -> float:
        """What a layer adds to the residual, as a share of it."""
        drifts, recalls = zip(*self.recalls, strict=True)
        return float(np.interp(-self.recall, [-r for r in recalls], drifts))

    def added(self, layer: int, share: float) -> float:
        """The deviation of what a part of a layer adds to the residual. share: of the energy that the layer adds."""
        return math.sqrt(share) * (self.drift * (1 + self.drift**2) ** (layer / 2))

    def spread(self, matrix: str, layer: int = 0) -> float:
        """The deviation of a matrix's weights. matrix: "w13" or "w2" of an expert, else as kind_of has it."""
        if matrix == "o":
            return self.added(layer, 1 - EXPERT_SHARE) / math.sqrt(self.heads * self.head_dim)
        if matrix == "w2":
            return self.added(layer, EXPERT_SHARE) / (self.activated * self.chosen_length * math.sqrt(self.inner))
        return 1 / math.sqrt(self.hidden)

    def key_heads(self, name: str) -> tuple[int, int]:
        """(key heads, query heads that are copies of each), of the mixer that the tensor belongs to."""
        return self.kv_heads, self.heads // self.kv_heads

    def embedding(self, cluster: int) -> Values:
        """[500, H]: the embeddings of one cluster's tokens, more than the last one has where V ends within it."""
        random = self.stream("embedding", cluster)
        centre = random.standard_normal(self.hidden, dtype=np.float32)
        noise = random.standard_normal((CLUSTER, self.hidden), dtype=np.float32)
        return math.sqrt(ALIKE) * centre + math.sqrt(1 - ALIKE) * noise  # type: ignore[no-any-return]

    def router(self, layer: int) -> Values:
        """[E, H], rows of length 1, so that no expert is larger than another: logits of deviation 1."""
        rows = self.stream("router", layer).standard_normal((self.experts, self.hidden), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]

    def plain(self, name: str, shape: tuple[int, ...]) -> Values:
        """A dense tensor, not the embedding, that no format packs, by its canonical name: both files have its numbers,
        rounded to bf16."""
        if name.endswith(".router.weight"):
            return self.router(int(name.split(".")[1]))
        return np.ones(shape, np.float32)

    def gguf_plain(self, name: str, shape: tuple[int, ...]) -> Values:
        """The same as llama.cpp keeps it."""
        return rounded(self.plain(name, shape))

    def expert_bias(self, layer: int, expert: int, matrix: str, rows: int) -> Values:
        """[rows], of "w13" (gate's, then up's) or "w2", rounded to bf16. For models whose experts have biases."""
        return rounded(BIAS * self.stream(f"{matrix} bias", layer, expert).standard_normal(rows, dtype=np.float32))


BIAS = 0.02  # deviation of a bias: small beside what it is added to, so that routing stays as it is


def kind_of(name: str) -> str:
    """What streams and spreads of a dense matrix go by: "layers.3.attention.q" -> "q", "layers.3.shared.up" ->
    "shared.up", "head" -> "head"."""
    return (name.split(".", 2)[2] if name.startswith("layers.") else name).removeprefix("attention.")


def rounded(x: Values) -> Values:
    """To bf16, half to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def microscales(random: np.random.Generator, shape: Sequence[int], spread: float) -> NDArray[np.uint8]:
    """E8M0 scales of random E2M1 codes that give weights of deviation `spread`: two neighbouring powers of two, so
    often each that the mean square is right."""
    wanted = spread / E2M1_LENGTH
    low = math.floor(math.log2(wanted))
    share = ((wanted / 2**low) ** 2 - 1) / 3  # of the larger one, whose square is 4
    return (127 + low + (random.random(tuple(shape), np.float32) < share)).astype(np.uint8)


E2M1_LENGTH = (2 * (0.5**2 + 1 + 1.5**2 + 2**2 + 3**2 + 4**2 + 6**2) / 16) ** 0.5  # of a code, all equally likely


def uniform_tokens(n: int, seed: int = 0) -> list[int]:
    """n different tokens of random clusters: consecutive ones route independently, the worst for a cache.
    Cluster 0 holds the control tokens and bytes and is left out."""
    random = np.random.default_rng([seed, 1])
    return (CLUSTER + random.permutation(VOCAB - CLUSTER)[:n]).tolist()


def local_tokens(n: int, seed: int = 0) -> list[int]:
    """n tokens of a chain that leaves its cluster once in 25 steps: first or second choice repeat from
    one token to the next about as often as in Mixtral (62 to 67 %, arXiv 2401.04088, table 5)."""
    random = np.random.default_rng([seed, 2])
    cluster, tokens = 0, []
    for step in range(n):
        if step == 0 or random.random() >= STAY:
            cluster = int(random.integers(1, CLUSTERS))
        tokens.append(cluster * CLUSTER + int(random.integers(CLUSTER)))
    return tokens


def prose_tokens(text: Path, n: int, tokenizer: Path | None = None) -> list[int]:
    """The first n tokens of a text file, behind BOS, as Mixtral's tokenizer gives them."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(tokenizer or tokenizer_file()))
    ids = [model.bos_id(), *model.encode(text.read_text(encoding="utf-8"))]
    if len(ids) < n:
        raise SystemExit(f"{text}: {len(ids)} tokens, want at least {n}")
    return ids[:n]


def tokens_of(kind: str, n: int, seed: int = 0) -> list[int]:
    """kind: "uniform", "local", or the path of a text file."""
    if kind == "uniform":
        return uniform_tokens(n, seed)
    return local_tokens(n, seed) if kind == "local" else prose_tokens(Path(kind), n)


def tokenizer_file() -> Path:
    """Mixtral's vocabulary, out of the installed mistral_common (one of the test tools)."""
    from importlib.util import find_spec

    spec = find_spec("mistral_common")
    found = Path(str(spec.origin)).parent / "data" / "tokenizer.model.v1" if spec else None
    if found is None or not found.is_file():
        raise SystemExit("the tokenizer comes from the package mistral-common, which is not installed or has "
                         "none: pip install -e '.[dev]'")
    return found

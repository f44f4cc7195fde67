"""What a synthetic Mixtral or Qwen3-30B-A3B is made of: its shape, its gains, the values that both file formats share,
and the token sequences to run through it. No weights of the experts here: those are only random.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VOCAB = 32000  # Mixtral's, whose ids all sequences are made of
CLUSTER = 500  # token ids of one cluster
CLUSTERS = VOCAB // CLUSTER
HEAD = 128  # D
ALIKE = 0.33  # c, the share of a cluster's centre in an embedding, in energy
STAY = 0.96  # chance that the local sequence stays in its cluster
EXPERT_SHARE = 0.25  # of the energy that a layer adds

# Drift -> recall of the chosen experts, asked one layer early: of two of eight, and of eight of 128.
RECALL = ((0.0, 1.0), (0.14, 0.913), (0.203, 0.879), (0.251, 0.854), (0.292, 0.833), (0.363, 0.798),
          (0.426, 0.769), (0.484, 0.744), (0.62, 0.692), (0.75, 0.649))
RECALL_QWEN3 = ((0.0, 1.0), (0.14, 0.877), (0.203, 0.829), (0.251, 0.794), (0.292, 0.765), (0.363, 0.717),
                (0.426, 0.676), (0.484, 0.64), (0.62, 0.567), (0.75, 0.506))

SILU = 0.5964  # root mean square of silu(g) for normal g
# Root mean square of the length of a token's weights: the softmax of the largest of E normal logits.
CHOSEN, CHOSEN_QWEN3 = 0.7441, 0.3862


@dataclass(frozen=True, slots=True)
class Recipe:
    """The shape of Mixtral 8x7B with `layers` layers; hidden and inner are smaller only to try things out. block: of a
    store's int4, 0 for the one that `qmix quantize` chooses on this machine."""

    layers: int
    recall: float = 0.85
    hidden: int = 4096
    inner: int = 14336
    seed: int = 0
    block: int = 0

    def __post_init__(self) -> None:
        if self.hidden % 512 or self.inner % 256 or self.layers < 1:
            raise ValueError("want layers >= 1, hidden a multiple of 512, inner of 256")
        least = self.recalls[-1][1]
        if not least <= self.recall < 1:
            raise ValueError(f"recall: got {self.recall}, want {least} to 1")

    @property
    def heads(self) -> int:
        return self.hidden // HEAD

    @property
    def kv_heads(self) -> int:
        return self.heads // 4

    @property
    def experts(self) -> int:
        return 8

    @property
    def chosen(self) -> int:
        """Experts of a token in a layer."""
        return 2

    @property
    def vocab(self) -> int:
        return VOCAB

    @property
    def eps(self) -> float:
        """Of every norm."""
        return 1e-5

    @property
    def head_norms(self) -> bool:
        """Whether each head of q and k is normed."""
        return False

    @property
    def recalls(self) -> tuple[tuple[float, float], ...]:
        """(drift, recall) in order of the drift."""
        return RECALL

    @property
    def chosen_length(self) -> float:
        """Root mean square of the length of a token's weights."""
        return CHOSEN

    def raw_config(self) -> dict[str, object]:
        """config.json, that of Mixtral 8x7B v0.1 with other counts."""
        return {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": 128, "num_local_experts": self.experts,
            "num_experts_per_tok": self.chosen, "max_position_embeddings": 32768, "rope_theta": 1e6,
            "rms_norm_eps": self.eps, "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1,
            "eos_token_id": 2, "torch_dtype": "bfloat16"}

    def stream(self, kind: str, *place: int) -> np.random.Generator:
        """The random numbers of one tensor, the same whatever else is drawn."""
        return np.random.Generator(np.random.PCG64DXSM([self.seed, zlib.crc32(kind.encode()), *place]))

    @property
    def drift(self) -> float:
        """What a layer adds to the residual, as a share of it."""
        drifts, recalls = zip(*self.recalls, strict=True)
        return float(np.interp(-self.recall, [-r for r in recalls], drifts))

    def spread(self, matrix: str, layer: int = 0) -> float:
        """The deviation of a matrix's weights. "q" | "k" | "v" | "o" | "w13" | "w2" | "head"."""
        added = self.drift * (1 + self.drift**2) ** (layer / 2)
        if matrix == "o":
            return math.sqrt(1 - EXPERT_SHARE) * added / math.sqrt(self.heads * HEAD)
        if matrix == "w2":
            return math.sqrt(EXPERT_SHARE) * added / (SILU * self.chosen_length * math.sqrt(self.inner))
        return 1 / math.sqrt(self.hidden)

    def embedding(self, cluster: int) -> NDArray[np.float32]:
        """[500, H]: the embeddings of one cluster's tokens, more than the last one has where V ends within it."""
        random = self.stream("embedding", cluster)
        centre = random.standard_normal(self.hidden, dtype=np.float32)
        noise = random.standard_normal((CLUSTER, self.hidden), dtype=np.float32)
        return math.sqrt(ALIKE) * centre + math.sqrt(1 - ALIKE) * noise  # type: ignore[no-any-return]

    def router(self, layer: int) -> NDArray[np.float32]:
        """[E, H], rows of length 1, so that no expert is larger than another: logits of deviation 1."""
        rows = self.stream("router", layer).standard_normal((self.experts, self.hidden), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Qwen3Recipe(Recipe):
    """The shape of Qwen3-30B-A3B, which has 48 layers: many small experts."""

    recall: float = 0.8
    hidden: int = 2048
    inner: int = 768

    @property
    def heads(self) -> int:
        return self.hidden // 64  # q is twice as wide as the residual

    @property
    def kv_heads(self) -> int:
        return self.heads // 8

    @property
    def experts(self) -> int:
        return 128

    @property
    def chosen(self) -> int:
        return 8

    @property
    def vocab(self) -> int:
        return 151936

    @property
    def eps(self) -> float:
        return 1e-6

    @property
    def head_norms(self) -> bool:
        return True

    @property
    def recalls(self) -> tuple[tuple[float, float], ...]:
        return RECALL_QWEN3

    @property
    def chosen_length(self) -> float:
        return CHOSEN_QWEN3

    def raw_config(self) -> dict[str, object]:
        """config.json, that of Qwen3-30B-A3B with other counts."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": 8 * self.inner,
            "moe_intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": HEAD, "num_experts": self.experts,
            "num_experts_per_tok": self.chosen, "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "max_position_embeddings": 40960, "rope_theta": 1e6, "rms_norm_eps": self.eps,
            "use_sliding_window": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
            "torch_dtype": "bfloat16"}


RECIPES: dict[str, type[Recipe]] = {"mixtral": Recipe, "qwen3": Qwen3Recipe}


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

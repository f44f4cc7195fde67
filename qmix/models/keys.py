"""Typed reads of a config.json that keep account: at the end a key that nobody read is an error.

A value of a wrong type is refused, never converted, and the error names the key as it stands in the file,
"text_config.hidden_size: got '64', want an integer". An absent key has the default that the reader gives, which is the
one that transformers has for that model_type; where it gives none the key is required.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qmix.errors import ConfigError

MOST = 2**31  # beyond any model: a hostile config must not keep us counting
MOST_LAYERS = MOST_EXPERTS = 4096
REQUIRED: Any = ...

# Keys that change no logits of a trained model, at any value.
HARMLESS = frozenset({
    # transformers' own bookkeeping
    "architectures", "transformers_version", "model_type", "_name_or_path", "name_or_path", "_commit_hash", "auto_map",
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits",
    "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type", "torchscript", "pruned_heads",
    "use_bfloat16", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "experts_implementation", "_experts_implementation_internal",
    "transformers.js_config", "pretraining_tp", "use_flash_attention_2", "_flash_attn_2_enabled",
    # training
    "initializer_range", "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef", "attention_dropout",
    "hidden_dropout", "embedding_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "gradient_checkpointing",
    "unsloth_fixed", "unsloth_version", "model_max_length", "tokenizer_class",
    # token ids that only a tokenizer, padding or a decoder start needs
    "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_model_type",
    # how to generate, which older exporters wrote here; transformers ignores them too
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "num_beam_groups", "diversity_penalty", "cache_implementation", "prefix",
    "task_specific_params", "finetuning_task",
    # the checkpoint itself refuses weights that are quantized already, before any other key is read
    "quantization_config",
})
# Features that a model may name and switch off; where they are on, their architecture reads them.
OFF = frozenset({"is_encoder_decoder", "add_cross_attention", "is_decoder", "tie_encoder_decoder", "attention_bias",
                 "mlp_bias", "qkv_bias", "use_sliding_window", "use_mrope"})


class Keys:
    """The keys of one object of a config.json. `where` is its own key and a dot, "" for the file as a whole."""

    def __init__(self, raw: Mapping[str, Any], where: str = ""):
        self._raw = raw
        self._where = where
        self._read: set[str] = set()
        self._inner: dict[str, Keys] = {}

    def __contains__(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._raw.get(key) is not None

    def names(self) -> tuple[str, ...]:
        """All keys, in the order of the file."""
        return tuple(self._raw)

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """The value as it stands."""
        self._read.add(key)
        value = self._raw.get(key, default)
        if value is REQUIRED:
            raise ConfigError(f"{self._where}{key}: missing")
        return value

    def want(self, condition: bool, key: str, got: object, wanted: str) -> None:
        """ConfigError, "num_local_experts: got 0, want >= 1", unless `condition`."""
        if not condition:
            raise ConfigError(f"{self._where}{key}: got {got!r:.200}, want {wanted}")

    def integer(self, key: str, default: int | None = REQUIRED, null: bool = False) -> Any:
        """A whole number; None where the value is null and that is allowed, by `null` or as the default."""
        value = self.get(key, default)
        if value is None and (null or default is None):
            return None
        good = isinstance(value, int) and not isinstance(value, bool) and -1e300 < value < 1e300
        self.want(good, key, Short(value), "an integer")
        return value

    def count(self, key: str, default: int = REQUIRED, most: int = MOST, least: int = 1) -> int:
        """A whole number from `least` to `most`."""
        return self.in_range(key, self.integer(key, default), most, least)

    def in_range(self, key: str, value: int, most: int = MOST, least: int = 1) -> int:
        self.want(least <= value <= most, key, value, f">= {least} and <= {most}" if value > most else f">= {least}")
        return value

    def number(self, key: str, default: float | None = REQUIRED, above: float | None = None) -> Any:
        """A finite number, more than `above`; None where the default is None and the value null."""
        value = self.get(key, default)
        if value is None and default is None:
            return None
        good = isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
        self.want(good, key, Short(value), "a finite number")
        self.want(above is None or value > above, key, value, f"> {above}")
        return float(value)

    def boolean(self, key: str, default: bool = REQUIRED) -> bool:
        value = self.get(key, default)
        self.want(isinstance(value, bool), key, value, "true or false")
        return value

    def text(self, key: str, *allowed: str, default: str = REQUIRED) -> str:
        """One of `allowed`."""
        value = self.get(key, default)
        self.want(isinstance(value, str) and value in allowed, key, value, " or ".join(map(repr, allowed)))
        return value

    def integers(self, key: str, default: Sequence[int] | None = REQUIRED) -> tuple[int, ...]:
        """A list of whole numbers; null is as absent where there is a default."""
        value = self._list(key, default)
        self.want(all(type(i) is int for i in value), key, value, "a list of integers")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self._list(key, REQUIRED)
        good = all(type(v) in (int, float) and -1e300 < v < 1e300 for v in value)
        self.want(good, key, value, "a list of finite numbers")
        return tuple(map(float, value))

    def texts(self, key: str, default: Sequence[str] | None = REQUIRED) -> tuple[str, ...]:
        value = self._list(key, default)
        self.want(all(isinstance(v, str) for v in value), key, value, "a list of strings")
        return value

    def _list(self, key: str, default: Any) -> tuple[Any, ...]:
        value = self.get(key, default)
        if value is None and default is not REQUIRED:
            value = default
        self.want(isinstance(value, list | tuple), key, value, "a list")
        return tuple(value)

    def token_ids(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """An id, a list of ids, or null for none; -1, as exporters write for none, never comes up."""
        value = self.get(key, list(default))
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        self.want(all(isinstance(i, int) and not isinstance(i, bool) for i in ids), key, value, "token ids")
        return tuple(i for i in ids if i >= 0)

    def object(self, key: str) -> Keys:
        """The keys of a nested object, empty where it is absent or null; what is not read there is refused too."""
        value = self.get(key, {})
        value = {} if value is None else value
        self.want(isinstance(value, Mapping), key, value, "an object")
        return self._inner.setdefault(key, Keys(value, f"{self._where}{key}."))

    def fixed(self, key: str, *allowed: Any) -> None:
        """A key that transformers' model has in one way only: absent, null or one of `allowed`, else refused."""
        value = self.get(key, None)
        good = value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in allowed)
        self.want(good, key, value, " or ".join(_json(v) for v in allowed))

    def one_name(self, *names: str) -> str:
        """Which of several names of one thing the file has; the first where it has none. Both are refused unless they
        say the same."""
        there = [name for name in names if name in self._raw] or [names[0]]
        for other in there[1:]:
            self.want(self.get(other) == self.get(there[0]), other, self.get(other), f"the same as {there[0]}")
        return there[0]

    def harmless(self, *names: str) -> None:
        """Keys that this architecture's model in transformers does not look at for text."""
        self._read.update(names)

    def finish(self) -> None:
        """ConfigError for the first key that nobody read; null is as if it were not there."""
        for key, value in self._raw.items():
            if key in OFF - self._read:
                self.fixed(key, False)
            if value is not None and key not in self._read and key not in HARMLESS:
                raise ConfigError(f"{self._where}{key}: got {value!r:.60}, a key that qmix does not know and would "
                                  "ignore", "if it changes nothing that the model computes, remove it from config.json")
        for inner in self._inner.values():
            inner.finish()


class Short:
    """A value in an error, which may be a number of 400 digits."""

    def __init__(self, value: object):
        self._value = value

    def __repr__(self) -> str:
        return f"{self._value!r:.40}"


def _json(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)

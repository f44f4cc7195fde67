"""Rotary embedding as config.json has it: `rope_parameters`, before transformers 5 `rope_scaling` and `rope_theta`."""

from __future__ import annotations

from typing import Any

from qmix.models.keys import REQUIRED, Keys
from qmix.spec import Linear, Llama3, LongRope, Rope, Yarn
from qmix.spec.rope import Scaling

TYPES = ("default", "linear", "yarn", "llama3", "longrope")
# What a frequency may be divided by: published factors are 1 to some tens. Beyond fp32's normal numbers a factor or
# its reciprocal becomes 0 or inf, and the logits NaN.
LEAST_FACTOR, MOST_FACTOR, NORMAL = 2.0**-20, 2.0**40, 2.0**126


def read_rope(keys: Keys, head_dim: int, max_positions: int, theta: float, partial: float | None = None) -> Rope:
    """One rotary embedding for all layers. theta: where config.json has none; partial: the share of the head's
    dimensions that is rotated where config.json has none; None = all of them, and config.json may not say otherwise."""
    name = "rope_scaling" if keys.get("rope_scaling", None) else "rope_parameters"
    if name == "rope_scaling" and keys.get("rope_parameters", None):
        same = keys.get("rope_parameters") == keys.get("rope_scaling")
        keys.want(same, "rope_scaling", keys.get("rope_scaling"), "the same as rope_parameters, or one of both")
    inner = keys.object(name)
    theta_from = inner if "rope_theta" in inner else keys
    keys.harmless("rope_theta")  # the nested one wins, as in transformers
    dim = head_dim if partial is None else read_rotary_dim(inner, keys, head_dim, partial)
    return Rope(theta_from.number("rope_theta", theta, above=0), dim, read_scaling(inner, dim, max_positions))


def read_rotary_dim(inner: Keys, outer: Keys, head_dim: int, partial: float) -> int:
    """How many dimensions of each head are rotated: partial_rotary_factor of them, which `inner`, the object of the
    rotary embedding, has, else `outer`."""
    place = inner if "partial_rotary_factor" in inner else outer
    outer.harmless("partial_rotary_factor")
    part = place.number("partial_rotary_factor", partial, above=0)
    dim = int(head_dim * part)
    place.want(2 <= dim <= head_dim and dim % 2 == 0, "partial_rotary_factor", part,
               f"an even number of the dimensions of head_dim = {head_dim}")
    return dim


def read_scaling(keys: Keys, dim: int, max_positions: int) -> Scaling | None:
    """What the object of one rotary embedding says of longer contexts."""
    keys.harmless("rope_theta", "type")
    kind = keys.text("rope_type" if "rope_type" in keys else "type", *TYPES, default="default")
    if kind == "default":
        return None
    if kind == "yarn":
        keys.get("factor")  # null is max_positions / original, but it must be there
    factor = keys.number("factor", None if kind in ("yarn", "longrope") else REQUIRED, above=0)
    if kind == "linear":
        return Linear(factor)
    original = keys.count("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        low, high = (keys.number(f"{end}_freq_factor", above=0) for end in ("low", "high"))
        keys.want(high > low, "high_freq_factor", high, f"more than low_freq_factor = {low}")
        return Llama3(factor, low, high, original)
    attention_factor = keys.number("attention_factor", None, above=0)
    if kind == "longrope":
        short, long = (_factors(keys, f"{which}_factor", dim // 2) for which in ("short", "long"))
        return LongRope(original, short, long, attention_factor, factor)
    return Yarn(original, factor, _or(keys, "beta_fast", 32.0), _or(keys, "beta_slow", 1.0),
                keys.boolean("truncate", True), attention_factor, _or(keys, "mscale", None),
                _or(keys, "mscale_all_dim", None))


def _or(keys: Keys, key: str, default: float | None) -> Any:
    """A number above 0, or `default` where it is absent, null or 0, as transformers takes these."""
    value = keys.number(key, None)
    keys.want(value is None or value >= 0, key, value, ">= 0")
    return value or default


def _factors(keys: Keys, key: str, count: int) -> tuple[float, ...]:
    found = keys.numbers(key)
    want_factors(keys, key, found, count)
    return found


def want_factors(keys: Keys, key: str, found: tuple[float, ...], pairs: int, most: float = MOST_FACTOR) -> None:
    """ConfigError unless `found` is what the frequency of each of `pairs` rotary pairs may be divided by."""
    keys.want(len(found) == pairs > 0, key, len(found), f"{pairs} numbers, one for each rotary pair")
    for factor in found:
        keys.want(factor > 0, key, factor, "numbers > 0")
        keys.want(LEAST_FACTOR <= factor <= most, key, factor,
                  f"numbers from {LEAST_FACTOR:g} to {most:g}: with such a frequency the model computes inf or NaN; "
                  "fetch or convert the model again")

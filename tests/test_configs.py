"""Configurations of the GPU's kernels: the built-in tables, their plain form, and what they leave alone in results."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import decode, product, relative
from test_cuda import DEVICE, SUMS, here, matrix, needs_triton, operand
from test_cuda_ops import attention, dense, random

from qmix.errors import ConfigError, UsageError
from qmix.kernels import cuda_prompt
from qmix.kernels.configs import (
    BUILT_IN,
    INTERPRETED,
    WIDE,
    Attention,
    Configs,
    Dense,
    Gemv,
    Matmul,
    built_in,
    capability,
    from_plain,
)
from qmix.kernels.cuda_ops import TritonOps

powers = st.sampled_from([32, 64])
anything = st.builds(Configs, st.builds(Gemv, powers, st.sampled_from([1, 2, 32])),
                     st.builds(Matmul, powers, st.sampled_from([64, 256]), st.sampled_from([1, 16]), st.integers(1, 8)),
                     st.builds(Dense, powers, powers, st.sampled_from([1, 16])),
                     st.builds(Attention, powers, powers, st.sampled_from([2, 8]), st.integers(1, 8)))


def test_cards() -> None:
    assert built_in((7, 5)) != built_in((8, 0)) == built_in((8, 6)) == built_in((8, 9)) != built_in((9, 0))
    assert built_in((9, 0)) == BUILT_IN[9, 0]
    assert built_in((10, 3)) == BUILT_IN[10, 0] != built_in((12, 1)) == BUILT_IN[12, 0]
    assert built_in(None) == INTERPRETED and capability(torch.device("cpu")) is None
    with pytest.raises(UsageError, match=r"7\.0: the kernels need 7\.5"):
        built_in((7, 0))


@given(anything)
def test_the_plain_form_comes_back(configs: Configs) -> None:
    assert from_plain(json.loads(json.dumps(asdict(configs)))) == configs


@pytest.mark.parametrize(("kernel", "key", "value"), [
    ("gemv", "threads", 0), ("gemv", "threads", 2048), ("gemv", "threads", 96), ("gemv", "threads", True),
    ("gemv", "unroll", 64), ("gemv", "unroll", 4.0), ("matmul", "rows", 32), ("matmul", "stages", 9),
    ("dense", "cols", 128), ("dense", "rows", "16"), ("attention", "tokens", 8), ("attention", "warps", -4),
    ("attention", "warps", 10**400), ("attention", "more", 1), ("more", "more", 1)])
def test_nonsense_is_refused_by_name(kernel: str, key: str, value: Any) -> None:
    values: dict[str, Any] = asdict(Configs())
    values.setdefault(kernel, {})[key] = value
    with pytest.raises(ConfigError) as refused:
        from_plain(values)
    assert (key if key != "more" else "want") in refused.value.message and len(refused.value.message) < 200


@pytest.mark.parametrize("values", [None, [], {}, {"gemv": {}}, asdict(Configs()) | {"gemv": 4}], ids=repr)
def test_what_is_no_configuration(values: Any) -> None:
    with pytest.raises(ConfigError):
        from_plain(values)


@needs_triton
class TestResults:
    """Any configuration gives the numbers; `unroll` the same bits, and a token its own bits whatever its company."""

    def test_gemv(self) -> None:
        m, x = matrix("int4", 70, 32 * 9, 32, 64), operand(3, 32 * 9)
        results = []
        for gemv in (Gemv(32, 1), Gemv(32, 8), Gemv(256, 8)):
            y, ops = torch.empty(3, 70, device=DEVICE), TritonOps(Configs(gemv=gemv))
            ops.linear(x.to(DEVICE), here(m), y)
            assert relative(y.cpu(), product(x, decode(m))) < SUMS
            alone = torch.empty(1, 70, device=DEVICE)
            ops.linear(x[1:2].to(DEVICE), here(m), alone)
            assert torch.equal(alone[0], y[1])
            results.append(y)
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[1], results[2]), "partial sums of other groups"

    @pytest.mark.parametrize("name", ["int8", "bf16"])
    def test_dense(self, name: str) -> None:
        m, x = dense(name, 70, 200), operand(3, 200)
        results = []
        for config in (Dense(4, 32, 1), Dense(16, 32, 4), Dense(16, 64, 4)):
            y, ops = torch.empty(3, 70, device=DEVICE), TritonOps(Configs(dense=config))
            ops.linear(x.to(DEVICE), here(m), y)
            assert relative(y.cpu(), product(x, decode(m))) < SUMS
            alone = torch.empty(1, 70, device=DEVICE)
            ops.linear(x[1:2].to(DEVICE), here(m), alone)
            assert torch.equal(alone[0], y[1])
            results.append(y)
        assert not torch.equal(results[1], results[2]), "sums of other columns"

    def test_matmul(self) -> None:
        m, x = matrix("int4", 70, 96, 32, 32), operand(40, 96)
        for config in (Matmul(16, 64, 4, 1), Matmul(64, 256, 8, 4)):
            y = cuda_prompt.linear_many(x.to(DEVICE), here(m), config=config).cpu()
            assert relative(y, product(x, decode(m))) < SUMS

    def test_attention(self) -> None:
        q, cache = random(40, 2, 32).half(), random(2, 1, 50, 32).half()
        want = attention(q, *cache, torch.arange(10, 50), None).numpy()
        for config in (Attention(16, 16, 1, 1), Attention(64, 32, 2, 2)):
            got = cuda_prompt.attend_many(q.to(DEVICE), *cache.to(DEVICE), config=config).cpu()
            assert relative(got, want) < 2e-3

    def test_fp32_attention_is_always_cut_alike(self) -> None:
        q, cache = random(20, 2, 32).to(DEVICE), random(2, 1, 20, 32).to(DEVICE)
        assert torch.equal(cuda_prompt.attend_many(q, *cache, config=replace(WIDE, positions=16)),
                           cuda_prompt.attend_many(q, *cache))

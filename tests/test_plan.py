"""The plan's integers, on Mixtral 8x7B's own shape."""

from __future__ import annotations

import pytest

from qmix.config import ModelConfig, QuantConfig
from qmix.errors import DoesNotFit
from qmix.offload.plan import choose_context, plan_resident
from qmix.sizes import GIB, format_bytes, kv_bytes_per_token, record_layout

MIXTRAL = ModelConfig(32000, 4096, 14336, 32, 32, 8, 128, 8, 2, 1e6, 1e-5, 32768)


def test_mixtral_known_sizes() -> None:
    assert record_layout(MIXTRAL, QuantConfig()).nbytes == 99_090_432
    assert kv_bytes_per_token(MIXTRAL) == 128 * 1024
    assert choose_context(MIXTRAL, 0) == 8192
    assert choose_context(MIXTRAL, 100) == 100


def test_fits_or_says_the_shortfall() -> None:
    plan = plan_resident(MIXTRAL, QuantConfig(), 8192, 32 * GIB)
    assert plan.experts == 256 * 99_090_432
    assert plan.kv == GIB
    assert plan.total == plan.experts + plan.dense + plan.kv + plan.workspace + plan.reserve
    with pytest.raises(DoesNotFit) as error:
        plan_resident(MIXTRAL, QuantConfig(), 8192, 16 * GIB)
    assert error.value.exit_code == 3
    smaller = plan_resident(MIXTRAL, QuantConfig(), 8192, 32 * GIB).total - 32 * GIB // 50 + 16 * GIB // 50
    assert f"short of {format_bytes(smaller - 16 * GIB)}" in error.value.message

"""README's table of what to expect and docs/models.md are what benchmarks/ write, and a GPU helps."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import expect  # noqa: E402
import models_table  # noqa: E402

from qmix.models import ARCHITECTURES  # noqa: E402


def test_the_table_in_readme_is_what_plan_forecasts() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.partition(expect.BEGIN)[2].partition(expect.END)[0] == expect.table()


def test_a_card_is_faster_than_the_same_pc_without_one() -> None:
    alone = {(pc.ram, pc.ram_speed): expect.forecast(pc)["tokens_per_second"] for pc in expect.PCS if pc.card is None}
    with_card = [pc for pc in expect.PCS if pc.card is not None]
    assert with_card
    for pc in with_card:
        assert expect.forecast(pc)["tokens_per_second"][0] > alone[pc.ram, pc.ram_speed][1]


def test_the_page_of_models_is_what_is_forecast() -> None:
    page = models_table.page()
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == page
    for kind in ARCHITECTURES:
        assert f"`{kind.removesuffix('_text')}`" in page, kind  # a text model's own layout is the same model

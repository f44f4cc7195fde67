"""docs/grafana.json: each metric that it asks for is one that a server tells, with the labels that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import serving

import qmix
from qmix.demo import demo_store

DASHBOARD = json.loads((Path(__file__).parents[1] / "docs" / "grafana.json").read_text())
METRIC = re.compile(r"\bqmix_\w+")


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, set[str]]]:
    """{metric: {label: its values}} of a server that has answered once."""
    store = demo_store(tmp_path_factory.mktemp("demo") / "demo", lambda line: None)
    with serving(lambda: qmix.load(store, threads=1)) as running:
        httpx.post(running.url + "/v1/chat/completions", timeout=60, json={
            "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}).raise_for_status()
        running.idle()
        text = httpx.get(running.url + "/metrics").text
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def test_each_metric_of_the_dashboard_is_told(samples: dict[str, Any]) -> None:
    asked = {name for text in [json.dumps(DASHBOARD["templating"]), *expressions()] for name in METRIC.findall(text)}
    assert len(asked) > 10 and asked - set(samples) == set()


def test_labels_and_their_values_are_there(samples: dict[str, Any]) -> None:
    for text in expressions():
        for name, selector in re.findall(r"(qmix_\w+)\{([^}]*)\}", text):
            for label, value in re.findall(r'(\w+)="([^"$]+)"', selector):
                assert value in samples[name][label], (name, label, value)
        for labels in re.findall(r"sum by \(([^)]*)\)", text):
            (name,) = set(METRIC.findall(text[text.index(f"({labels})"):])) or {""}
            assert set(labels.split(", ")) <= set(samples[name]), (name, labels)


def test_the_dashboard_can_be_imported() -> None:
    assert DASHBOARD["uid"] == "qmix" and DASHBOARD["__inputs"][0]["name"] == "DS_PROMETHEUS"
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    places = [[panel["gridPos"][k] for k in "xywh"] for panel in DASHBOARD["panels"]]
    cells = [(i, j) for x, y, w, h in places for i in range(x, x + w) for j in range(y, y + h)]
    assert len(set(cells)) == len(cells) and max(i for i, _ in cells) < 24, "panels lie on each other"
    assert all(panel["datasource"]["uid"] == "${DS_PROMETHEUS}" for panel in DASHBOARD["panels"])

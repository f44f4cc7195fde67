"""Prometheus figures, named as vLLM's are, with the prefix `qmix_`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qmix.serve.events import Began, Ended, Event, Failed, Piece
from qmix.serve.figures import Figures

FIRST_TOKEN = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)  # seconds
BETWEEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
WHOLE = (0.3, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Of one server. model: its name. figures: of the engine and the queue, read at each scrape."""

    def __init__(self, model: str, figures: Callable[[], Figures]):
        self._registry = CollectorRegistry()
        labels = ["model_name"]

        def counter(name: str, text: str) -> Counter:
            return Counter(f"qmix_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"qmix_{name}", text, labels, registry=self._registry, buckets=buckets)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.").labels(model)
        self.cached_tokens = counter("prompt_tokens_cached", "Tokens of prompts that were in a KV cache.").labels(model)
        self.generated_tokens = counter("generation_tokens", "Tokens generated.").labels(model)
        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token.",
                                     FIRST_TOKEN).labels(model)
        self.between = histogram("inter_token_latency_seconds", "Between two tokens of an answer.",
                                 BETWEEN).labels(model)
        self.whole = histogram("e2e_request_latency_seconds", "From the request to its end.", WHOLE).labels(model)
        self._success = Counter("qmix_request_success", "Answers that ended, by why.",
                                [*labels, "finished_reason"], registry=self._registry)
        self._failures = counter("request_failure", "Requests that failed while they were computed.").labels(model)
        self._model = model
        self._registry.register(_Engine(model, figures))

    def watch(self, arrived: float, clock: Callable[[], float]) -> Callable[[Event], None]:
        """Takes the events of one request that came at `arrived`."""
        last: float | None = None  # when text came, if the answer has any yet

        def see(event: Event) -> None:
            nonlocal last
            if isinstance(event, Began):
                self.prompt_tokens.inc(event.prompt_tokens)
                self.cached_tokens.inc(event.cached_tokens)
                if event.choice == 0:
                    self.first_token.observe(clock() - arrived)
                last = None
            elif isinstance(event, Piece):
                now = clock()
                if last is not None:
                    self.between.observe(now - last)
                last = now
            elif isinstance(event, Ended):
                self.generated_tokens.inc(event.timings.generated_tokens)
                self._success.labels(self._model, {"calls": "stop", "cancelled": "abort"}.get(
                    event.reason, event.reason)).inc()
            elif isinstance(event, Failed):
                self._failures.inc()
            else:
                self.whole.observe(clock() - arrived)
        return see

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine:
    """What is read when somebody asks."""

    def __init__(self, model: str, figures: Callable[[], Figures]):
        self._model = model
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        found = self._figures()
        yield self._gauge("num_requests_running", "Requests that are computed.", found.running)
        yield self._gauge("num_requests_waiting", "Requests that wait.", found.waiting)
        if found.engine:
            yield from self._experts(found.engine["offload"])
            yield from self._memory(found.engine["memory"])

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"qmix_{name}", text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _experts(self, offload: Mapping[str, Any]) -> Iterator[Metric]:
        requests = CounterMetricFamily("qmix_expert_requests", "Experts that passes needed, by where they were.",
                                       labels=["model_name", "phase", "tier"])
        moved = CounterMetricFamily("qmix_moved_bytes", "Bytes that were moved, by from where to where.",
                                    labels=["model_name", "phase", "path"])
        for phase in ("prefill", "decode"):
            one = offload[phase]
            for tier, count in (("fast", one["hits"] - one["prefetched"]), ("prefetched", one["prefetched"]),
                                ("below", one["below"]), ("disk", one["chosen"] - one["hits"] - one["below"])):
                requests.add_metric([self._model, phase, tier], count)
            for path, name in (("disk_to_ram", "bytes_read"), ("ram_to_device", "bytes_up"),
                               ("device_to_ram", "bytes_down")):
                moved.add_metric([self._model, phase, path], one[name])
        yield requests
        yield moved
        prefetch = CounterMetricFamily("qmix_prefetch", "Experts that were read ahead, by what became of them.",
                                       labels=["model_name", "result"])
        for name, value in offload["prefetcher"].items():
            if isinstance(value, int) and not name.endswith("bytes"):
                prefetch.add_metric([self._model, name], value)
        yield prefetch

    def _memory(self, memory: Mapping[str, Any]) -> Iterator[Metric]:
        family = GaugeMetricFamily("qmix_memory_bytes", "Memory of the process against its budget.",
                                   labels=["model_name", "kind"])
        for name, value in memory.items():
            if value is not None:
                family.add_metric([self._model, name], value)
        yield family

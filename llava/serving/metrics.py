"""Prometheus metrics. What vLLM measures too bears vLLM's name, so that its dashboards show it; the rest is ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .request import Report
from .scheduler import Load

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


class Metrics:
    """Counts what one server did.

    Args:
        model: the served name, a label of every series.
        load: asked at every scrape.
    """

    def __init__(self, model: str, load: Callable[[], Load]) -> None:
        self._registry = registry = CollectorRegistry()
        self._model = model
        registry.register(_LoadCollector(model, load))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float] = _SECONDS) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=tuple(buckets), registry=registry)

        self._prompt = counter("vllm:prompt_tokens", "Rows of prompts, pictures in place")
        self._generated = counter("vllm:generation_tokens", "Tokens generated")
        self._success = counter("vllm:request_success", "Answers by what ended them", "finished_reason")
        self._first = histogram("vllm:time_to_first_token_seconds", "From submission to the first token")
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of an answer", _BETWEEN)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From submission to the last token")
        self._queue = histogram("vllm:request_queue_time_seconds", "From submission to the prefill")
        self._visual = counter("visipruner:visual_tokens", "Visual tokens of prompts")
        self._kept = counter("visipruner:kept_visual_tokens", "Visual tokens left after selection")
        self._saved = Histogram(
            "visipruner:prefill_flops_saved_ratio",
            "Fraction of the dense prefill's executed FLOPs that was saved",
            ["model_name"],
            buckets=[tenth / 10 for tenth in range(1, 11)],
            registry=registry,
        )
        self._errors = counter("visipruner:request_errors", "Requests that ended by an error", "status")

    def done(self, report: Report, finishes: Iterable[str], times: Iterable[Iterable[float]]) -> None:
        """A request was answered. `times`: when each answer's tokens came, in seconds."""
        name = self._model
        self._prompt.labels(name).inc(report.prompt_rows)
        self._generated.labels(name).inc(report.new_tokens)
        self._visual.labels(name).inc(report.visual_tokens)
        self._kept.labels(name).inc(report.kept_visual_tokens)
        self._first.labels(name).observe(report.first_token_seconds)
        self._whole.labels(name).observe(report.seconds)
        self._queue.labels(name).observe(report.queue_seconds)
        self._saved.labels(name).observe(report.flops_saved.get("executed", 0.0))
        for finish in finishes:
            self._success.labels(name, finish).inc()
        between = self._between.labels(name)
        for own in times:
            for earlier, later in pairwise(own):
                between.observe(later - earlier)

    def failed(self, status: int) -> None:
        """A request ended by an error."""
        self._errors.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _LoadCollector(Collector):
    def __init__(self, model: str, load: Callable[[], Load]) -> None:
        self._model, self._load = model, load

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        for name, text, value in (
            ("vllm:num_requests_running", "Answers that are being written", load.running),
            ("vllm:num_requests_waiting", "Requests before their prefill", load.waiting),
            (
                "vllm:kv_cache_usage_perc",
                "Share of the memory for keys and values that is in use, 0 to 1",
                load.kv_used_bytes / load.kv_budget_bytes,
            ),
            (
                "visipruner:kv_used_bytes",
                "Keys and values of running answers, tokens to come included",
                load.kv_used_bytes,
            ),
            ("visipruner:kv_held_bytes", "Memory allocated for them", load.kv_held_bytes),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge

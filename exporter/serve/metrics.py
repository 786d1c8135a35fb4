"""What /metrics tells, by vLLM's suffixes behind a prefix of our own, or behind vLLM's."""

from __future__ import annotations

import functools
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (16, 64, 256, 1_000, 4_000, 16_000, 64_000, 250_000)


class Metrics:
    """One server's. load: of the engine, (jobs in work, jobs that wait, share of the caches' slots that is filled)."""

    def __init__(self, prefix: str, model: str, load: Callable[[], tuple[int, int, float]]):
        self._registry, self._model, self._prefix = CollectorRegistry(), model, prefix
        where, named = self._registry, f"{prefix}:"

        def counter(name: str, text: str) -> Counter:
            return Counter(named + name, text, ("model_name",), registry=where)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(named + name, text, ("model_name",), buckets=buckets, registry=where)

        for at, (name, text) in enumerate(
            [
                ("num_requests_running", "Answers that are being read or written."),
                ("num_requests_waiting", "Answers that wait for a session."),
                ("kv_cache_usage_perc", "Share of the slots of all sessions' caches that running answers fill."),
            ]
        ):
            gauge = Gauge(named + name, text, ("model_name",), registry=where).labels(model)
            gauge.set_function(functools.partial(lambda at: float(load()[at]), at))
        labels = ("model_name", "finished_reason")
        self._success = Counter(named + "request_success", "Answers by how they ended.", labels, registry=where)
        self._refused = Counter(named + "request_refused", "Requests refused.", ("model_name", "status"), registry=where)
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens written.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts that were looked up in the caches.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts that the caches held.")
        self._first = histogram("time_to_first_token_seconds", "From a request to its first token.", _SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of an answer.", _BETWEEN)
        self._per_token = histogram("request_time_per_output_token_seconds", "Mean time of an answer's tokens after the first.", _BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "From a request to its end.", _SECONDS)
        self._queue = histogram("request_queue_time_seconds", "Waited for a session.", _SECONDS)
        self._prefill = histogram("request_prefill_time_seconds", "Reading of the prompt.", _SECONDS)
        self._decode = histogram("request_decode_time_seconds", "Writing of the answer.", _SECONDS)
        self._prompts = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answers = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)

    def snapshots(self, counts: Callable[[], dict[str, int]]) -> None:
        """Of a `kiln.SnapshotStore`."""
        for name in ("device_bytes", "host_bytes", "kept", "hits", "misses", "evicted", "moved", "refused"):
            gauge = Gauge(f"{self._prefix}:snapshot_{name}", f"Snapshots of prompts: {name}.", ("model_name",), registry=self._registry)
            gauge.labels(self._model).set_function(functools.partial(lambda key: float(counts()[key]), name))

    def between(self, seconds: float) -> None:
        self._between.labels(self._model).observe(seconds)

    def refused(self, status: int) -> None:
        self._refused.labels(self._model, str(status)).inc()

    def ended(
        self, why: str, prompt: int, cached: int, new: int, queued: float, started: float, read: float, first: float, end: float
    ) -> None:
        """One answer. Times are of one clock, 0 where something never happened."""
        at = self._model
        self._success.labels(at, why).inc()
        self._prompt.labels(at).inc(prompt)
        self._generated.labels(at).inc(new)
        self._prompts.labels(at).observe(prompt)
        self._answers.labels(at).observe(new)
        self._whole.labels(at).observe(end - queued)
        self._queue.labels(at).observe((started or end) - queued)
        if read:
            self._queries.labels(at).inc(prompt)
            self._hits.labels(at).inc(cached)
            self._prefill.labels(at).observe(read - started)
            self._decode.labels(at).observe(end - read)
        if first:
            self._first.labels(at).observe(first - queued)
        if new > 1:
            self._per_token.labels(at).observe((end - first) / (new - 1))

    def text(self) -> bytes:
        return generate_latest(self._registry)

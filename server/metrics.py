"""Prometheus metrics: what a request waited for, how fast it was, and how full the engine is.

Names begin with `r1_`. Nothing of a prompt or a reply is in them but counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..backends.base import Token
from ..backends.engine import Engine
from .replicas import Replicas
from .upstream_pool import Upstreams

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"r1_{name}", words, ["model"], buckets=buckets, registry=self._registry)

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"r1_{name}", words, ["model", *labels], registry=self._registry)

        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token", _SECONDS)
        self.first_answer = histogram(
            "time_to_first_answer_token_seconds", "From the request to the first token after the thoughts", _SECONDS
        )
        self.between = histogram("inter_token_latency_seconds", "Between two tokens of a reply", _TOKEN_SECONDS)
        self.queue = histogram("request_queue_time_seconds", "From the request to the start of its prefill", _SECONDS)
        self.prefill = histogram("request_prefill_time_seconds", "From there to the first token", _SECONDS)
        self.whole = histogram("e2e_request_latency_seconds", "From the request to the end of its reply", _SECONDS)
        self.prompt = histogram("request_prompt_tokens", "Tokens in a prompt", _TOKENS)
        self.reply = histogram("request_generation_tokens", "Tokens in a reply, thoughts included", _TOKENS)
        self.thoughts = histogram("request_thinking_tokens", "Tokens in the thoughts of a reply", _TOKENS)
        self.answers = histogram("request_answer_tokens", "Tokens in the answer of a reply", _TOKENS)
        self.prompt_total = counter("prompt_tokens", "Prompt tokens")
        self.cached_total = counter("cached_prompt_tokens", "Prompt tokens found in the KV cache")
        self.reply_total = counter("generation_tokens", "Generated tokens")
        self.finished = counter("request_success", "Replies that came to an end", "finished_reason")
        self.closed = counter("thinking_closed", "Thoughts that came to an end, by what ended them", "by")
        self.cancelled = counter("cancelled", "Requests that were given up", "reason")
        self.refused = counter("refused", "Requests that were answered with an error", "status")

    def serve(self, model: str, engine: Engine | Replicas) -> None:
        """Show how busy this engine is whenever somebody asks."""
        self._registry.register(_EngineGauges(model, engine))

    def serve_cluster(self, model: str, cluster: Cluster) -> None:
        """Show how the ranks of a cluster are whenever somebody asks."""
        self._registry.register(_ClusterGauges(model, cluster))

    def serve_upstreams(self, model: str, upstreams: Upstreams) -> None:
        """Show how upstreams are whenever somebody asks."""
        self._registry.register(_UpstreamGauges(model, upstreams))

    def watch(self, model: str, replies: int, prompt_tokens: int | None) -> Watch:
        """Follow one request from now on. A prompt that nobody has counted yet is told by `Watch.prompt`."""
        watch = Watch(self, model, replies)
        if prompt_tokens is not None:
            watch.prompt(prompt_tokens)
        return watch

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class Watch:
    """One request's figures."""

    def __init__(self, metrics: Metrics, model: str, replies: int) -> None:
        self._metrics = metrics
        self._model = model
        self._began = time.monotonic()
        self._running = replies
        self._last: dict[str, float] = {}  # reply id -> when its last token came
        self._tokens: dict[str, int] = {}
        self._answering: set[str] = set()
        self._lost: str | None = None
        self._between = metrics.between.labels(model)

    def token(self, token: Token) -> None:
        """Count one token."""
        now = time.monotonic()
        metrics, model, reply = self._metrics, self._model, token.request_id
        last = self._last.get(reply)
        if last is not None:
            self._between.observe(now - last)
        self._last[reply] = now
        self._tokens[reply] = self._tokens.get(reply, 0) + 1
        if token.started:
            metrics.first_token.labels(model).observe(now - self._began)
            metrics.queue.labels(model).observe(token.started.queue_s)
            metrics.prefill.labels(model).observe(token.started.prefill_s)
            metrics.cached_total.labels(model).inc(token.started.cached_tokens)
        if token.note.channel == "answer" and reply not in self._answering:
            self._answering.add(reply)
            metrics.first_answer.labels(model).observe(now - self._began)
        if token.finish:
            self._finish(token, now)

    def prompt(self, tokens: int, cached_tokens: int = 0) -> None:
        """Count the prompt, and what of it was in a cache."""
        self._metrics.prompt.labels(self._model).observe(tokens)
        self._metrics.prompt_total.labels(self._model).inc(tokens)
        self._metrics.cached_total.labels(self._model).inc(cached_tokens)

    def lost(self, error: BaseException) -> None:
        """Note why a request ends early."""
        gone = isinstance(error, (GeneratorExit, asyncio.CancelledError))
        self._lost = "disconnect" if gone else "engine_failed"

    def close(self) -> None:
        """Count what was given up."""
        if self._running and self._lost:
            self._metrics.cancelled.labels(self._model, self._lost).inc(self._running)
        self._metrics.reply_total.labels(self._model).inc(sum(self._tokens.values()))

    def _finish(self, token: Token, now: float) -> None:
        metrics, model = self._metrics, self._model
        self._running -= 1
        count = self._tokens[token.request_id]
        metrics.whole.labels(model).observe(now - self._began)
        metrics.reply.labels(model).observe(count)
        metrics.finished.labels(model, token.finish).inc()
        outcome = token.note.outcome
        metrics.thoughts.labels(model).observe(outcome.reasoning_tokens)
        metrics.answers.labels(model).observe(count - outcome.reasoning_tokens)
        if outcome.closed_by:
            metrics.closed.labels(model, outcome.closed_by).inc()


class _EngineGauges:
    """Reads the engine at the moment it is asked."""

    def __init__(self, model: str, engine: Engine | Replicas) -> None:
        self._model = model
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        load, activity = self._engine.load(), self._engine.activity
        for name, words, value in (
            ("requests_running", "Replies in progress", load.running),
            ("requests_waiting", "Replies that wait for a place", load.waiting),
            ("kv_cache_used_tokens", "Tokens in the KV cache, kept prefixes included", load.cache_used),
            ("kv_cache_size_tokens", "Tokens that the KV cache holds at most", load.cache_size),
            ("kv_cache_usage_ratio", "Share of the KV cache in use", load.cache_used / max(1, load.cache_size)),
            ("last_step_age_seconds", "Since the last step of the batch", time.monotonic() - activity.last_step_at),
        ):
            gauge = GaugeMetricFamily(f"r1_{name}", words, labels=["model"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, words, value in (
            ("engine_steps", "Steps of the batch", activity.steps),
            ("engine_step_seconds", "Time spent in steps", activity.step_s),
        ):
            total = CounterMetricFamily(f"r1_{name}", words, labels=["model"])
            total.add_metric([self._model], value)
            yield total


class Cluster(Protocol):
    """What is shown of a cluster."""

    def table(self) -> dict[str, Any]: ...  # noqa: D102


class _ClusterGauges:
    """Reads the cluster's table at the moment it is asked."""

    def __init__(self, model: str, cluster: Cluster) -> None:
        self._model = model
        self._cluster = cluster

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily(
            "r1_cluster_rank_up", "Whether a rank takes part in steps", labels=["model", "group", "rank", "host"]
        )
        labels = ["model", "group"]
        epoch = GaugeMetricFamily("r1_cluster_epoch", "Grows with every start of the ranks of a group", labels=labels)
        age = GaugeMetricFamily(
            "r1_cluster_last_step_age_seconds", "Since the last collective step of a group", labels=labels
        )
        for group in self._cluster.table()["groups"]:
            number = str(group["group"])
            epoch.add_metric([self._model, number], group["epoch"])
            if group["last_step_age_s"] is not None:
                age.add_metric([self._model, number], group["last_step_age_s"])
            for rank in group["ranks"]:
                up.add_metric([self._model, number, str(rank["rank"]), rank["host"]], rank["up"])
        yield from (up, epoch, age)


class _UpstreamGauges:
    """Asks the upstreams at the moment it is asked. An upstream's label is its host and port."""

    def __init__(self, model: str, upstreams: Upstreams) -> None:
        self._model = model
        self._upstreams = upstreams

    def collect(self) -> Iterable[Metric]:
        load = self._upstreams.load()
        for name, words, value in (
            ("requests_running", "Replies in progress", load.running),
            ("requests_waiting", "Replies that wait for a place", load.waiting),
        ):
            gauge = GaugeMetricFamily(f"r1_{name}", words, labels=["model"])
            gauge.add_metric([self._model], value)
            yield gauge
        up = GaugeMetricFamily("r1_upstream_up", "Whether an upstream answers", labels=["model", "upstream"])
        running = GaugeMetricFamily(
            "r1_upstream_requests_running", "Replies in progress, by upstream", labels=["model", "upstream"]
        )
        asked = CounterMetricFamily("r1_upstream_requests", "Replies asked for", labels=["model", "upstream"])
        failed = CounterMetricFamily("r1_upstream_failures", "Replies that failed", labels=["model", "upstream"])
        for member in self._upstreams.members:
            labels = [self._model, member.name]
            up.add_metric(labels, member.trouble is None)
            running.add_metric(labels, member.running)
            asked.add_metric(labels, member.replies)
            failed.add_metric(labels, member.failures)
        yield from (up, running, asked, failed)

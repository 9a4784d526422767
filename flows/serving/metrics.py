"""What the server tells Prometheus, ``GET /metrics``.

Counters are counted where things happen; gauges ask for their value when they are read. A server has a registry of its
own.
"""

import dataclasses
import time
import weakref
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.fetching import BankMemories, FetchStatistics

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

SIZES = (1, 2, 4, 8, 16, 32, 64)


class RequestMetrics:
    """What any server tells.

    Attributes:
        requests: requests answered, by route and status.
        request_seconds: from the first byte of a request to the last of its answer, by route.
    """

    def __init__(self) -> None:
        """Begins to count."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter("memory3_requests", "Requests answered.", ["route", "status"], registry=self._registry)
        self.request_seconds = self._make_histogram("memory3_request_seconds", "Whole requests.", ["route"])

    def _make_counter(self, name: str, description: str) -> Counter:
        return Counter(name, description, registry=self._registry)

    def _make_histogram(self, name: str, description: str, labels: list[str] | None = None) -> Histogram:
        return Histogram(name, description, labels or [], buckets=SECONDS, registry=self._registry)

    def add_gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Adds a number that is asked for when the metrics are read."""
        Gauge(name, description, registry=self._registry).set_function(read)

    def add_information(self, name: str, description: str, **labels: str) -> None:
        """Adds what does not change, as labels."""
        Gauge(name, description, list(labels), registry=self._registry).labels(**labels).set(1)

    def render(self) -> tuple[bytes, str]:
        """Returns all metrics as Prometheus reads them, and the type of that text."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class ServingMetrics(RequestMetrics):
    """What the server of a model tells beside that.

    Attributes:
        first_token_seconds: from the arrival of a prompt to its first token.
        prompt_tokens: tokens of prompts that were read.
        generated_tokens: tokens generated.
        batch_sizes: prompts of a batch when it begins.
        retrievals: queries asked for generations.
        memories: memories that were read, by where they came from.
        cancelled: prompts whose generation ended early, by why.
    """

    def __init__(self) -> None:
        """Begins to count."""
        super().__init__()
        self.first_token_seconds = self._make_histogram(
            "memory3_first_token_seconds", "From the arrival of a prompt to its first token."
        )
        self.prompt_tokens = self._make_counter("memory3_prompt_tokens", "Tokens of prompts that were read.")
        self.generated_tokens = self._make_counter("memory3_generated_tokens", "Tokens generated.")
        self.batch_sizes = Histogram(
            "memory3_batch_size", "Prompts of a batch when it begins.", buckets=SIZES, registry=self._registry
        )
        self.retrievals = self._make_counter("memory3_retrievals", "Queries asked for generations.")
        self.memories = Counter(
            "memory3_memories", "Memories read, by where they came from.", ["origin"], registry=self._registry
        )
        self.cancelled = Counter(
            "memory3_cancelled", "Prompts whose generation ended early.", ["reason"], registry=self._registry
        )
        self._counted: weakref.WeakKeyDictionary[BankMemories, FetchStatistics] = weakref.WeakKeyDictionary()

    def count_memories(self, memories: BankMemories) -> None:
        """Counts what was fetched from a version since this was last called for it."""
        after = dataclasses.replace(memories.statistics)
        before = self._counted.get(memories, FetchStatistics())
        self._counted[memories] = after
        for origin in ("cached", "read", "encoded", "read_ahead"):
            field = f"num_{origin}"
            self.memories.labels(origin).inc(getattr(after, field) - getattr(before, field))


class MetricsMiddleware:
    """Counts requests by route and status, and measures them; stands before everything else."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        """Stands before an application."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands the request on, and notes how it was answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), ""

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, note_status)
            status = status or "gone"
        finally:
            # The pattern, not the path: what clients may choose would make metrics without end.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status or "500").inc()
            self._metrics.request_seconds.labels(route).observe(time.monotonic() - started)

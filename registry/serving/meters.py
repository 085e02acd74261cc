"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
PICTURES = (1, 2, 4, 8, 16, 32, 64)


class Meters:
    """The server's own meters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "dfu_requests", "Requests for pictures, by HTTP status.", ["status"], registry=self.registry
        )
        self.request_s = Histogram(
            "dfu_request_seconds", "Requests that were answered with pictures.", registry=self.registry, buckets=SECONDS
        )
        self.batch_s = Histogram("dfu_batch_seconds", "Time to draw a batch.", registry=self.registry, buckets=SECONDS)
        self.batch_pictures = Histogram(
            "dfu_batch_pictures", "Pictures in a batch.", registry=self.registry, buckets=PICTURES
        )
        self.stopped = Counter(
            "dfu_pictures_stopped", "Pictures given up while they were drawn.", registry=self.registry
        )
        self.loads = Counter(
            "dfu_model_loads", "Versions loaded after the first, by outcome.", ["outcome"], registry=self.registry
        )
        self.model = Gauge("dfu_model", "1 for the version that draws.", ["model"], registry=self.registry)
        self.waiting = Gauge("dfu_queue_pictures", "Pictures that wait.", registry=self.registry)

    def batch(self, pictures: int) -> AbstractContextManager[object]:
        """Times a batch and counts its pictures."""
        self.batch_pictures.observe(pictures)
        stack = ExitStack()
        stack.enter_context(self.batch_s.time())
        return stack

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Read the queue's length whenever the meters are read."""
        self.waiting.set_function(waiting)

    def show_model(self, name: str) -> None:
        """From now on `name` draws."""
        self.model.clear()
        self.model.labels(name).set(1)

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)

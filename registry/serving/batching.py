"""Pictures that many clients ask for -> batches of equal settings, drawn by the one thread that uses the model.

A picture's first noise comes from its own seed, so who else is in the batch changes nothing but the rounding of sums.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np
import torch

from dfu_mlflow.bundle_format import Settings
from registry.serving.meters import Meters
from registry.serving.versions import Served

log = logging.getLogger(__name__)

WAITED_SHARE = 0.1
"""Of a batch's time, spent at most on waiting for clients that are expected."""


class QueueFull(Exception):
    """No room for a request; `retry_after_s` says when there should be."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"{waiting} pictures are waiting already: ask again in {retry_after_s} s")


class Closed(Exception):
    """The server is ending."""


class DrawingFailed(Exception):
    """The model failed on a batch; the server's log says how."""


class _Abandoned(Exception):
    """Nobody waits for any picture of the batch any more."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """One picture asked for. Cancelling `picture` gives it up, also while it is being drawn.

    Attributes:
        served: the version that draws it, fixed when it was asked for: no answer mixes two versions.
        class_id: position in the version's classes.
        picture: uint8 [H, W, 3].
    """

    served: Served
    class_id: int
    seed: int
    settings: Settings
    picture: Future[np.ndarray] = field(default_factory=Future)

    @property
    def phase(self) -> str:
        """The class label."""
        return self.served.sampler.classes[self.class_id]

    def fits(self, other: Ticket) -> bool:
        """Whether both can be drawn in one batch."""
        return self.served is other.served and self.settings.fits(other.settings)


class Batcher:
    """The queue and the thread that empties it.

    Args:
        queue_length: pictures that may wait.
        window_s: longest wait for another picture of a batch.
        meters: told of batches and failures.
    """

    def __init__(self, queue_length: int, window_s: float, meters: Meters) -> None:
        self.queue_length = queue_length
        self.window_s = window_s
        self.meters = meters
        self._waiting: list[Ticket] = []
        self._changed = threading.Condition()
        self._closed = False
        self._asking = 1
        self._batch_s, self._picture_s = 0.0, 0.0
        self._thread = threading.Thread(target=self._work, name="draw", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread draws."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Pictures in the queue that somebody still waits for."""
        with self._changed:
            self._forget_abandoned()
            return len(self._waiting)

    def start(self) -> None:
        """Begin to draw."""
        self._thread.start()

    def close(self) -> None:
        """Draw nothing more, also no further step; who waits is told so."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue all pictures of a request, or none.

        Raises:
            QueueFull: when they do not fit.
            Closed: when the server is ending.
        """
        with self._changed:
            if self._closed:
                raise Closed("the server is ending")
            self._forget_abandoned()
            if len(self._waiting) + len(tickets) > self.queue_length:
                wait_s = math.ceil(self._picture_s * len(self._waiting))
                raise QueueFull(len(self._waiting), max(1, wait_s))
            self._waiting += tickets
            self._changed.notify_all()

    def _work(self) -> None:
        while batch := self._take():
            start_s = time.perf_counter()
            self._draw(batch)
            self._batch_s = time.perf_counter() - start_s
            self._picture_s = self._batch_s / len(batch)
            with self._changed:
                self._forget_abandoned()
                self._asking = len(batch) + len(self._waiting)

    def _take(self) -> list[Ticket]:
        """The next batch, by the order of asking; empty when closed."""
        with self._changed:
            batch: list[Ticket] = []
            while not batch and not self._closed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._wait_for_the_rest()
                self._forget_abandoned()
                batch = self._first_batch()
            if self._closed:
                for ticket in [*batch, *self._waiting]:
                    _fail(ticket, Closed("the server is ending"))
                return []
            taken = set(map(id, batch))
            self._waiting = [ticket for ticket in self._waiting if id(ticket) not in taken]
            return batch

    def _wait_for_the_rest(self) -> None:
        """Clients that were just answered ask again within milliseconds: wait for as many as asked last time.

        The wait ends where nobody came within the window, or a tenth of the last batch's time is lost: answering 8
        clients takes longer than one window, and each that misses the batch waits for the next one.
        """
        if not self._waiting:
            return
        expected = min(self._asking, self._waiting[0].served.sampler.batch_size)
        end_s = time.perf_counter() + max(self.window_s, WAITED_SHARE * self._batch_s)
        while len(self._waiting) < expected and not self._closed:
            patience_s = min(self.window_s, end_s - time.perf_counter())
            if patience_s <= 0 or not self._changed.wait(patience_s):
                return

    def _first_batch(self) -> list[Ticket]:
        if not self._waiting:
            return []
        first = self._waiting[0]
        return [ticket for ticket in self._waiting if ticket.fits(first)][: first.served.sampler.batch_size]

    def _forget_abandoned(self) -> None:
        self._waiting = [ticket for ticket in self._waiting if not ticket.picture.cancelled()]

    def _draw(self, batch: list[Ticket]) -> None:
        def stop_if_useless() -> None:
            if self._closed:
                raise Closed("the server is ending")
            if all(ticket.picture.cancelled() for ticket in batch):
                raise _Abandoned

        first = batch[0]
        ids = torch.tensor([ticket.class_id for ticket in batch])
        seeds = [ticket.seed for ticket in batch]
        scales = [ticket.settings.guidance_scale for ticket in batch]
        try:
            with self.meters.batch(len(batch)):
                images = first.served.sampler.generate(
                    ids, seeds, first.settings, between_steps=stop_if_useless, guidance_scales=scales
                )
        except _Abandoned:
            self.meters.stopped.inc(len(batch))
            return
        except Closed as error:
            for ticket in batch:
                _fail(ticket, error)
            return
        except Exception:  # whatever it was, the next batch may work
            log.exception("a batch of %d pictures failed", len(batch))
            for ticket in batch:
                _fail(ticket, DrawingFailed("the model failed on this request; the server's log says how"))
            return
        for ticket, image in zip(batch, images, strict=True):
            _settle(ticket, image)


def _settle(ticket: Ticket, image: np.ndarray) -> None:
    try:
        ticket.picture.set_result(image)
    except InvalidStateError:  # given up in this moment
        return


def _fail(ticket: Ticket, error: Exception) -> None:
    try:
        ticket.picture.set_exception(error)
    except InvalidStateError:
        return

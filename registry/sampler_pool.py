"""One sampler on several devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Self

import numpy as np
import torch

from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.sampling import Sampler

Batch = tuple[Sequence[str], Sequence[int]]
"""Labels and seeds."""


class SamplerPool:
    """Draws batches side by side, one a device, and hands them out in the order they came in.

    Args:
        samplers: the same one on each device.
    """

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        self.samplers = tuple(samplers)

    @classmethod
    def load(cls, bundle: Path, devices: Sequence[torch.device]) -> Self:
        """Open a bundle once for each device.

        Raises:
            UserError: as `Sampler.load`.
        """
        return cls([Sampler.load(bundle, str(device)) for device in devices])

    @property
    def first(self) -> Sampler:
        """For what is the same on all of them."""
        return self.samplers[0]

    def set_batch_size(self, batch_size: int) -> None:
        """Pictures that each device draws at a time, where its memory is large enough."""
        for sampler in self.samplers:
            sampler.batch_size = batch_size

    def compile(self) -> None:
        """`Sampler.compile` on each device."""
        for sampler in self.samplers:
            sampler.compile()

    def draw(self, batches: Iterable[Batch], settings: Settings) -> Iterator[np.ndarray]:
        """Pictures uint8 [N, H, W, 3] of each batch; a batch is taken up when a device is about to be free for it."""
        asked = settings.guidance_scale, settings.num_inference_steps
        if len(self.samplers) == 1:
            yield from (self.first.draw(*batch, *asked) for batch in batches)
            return
        free: SimpleQueue[Sampler] = SimpleQueue()
        for sampler in self.samplers:
            free.put(sampler)

        def work(labels: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
            sampler = free.get()
            try:
                return sampler.draw(labels, seeds, *asked)
            finally:
                free.put(sampler)

        queued: deque[Future[np.ndarray]] = deque()
        with ThreadPoolExecutor(len(self.samplers), "draw") as threads:
            try:
                for batch in batches:
                    queued.append(threads.submit(work, *batch))
                    if len(queued) > len(self.samplers):
                        yield queued.popleft().result()
                while queued:
                    yield queued.popleft().result()
            finally:
                for future in queued:
                    future.cancel()

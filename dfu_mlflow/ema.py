"""Exponential moving average of the trained weights: float32, matched by name, stepped once an optimizer update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class ExponentialMovingAverage:
    """Keeps `average` beside the live weights.

    Args:
        weights: what learns, by name.
        decay: largest decay.
        warmup: let the decay grow as (1 + n) / (10 + n) after n updates (the ramp of TensorFlow's
            ExponentialMovingAverage, as diffusers' EMAModel has it), so that the start is forgotten at once.
        place: where the average is kept; None is beside each weight.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], decay: float, warmup: bool, place: torch.device | None = None
    ) -> None:
        self.decay = decay
        self.warmup = warmup
        self.place = place
        self.updates = 0
        self.average = {
            name: weight.detach().to(place or weight.device, torch.float32, copy=True)
            for name, weight in weights.items()
        }

    def current_decay(self) -> float:
        """Decay that the next update uses."""
        ramp = (1 + self.updates) / (10 + self.updates)
        return min(self.decay, ramp) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, weights: Mapping[str, nn.Parameter]) -> None:
        """average <- decay * average + (1 - decay) * live.

        Raises:
            ValueError: when the names are not the ones the average was made from.
        """
        self._check_names(weights)
        share = 1.0 - self.current_decay()
        if self.place is None:
            live = [weights[name].detach().to(average) for name, average in self.average.items()]
            torch._foreach_lerp_(list(self.average.values()), live, share)
        else:  # one weight at a time: all of them together would take the host's memory a second time
            for name, average in self.average.items():
                average.lerp_(weights[name].detach().to(average), share)
        self.updates += 1

    @contextmanager
    def applied(self, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """The live weights hold the average inside this block, and exactly their own values after it.

        The two change places, one weight at a time: a third set of SDXL's weights takes 9.6 GiB.
        """
        self._check_names(weights)
        self._exchange(weights)
        try:
            yield
        finally:
            self._exchange(weights)

    @torch.no_grad()
    def _exchange(self, weights: Mapping[str, nn.Parameter]) -> None:
        for name, average in self.average.items():
            live = weights[name].detach().to(average.device, average.dtype, copy=True)
            weights[name].copy_(average)
            average.copy_(live)

    def load(self, average: Mapping[str, torch.Tensor], updates: int) -> None:
        """Continue from a checkpoint."""
        self._check_names(average)
        for name, value in self.average.items():
            value.copy_(average[name])
        self.updates = updates

    def _check_names(self, weights: Mapping[str, object]) -> None:
        if weights.keys() != self.average.keys():
            odd = sorted(weights.keys() ^ self.average.keys())
            raise ValueError(f"EMA holds other weights than the model: {odd[:3]} ({len(odd)} names differ)")


@torch.no_grad()
def copy_into(weights: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Copy values into weights by name, on the weights' own device and dtype.

    Raises:
        RuntimeError: for a value of another shape: `copy_` would repeat a small one over the whole weight.
    """
    for name, weight in weights.items():
        if values[name].shape != weight.shape:
            raise RuntimeError(f"{name} is {tuple(values[name].shape)}, not {tuple(weight.shape)}")
        weight.copy_(values[name])

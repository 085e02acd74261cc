"""The optimizer's step inside the backward pass: one optimizer a weight, whose gradient is freed at once.

Of all gradients only the largest weight's exists at a time. Source: PyTorch's tutorial "How to save memory by fusing
the optimizer step into the backward pass"; torchtune calls it `optimizer_in_bwd`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dfu_mlflow.config.schema import TrainConfig
from dfu_mlflow.optimizers import build_optimizer


class BackwardOptimizer:
    """Steps each weight as soon as its gradient is whole, in backward passes inside `updating`.

    Its state dictionary is that of the same optimizer over all weights, so that checkpoints serve both.

    Args:
        weights: what learns, in order.
        config: which optimizer.

    Raises:
        UserError: as `build_optimizer`.
    """

    def __init__(self, weights: Iterable[nn.Parameter], config: TrainConfig) -> None:
        self.each: list[torch.optim.Optimizer] = []
        self._squares = 0.0
        self._updating = False
        for weight in weights:
            optimizer = build_optimizer([weight], config)
            weight.register_post_accumulate_grad_hook(partial(self._update, optimizer))
            self.each.append(optimizer)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Hyper-parameters of every weight."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    @property
    def gradient_norm(self) -> float:
        """Norm of the last backward pass's gradients, as far as they were looked at: not finite if one was not."""
        return math.sqrt(self._squares)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Backward passes inside step the weights; outside, gradients are left where they are."""
        self._squares, self._updating = 0.0, True
        try:
            yield
        finally:
            self._updating = False

    def refuse(self, loss: float) -> None:
        """A loss that is not finite takes the gradient's place: there was no backward pass."""
        self._squares = math.nan if math.isnan(loss) else math.inf

    def _update(self, optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> None:
        """Step one weight, unless its gradient or one before it in this pass is not finite.

        Asking costs a wait for the device at each weight; not asking would let one bad gradient ruin a weight for good.
        """
        if not self._updating:
            return
        assert weight.grad is not None
        self._squares += float(torch.linalg.vector_norm(weight.grad)) ** 2
        if math.isfinite(self._squares):
            optimizer.step()
        weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As torch's own, of one optimizer over all weights."""
        states = [optimizer.state_dict()["state"] for optimizer in self.each]
        return {
            "state": {index: state[0] for index, state in enumerate(states) if state},
            "param_groups": self.param_groups,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the states back; hyper-parameters stay as they are."""
        for index, optimizer in enumerate(self.each):
            state = state_dict["state"]
            kept = {0: state[index]} if index in state else {}
            optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})

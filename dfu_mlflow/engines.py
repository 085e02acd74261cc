"""What moves gradients in one process or under DDP. `zero` and `shards` have the same methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dfu_mlflow.base.adapters import Weights
from dfu_mlflow.checkpoint import Tensors, load_optimizer, optimizer_tensors
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.ema import copy_into
from dfu_mlflow.fused import BackwardOptimizer
from dfu_mlflow.runtime import release_memory


class Engine:
    """One process, or several that hold everything and average their gradients (DDP).

    Args:
        accelerator: device placement and precision.
        unet: the network.
        weights: what learns, by name.
        optimizer: over `weights`, in their order.
        config: the run's configuration.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        unet: nn.Module,
        weights: Weights,
        optimizer: torch.optim.Optimizer | BackwardOptimizer,
        config: RunConfig,
    ) -> None:
        self.accelerator = accelerator
        self.weights = weights
        self.train = config.train
        self._settle(unet)
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        if config.train.compile:
            self.unet = torch.compile(self.unet)  # evaluation calls the network itself, which stays as it is

    def _settle(self, unet: nn.Module) -> None:
        """What has to be said before the network is prepared."""

    @property
    def scaler(self) -> Any:
        """fp16's loss scaler, or None."""
        return self.accelerator.scaler

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision as configured."""
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients of backward passes inside stay in this process."""
        context: AbstractContextManager[None] = self.accelerator.no_sync(self.unet)
        return context

    def whole(self) -> AbstractContextManager[Mapping[str, nn.Parameter]]:
        """Inside the block the network holds whole weights: what learns, by name. Every rank enters it."""
        return nullcontext(self.weights)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate a micro-batch's gradient; `last` of the step."""
        self.accelerator.backward(loss / self.train.gradient_accumulation_steps)

    def update(self) -> float:
        """Clip and step; a non-finite gradient skips the step. Returns the gradient norm before clipping."""
        limit = math.inf if self.train.max_grad_norm is None else self.train.max_grad_norm
        norm = float(self.accelerator.clip_grad_norm_(self.weights.values(), limit))
        if math.isfinite(norm) or self.scaler is not None:  # fp16's scaler skips, and learns from it
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self, wanted: bool) -> Tensors:
        """The optimizer's state as a checkpoint holds it, in the computer's memory where it is wanted, else nothing.

        Every rank calls this.
        """
        return optimizer_tensors(self.optimizer) if wanted else {}

    def joined(self, parts: Mapping[str, torch.Tensor], wanted: bool) -> Tensors:
        """Whole tensors from what each rank holds of them, by weight; every rank calls this."""
        return {name: part.detach() for name, part in parts.items()} if wanted else {}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """What this rank holds of whole tensors, by weight."""
        return dict(tensors)

    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Put weights and the optimizer's state back."""
        copy_into(self.weights, weights)
        load_optimizer(self.optimizer, state)

    def release(self) -> None:
        """Training is over: the optimizer's state, with AdamW twice the weights, makes room for what comes next."""
        self.optimizer.state.clear()
        release_memory()


class FusedEngine(Engine):
    """One process that steps each weight inside the backward pass.

    A loss that is not finite leaves everything as it was. Where only a gradient is not, weights that the backward pass
    reached before it keep their step, which was a finite one; it and the ones after it stay as they were.
    """

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Backward pass and update in one."""
        value = float(loss.detach())
        if not math.isfinite(value):
            self.optimizer.refuse(value)
            return
        with self.optimizer.updating():
            self.accelerator.backward(loss)

    def update(self) -> float:
        """The step is done, and what it computed has arrived. Returns the gradient norm."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return float(self.optimizer.gradient_norm)

    def release(self) -> None:
        """Each weight's state."""
        for optimizer in self.optimizer.each:
            optimizer.state.clear()
        release_memory()

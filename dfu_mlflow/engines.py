"""What moves gradients: one process or DDP, DeepSpeed ZeRO-2, FSDP2. The trainer sees the same methods of each."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from dfu_mlflow.base.adapters import Weights
from dfu_mlflow.checkpoint import Tensors, load_optimizer, optimizer_tensors
from dfu_mlflow.config.schema import RunConfig, TrainConfig
from dfu_mlflow.ema import copy_into
from dfu_mlflow.errors import UserError
from dfu_mlflow.fused import BackwardOptimizer
from dfu_mlflow.ranks import uses_deepspeed, uses_fsdp
from dfu_mlflow.runtime import release_memory
from dfu_mlflow.shards import ShardEngine, plain_accelerator


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


class ZeroEngine(Engine):
    """DeepSpeed ZeRO-2: each rank keeps the optimizer's state of a part of the weights, and steps that part.

    Weights stay in float32 and mixed precision is autocast, as without DeepSpeed, so that results are the same.
    """

    KEYS = ("exp_avg", "exp_avg_sq")

    def _settle(self, unet: nn.Module) -> None:
        train, accelerator = self.train, self.accelerator
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = train.batch_size // accelerator.num_processes
        settings["gradient_accumulation_steps"] = train.gradient_accumulation_steps
        settings["gradient_clipping"] = train.max_grad_norm or 0.0
        settings["zero_force_ds_cpu_optimizer"] = False  # its own CPU Adam needs a C++ compiler; torch's is fused too
        accelerator.gradient_accumulation_steps = train.gradient_accumulation_steps
        self.half = train.mixed_precision == "bf16"
        if self.half:  # as accelerate does without DeepSpeed; evaluations call the network itself
            unet.forward = convert_outputs_to_fp32(self._autocast(accelerator)(unet.forward))

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer around ours."""
        return self.unet.optimizer

    def no_sync(self) -> AbstractContextManager[None]:
        """ZeRO-2 hands gradients on at each backward pass."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision of what stands around the network, which does its own."""
        context: AbstractContextManager[None] = self._autocast(self.accelerator) if self.half else nullcontext()
        return context

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """DeepSpeed divides by the accumulation steps itself."""
        self.unet.set_gradient_accumulation_boundary(is_boundary=last)
        self.unet.backward(loss)

    def update(self) -> float:
        """DeepSpeed clips and steps. With float32 weights it skips a non-finite gradient, whose norm is inf."""
        self.unet.step()
        return float(self.unet.get_global_grad_norm())

    def state(self, wanted: bool) -> Tensors:
        """The shares put together, which takes every rank, named as torch's own AdamW names them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states = list(self.zero.optimizer.state.values())
        if not states or "step" not in states[0]:
            return {}
        found: Tensors = {}
        for index, weight in enumerate(self.weights.values()):
            for key in self.KEYS:
                whole = safe_get_full_optimizer_state(weight, key)
                if wanted:
                    found[f"{index}.{key}"] = whole.detach().cpu().clone()
            if wanted:
                found[f"{index}.step"] = torch.as_tensor(states[0]["step"]).detach().cpu().clone()
        return found

    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Every rank takes its share."""
        from deepspeed.utils import safe_set_full_optimizer_state

        copy_into(self.weights, weights)
        self.zero.refresh_fp32_params()
        if not state:
            return
        for flat in self.zero.single_partition_of_fp32_groups:
            zeros = {key: torch.zeros_like(flat) for key in self.KEYS}
            self.zero.optimizer.state[flat] = {"step": state["0.step"].to(flat.device, copy=True), **zeros}
        self.zero._lazy_init_hp_params_optimizer_state()
        for index, weight in enumerate(self.weights.values()):
            for key in self.KEYS:
                safe_set_full_optimizer_state(weight, state[f"{index}.{key}"], key)

    def release(self) -> None:
        """DeepSpeed keeps its share to the end of the process."""

    @staticmethod
    def _autocast(accelerator: Accelerator) -> Any:
        return torch.autocast(accelerator.device.type, dtype=torch.bfloat16)


def check_launch(train: TrainConfig, processes: int = 1) -> None:
    """Refuse what the launcher asks for and no engine does the same way as one process.

    Raises:
        UserError: naming the launch that does it.
    """
    if uses_fsdp() and os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError("of FSDP only version 2 is supported: launch with fsdp2")
    if uses_deepspeed() and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") != "2":
        raise UserError("of DeepSpeed's stages only ZeRO-2 is supported: launch with fsdp2, ddp or zero2")
    shards = "zero2" if uses_deepspeed() else "fsdp2" if uses_fsdp() else ""
    if train.fused_backward and (processes > 1 or shards):
        raise UserError(
            f"--train.fused_backward steps before processes could average their gradients, and {processes} run: start "
            "it without a launcher, or set --train.fused_backward false"
        )
    if train.compile and shards:
        raise UserError(f"--train.compile is not tried with shards: --launch {shards} needs --train.compile false")
    if train.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--train.compile needs a C++ compiler: install g++, or name one in CXX")
    if shards and (train.optimizer != "adamw" or train.mixed_precision == "fp16"):
        raise UserError(
            f"--launch {shards} shards AdamW in float32 or bf16: --train.optimizer {train.optimizer} with "
            f"--train.mixed_precision {train.mixed_precision} needs --launch ddp"
        )


def build_accelerator(device: torch.device, mixed_precision: str) -> Accelerator:
    """accelerate as the launcher asks for it."""
    if uses_deepspeed():
        return Accelerator(mixed_precision="no")
    if uses_fsdp():
        return plain_accelerator(device)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)


def build_engine(
    accelerator: Accelerator,
    unet: nn.Module,
    weights: Weights,
    optimizer: torch.optim.Optimizer | BackwardOptimizer,
    config: RunConfig,
) -> Engine | ShardEngine:
    """The engine that the launcher asks for."""
    if isinstance(optimizer, BackwardOptimizer):
        return FusedEngine(accelerator, unet, weights, optimizer, config)
    kind = ZeroEngine if uses_deepspeed() else ShardEngine if uses_fsdp() else Engine
    return kind(accelerator, unet, weights, optimizer, config)

"""DeepSpeed: ZeRO-2 shares out the optimizer's state and the gradients, ZeRO-3 the weights as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.nn import functional
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dfu_mlflow.base.adapters import Weights
from dfu_mlflow.checkpoint import Tensors
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.ema import copy_into
from dfu_mlflow.engines import Engine
from dfu_mlflow.errors import UserError


class ZeroEngine(Engine):
    """DeepSpeed ZeRO-2: each rank keeps the optimizer's state of a part of the weights, and steps that part.

    Weights stay in float32 and mixed precision is autocast, as without DeepSpeed, so that results are the same.
    """

    KEYS = ("exp_avg", "exp_avg_sq")
    STAGE = 2

    def _settle(self, unet: nn.Module) -> None:
        train, accelerator = self.train, self.accelerator
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        if (stage := settings["zero_optimization"]["stage"]) != self.STAGE:  # of a file that the launcher was given
            raise UserError(
                f"DeepSpeed's configuration asks for stage {stage}, the launcher for {self.STAGE}: launch with zero2 "
                "or zero3, or state zero_stage beside deepspeed_config_file"
            )
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
        """Without autocast's cache: it would keep a bf16 copy of each weight up to the end of the forward pass."""
        return torch.autocast(accelerator.device.type, dtype=torch.bfloat16, cache_enabled=False)


class PartitionEngine(ZeroEngine):
    """DeepSpeed ZeRO-3: each rank keeps an equal part of every weight, whole only while a block computes.

    What learns, and its average, are each rank's parts: flat, the last one filled up with zeros.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        unet: nn.Module,
        weights: Weights,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
    ) -> None:
        self.all: dict[str, Any] = dict(unet.named_parameters())
        self.learning: dict[str, Any] = dict(weights)
        super().__init__(accelerator, unet, weights, optimizer, config)
        unset_hf_deepspeed_config()  # transformers would cut up whatever is loaded from now on, and wait for all ranks
        weights.update({name: nn.Parameter(weight.ds_tensor.detach()) for name, weight in self.learning.items()})

    STAGE = 3

    def _settle(self, unet: nn.Module) -> None:
        super()._settle(unet)
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        settings["stage3_param_persistence_threshold"] = 0  # small weights kept whole would not see the average

    @contextmanager
    def whole(self) -> Iterator[Mapping[str, nn.Parameter]]:
        """Inside the block every rank has all of every weight, and may call the network without the others.

        Gives what learns, by name.
        """
        from deepspeed.runtime.zero import GatheredParameters

        hooks = self.zero.parameter_offload
        hooks._remove_module_hooks()  # they would give the weights up again behind each layer
        hooks.forward_hooks, hooks.backward_hooks = [], []
        try:
            with GatheredParameters(list(self.all.values())):
                yield self.learning
        finally:
            hooks.setup_zero_stage3_hooks()

    def state(self, wanted: bool) -> Tensors:
        """The parts put together, which takes every rank, named as torch's own AdamW names them."""
        from deepspeed.utils import safe_get_local_optimizer_state

        states = list(self.zero.optimizer.state.values())
        if not states or "step" not in states[0]:
            return {}
        found: Tensors = {}
        for index, (name, weight) in enumerate(self.learning.items()):
            for key in self.KEYS:
                whole = self._gather(name, safe_get_local_optimizer_state(weight, key))
                if wanted:
                    found[f"{index}.{key}"] = whole.cpu()
            if wanted:
                found[f"{index}.step"] = torch.as_tensor(states[0]["step"]).detach().cpu().clone()
        return found

    def joined(self, parts: Mapping[str, torch.Tensor], wanted: bool) -> Tensors:
        """Whole tensors from each rank's parts of them, by weight; every rank calls this."""
        found = {}
        for name, part in parts.items():
            whole = self._gather(name, part)
            if wanted:
                found[name] = whole.cpu()
        return found

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """This rank's parts of whole tensors, by weight."""
        return {name: self._cut(name, tensor) for name, tensor in tensors.items()}

    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Every rank takes its parts of the weights and of the optimizer's state."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parts = self.parts(weights)
        copy_into(self.weights, parts)
        for name, weight in self.learning.items():
            safe_set_local_fp32_param(weight, parts[name])
        if not state:
            return
        for flat in self.zero.fp32_partitioned_groups_flat:
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in self.KEYS}
            self.zero.optimizer.state[flat] = {"step": state["0.step"].to(flat.device, copy=True), **zeros}
        for index, (name, weight) in enumerate(self.learning.items()):
            for key in self.KEYS:
                safe_set_local_optimizer_state(weight, self._cut(name, state[f"{index}.{key}"]), key)

    def _cut(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        size = self.learning[name].ds_tensor.numel()
        flat = functional.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
        return flat[size * dist.get_rank() :][:size].clone()

    def _gather(self, name: str, part: torch.Tensor) -> torch.Tensor:
        weight = self.learning[name]
        parts = [torch.empty_like(weight.ds_tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.detach().to(weight.ds_tensor))
        return torch.cat(parts)[: weight.ds_numel].reshape(weight.ds_shape)

"""FSDP2: each rank keeps its part of every weight, gradient and optimizer state; a block is whole while it computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32, patch_environment
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dfu_mlflow.base.adapters import Weights
from dfu_mlflow.checkpoint import Tensors, load_optimizer, optimizer_tensors
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.ema import copy_into
from dfu_mlflow.runtime import release_memory

BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
"""What is made whole at a time, as diffusers' `_no_split_modules` of the UNet; what is between them goes together."""


class Shards:
    """A network cut into equal parts, one a rank, along the first dimension of each weight.

    Args:
        unet: the network; its parameters become `DTensor`s.
        device: where the parts are.
    """

    def __init__(self, unet: nn.Module, device: torch.device) -> None:
        self.unet: Any = unet
        self.device = device
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.modules: list[Any] = [module for module in unet.modules() if isinstance(module, BLOCKS)]
        for module in self.modules:
            fully_shard(module, mesh=mesh)
        fully_shard(unet, mesh=mesh, reshard_after_forward=False)  # its backward pass begins where its forward one ends
        self.modules.append(unet)
        self.weights: dict[str, Any] = dict(unet.named_parameters())

    def own(self, name: str) -> torch.Tensor:
        """This rank's part of a weight: a plain tensor in the same memory."""
        part: torch.Tensor = self.weights[name].detach().to_local()
        return part

    def gradient(self, name: str) -> torch.Tensor | None:
        """This rank's part of a weight's gradient, averaged over the ranks; it is handed over, not kept."""
        found = self.weights[name].grad
        self.weights[name].grad = None
        return None if found is None else found.to_local()

    @staticmethod
    def cut(whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor, as FSDP2 cuts it; a part may be empty."""
        parts, rank = whole.chunk(dist.get_world_size()), dist.get_rank()
        return (parts[rank] if rank < len(parts) else whole[:0]).clone()

    def gather(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor that is cut as a weight is, from the part of every rank."""
        like = self.weights[name]
        joined = DTensor.from_local(
            part.detach().to(self.device),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return joined.full_tensor()

    @contextmanager
    def whole(self) -> Iterator[dict[str, nn.Parameter]]:
        """Inside the block every rank has all of every weight, and may call the network without the others.

        Gives what learns, by name.
        """
        self._keep(True)
        for module in self.modules:
            module.unshard()
        try:
            yield {name: weight for name, weight in self.unet.named_parameters() if weight.requires_grad}
        finally:
            for module in self.modules:
                module.reshard()
            self._keep(False)

    def _keep(self, whole: bool) -> None:
        self.unet.set_reshard_after_forward(not whole)
        self.unet.set_reshard_after_forward(False, recurse=False)
        self.unet.set_reshard_after_backward(not whole)


class ShardEngine:
    """FSDP2 as `engines.Engine` does without it.

    AdamW and the moving average work on each rank's plain parts. Weights stay in float32 and mixed precision is
    autocast, as without FSDP2, so that results are the same.

    Args:
        accelerator, unet, weights, optimizer, config: as `engines.Engine`. Weights and optimizer are given the parts
            in place of the whole weights, which would stay in memory else.
    """

    scaler = None

    def __init__(
        self,
        accelerator: Accelerator,
        unet: nn.Module,
        weights: Weights,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
    ) -> None:
        self.train, self.device = config.train, accelerator.device
        self.half = config.train.mixed_precision == "bf16"
        if self.half:  # as accelerate does without FSDP2; evaluations call the network itself
            unet.forward = convert_outputs_to_fp32(self._autocast()(unet.forward))
        self.shards = Shards(unet, accelerator.device)
        self.unet, self.optimizer, self.weights = unet, optimizer, weights
        weights.update({name: nn.Parameter(self.shards.own(name)) for name in weights})
        (group,) = optimizer.param_groups
        group["params"] = list(weights.values())

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision of what stands around the network, which does its own."""
        context: AbstractContextManager[None] = self._autocast() if self.half else nullcontext()
        return context

    def no_sync(self) -> AbstractContextManager[None]:
        """Each backward pass hands its gradients on: kept back, they would be whole."""
        return nullcontext()

    def whole(self) -> AbstractContextManager[Mapping[str, nn.Parameter]]:
        """Inside the block the network holds whole weights: what learns, by name. Every rank enters it."""
        return self.shards.whole()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate a micro-batch's gradient."""
        (loss / self.train.gradient_accumulation_steps).backward()

    def update(self) -> float:
        """Clip and step; a non-finite gradient skips the step. Returns the gradient norm before clipping."""
        for name, weight in self.weights.items():
            weight.grad = self.shards.gradient(name)
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        squares = nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(squares)
        norm = squares.sqrt()
        if math.isfinite(norm):
            if self.train.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.weights.values(), self.train.max_grad_norm, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state(self, wanted: bool) -> Tensors:
        """The optimizer's whole state in the computer's memory where it is wanted; every rank calls this."""
        names, found = list(self.weights), {}
        for key, value in optimizer_tensors(self.optimizer).items():
            whole = self.shards.gather(names[int(key.split(".")[0])], value) if value.ndim else value
            if wanted:
                found[key] = whole.cpu()
        return found

    def release(self) -> None:
        """Training is over: the optimizer's state makes room for what comes next."""
        self.optimizer.state.clear()
        release_memory()

    def joined(self, parts: Mapping[str, torch.Tensor], wanted: bool) -> Tensors:
        """Whole tensors from each rank's parts of them, by weight; every rank calls this."""
        found = {}
        for name, part in parts.items():
            whole = self.shards.gather(name, part)
            if wanted:
                found[name] = whole.cpu()
        return found

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """This rank's parts of whole tensors, by weight."""
        return {name: Shards.cut(tensor) for name, tensor in tensors.items()}

    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Every rank takes its part of the weights and of the optimizer's state."""
        copy_into(self.weights, self.parts(weights))
        load_optimizer(
            self.optimizer, {key: Shards.cut(value) if value.ndim else value for key, value in state.items()}
        )

    def _autocast(self) -> Any:
        # Without the cache, which would keep all weights whole, in bf16, until the forward pass ends.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)


def plain_accelerator(device: torch.device) -> Accelerator:
    """accelerate without its own FSDP, which knows no CPU."""
    with patch_environment(accelerate_use_fsdp="false"):
        return Accelerator(cpu=device.type == "cpu", mixed_precision="no")

"""What a training step holds beside weights and optimizer, from a step on tensors that have shapes and no content."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfu_mlflow.base.adapters import attach, store_frozen
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.objective import predict
from dfu_mlflow.types import Conditioning

TOKENS = 77


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside: those alive, and the most there were at a time.

    Args:
        known: tensors that are not counted, nor what is written into them.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in known:
            self._watch(tensor.untyped_storage(), 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and look at what it made."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self._watch(storage, storage.nbytes())
        return result

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key in self._alive:
            return

        def freed(_: object) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


class _CudaNorms(TorchFunctionMode):
    """Normalisations compute and answer in float32, as CUDA's autocast has it; the CPU's keeps them in bf16."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = tuple(value.float() if isinstance(value, torch.Tensor) else value for value in args)
        return func(*args, **(kwargs or {}))


def activation_bytes(unet_config: Mapping[str, Any], latent_edge: int, config: RunConfig) -> int:
    """The most that one process's training step holds at a time, its gradients freed as they come [bytes].

    Activations, what autocast casts, and temporaries; of the gradients those of one weight. One backward pass over
    `train.batch_size` rows of the UNet alone: neither the perceptual term nor what CUDA itself takes is in it.

    Args:
        latent_edge: of the latents, which are square.
    """
    half = config.train.mixed_precision != "no"
    with FakeTensorMode():
        unet: Any = UNet2DConditionModel.from_config(unet_config)
        attach(unet, config.adapter, seed=0)
        store_frozen(unet, config.adapter)
        unet.train()
        if config.train.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        for weight in unet.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_free_gradient)
        with LiveBytes(unet.parameters()) as counter, _CudaNorms() if config.device != "cpu" else nullcontext():
            noisy, told = _inputs(unet.config, latent_edge, config.train.batch_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                prediction = predict(unet, noisy, torch.ones(len(noisy), dtype=torch.int64), told)
                loss = (prediction.float() - noisy).pow(2).mean()
            loss.backward()
    return int(counter.peak)


def _inputs(unet: Any, edge: int, rows: int) -> tuple[torch.Tensor, Conditioning]:
    pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    told = Conditioning(
        torch.empty(rows, TOKENS, unet.cross_attention_dim), torch.empty(rows, pooled), torch.empty(rows, 6)
    )
    return torch.empty(rows, unet.in_channels, edge, edge), told


def _free_gradient(weight: torch.Tensor) -> None:
    weight.grad = None

"""What a training step holds beside weights and optimizer, from a step on tensors that have shapes and no content."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def activation_bytes(unet: Any, latent_edge: int, config: RunConfig) -> int:
    """The most that one process's training step holds at a time, its gradients freed as they come [bytes].

    Activations, what autocast casts, and temporaries; of the gradients those of one weight. One backward pass over
    `train.batch_size` rows of the UNet alone: neither the perceptual term nor what CUDA itself takes is in it.

    Args:
        unet: of shapes alone, with what learns and what does not; its weights are changed for fake ones.
        latent_edge: of the latents, which are square.
    """
    half = config.train.mixed_precision != "no"
    unet.train()
    if config.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    with FakeTensorMode():
        for module in unet.modules():
            _fill_with_fakes(module)
            if half and config.device != "cpu" and isinstance(module, nn.GroupNorm | nn.LayerNorm):
                # CUDA's autocast normalises in float32 and answers so; the CPU's, which runs here, stays in bf16.
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        with LiveBytes(unet.parameters()) as counter:
            noisy, told = network_inputs(unet.config, latent_edge, config.train.batch_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                prediction = predict(unet, noisy, torch.ones(len(noisy), dtype=torch.int64), told)
                loss = (prediction.float() - noisy).pow(2).mean()
            loss.backward()
    return int(counter.peak)


def drawing_bytes(unet: Any, latent_edge: int, rows: int, mixed_precision: str, guided: bool = True) -> int:
    """The most that one pass without gradients holds beside the weights [bytes]: of a solver step, or of a validation.

    Args:
        unet: of shapes alone, in the precisions that it is drawn with; its weights are changed for fake ones.
        latent_edge: of the latents, which are square.
        rows: pictures at a time.
        guided: each picture is seen with its prompt and without.
    """
    unet.eval()
    with FakeTensorMode(), torch.no_grad():
        for module in unet.modules():
            _fill_with_fakes(module)
        with LiveBytes(unet.parameters()) as counter:
            noisy, told = network_inputs(unet.config, latent_edge, rows * (2 if guided else 1))
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision != "no"):
                predict(unet, noisy, torch.ones(len(noisy), dtype=torch.int64), told)
    return int(counter.peak)


def encoding_bytes(vae: Any, edge_px: int, rows: int) -> int:
    """The most that the autoencoder's first half holds beside its weights, for pictures in float32 [bytes]."""
    return _autoencoder_bytes(vae, vae.encode, (rows, 3, edge_px, edge_px))


def decoding_bytes(vae: Any, latent_edge: int, rows: int) -> int:
    """The same of its second half."""
    return _autoencoder_bytes(vae, vae.decode, (rows, int(vae.config.latent_channels), latent_edge, latent_edge))


def _autoencoder_bytes(vae: Any, half: Callable[..., Any], shape: tuple[int, ...]) -> int:
    with torch.no_grad(), LiveBytes(vae.parameters()) as counter:
        half(torch.empty(shape, device="meta"), return_dict=False)
    return int(counter.peak)


def _fill_with_fakes(module: nn.Module) -> None:
    for name, weight in list(module.named_parameters(recurse=False)):
        fake = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
        if fake.requires_grad:
            fake.register_post_accumulate_grad_hook(_free_gradient)
        setattr(module, name, fake)


def network_inputs(unet: Any, edge: int, rows: int) -> tuple[torch.Tensor, Conditioning]:
    """Latents [B, C, h, w] and what the UNet of this configuration is told, without content."""
    pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    told = Conditioning(
        torch.empty(rows, TOKENS, unet.cross_attention_dim), torch.empty(rows, pooled), torch.empty(rows, 6)
    )
    return torch.empty(rows, unet.in_channels, edge, edge), told


def _free_gradient(weight: torch.Tensor) -> None:
    weight.grad = None

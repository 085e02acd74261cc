"""Peak memory of every phase of a run, from shapes alone: loading, caching, training, evaluation, registration.

Without an accelerator the device is the host: there both sides of a phase add up to what one process takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from dfu_mlflow.activations import decoding_bytes, drawing_bytes, encoding_bytes
from dfu_mlflow.base.adapters import attach, store_frozen
from dfu_mlflow.base.load import TEXT_ENCODERS
from dfu_mlflow.base.published import meta_modules
from dfu_mlflow.base.weight_files import GROUP_BYTES, weight_files
from dfu_mlflow.config.schema import AdapterConfig, RunConfig
from dfu_mlflow.data.dataset import encoded_at_once
from dfu_mlflow.memory import GIB, count, training_memory
from dfu_mlflow.memory_figures import remembered
from dfu_mlflow.photograph_features import MAX_BATCH, restored_at_once
from dfu_mlflow.validation import rows_at_once

CUDA_BYTES = 1.5 * GIB
"""Context, workspaces of the libraries, and what the allocator cannot use."""
LATER_BYTES = 0.2 * GIB
"""What MLflow's store, extractors, statistics and plots take: they are loaded when they are needed."""
EXTRACTED_CHANNELS = 96
"""Of EfficientNet-Lite0's largest layer, at half the side that it sees; input, output and activation are held."""


@dataclass(frozen=True)
class PhaseMemory:
    """What one phase takes at its peak, in bytes by part.

    Attributes:
        name: of the phase.
        device: on the accelerator.
        host: in the computer's own memory.
    """

    name: str
    device: Mapping[str, float]
    host: Mapping[str, float]

    def on_device(self) -> float:
        """Bytes on the accelerator."""
        return sum(self.device.values())

    def on_host(self, shared: bool) -> float:
        """Bytes in the computer's memory; all of them where there is no accelerator."""
        return sum(self.host.values()) + (self.on_device() if shared else 0.0)


@dataclass(frozen=True)
class RunMemory:
    """The memory of a run.

    Attributes:
        phases: in their order.
        shared: the device is the computer's own processor.
    """

    phases: tuple[PhaseMemory, ...]
    shared: bool

    def largest_on_host(self) -> PhaseMemory:
        """The phase that takes most of the computer's memory."""
        return max(self.phases, key=lambda phase: phase.on_host(self.shared))

    def largest_on_device(self) -> PhaseMemory:
        """The phase that takes most of the accelerator's."""
        return max(self.phases, key=PhaseMemory.on_device)


def libraries_bytes() -> float:
    """What this process takes now: Python and the packages that a run imports."""
    return float(psutil.Process().memory_info().rss)


def run_memory(config: RunConfig, source: str, shared: bool, libraries: float) -> RunMemory:
    """Of training: every phase from the text encoders to the registered model.

    Args:
        source: of the base, as `resolve_base` gives it.
        shared: the device is the computer's own processor.
        libraries: what the process takes before it loads a network, see `libraries_bytes`; more are loaded later.
    """
    parts = training_memory(config, source)
    sizes = _Sizes(config, source)
    host = {"libraries": libraries + LATER_BYTES}
    held = {"UNet": parts.unet, "autoencoder": sizes.vae}
    average = {"EMA": parts.ema}
    optimizer = {"optimizer": parts.optimizer}
    beside = {**host, **(average if config.ema.on_host else {})}
    on_card = {**held, **({} if config.ema.on_host else average)}
    evaluating = max(sizes.drawing(config.adapter), sizes.decoding)
    phases = [
        *_preparing(sizes, libraries),
        PhaseMemory("loading the UNet", held, {**host, "file": sizes.mapped_unet}),
        PhaseMemory(
            "training",
            {**on_card, **optimizer, "gradients": parts.gradients, "activations": parts.activations},
            beside,
        ),
        PhaseMemory("evaluation", {**on_card, **optimizer, "activations": evaluating}, beside),
        PhaseMemory(
            "checkpoint",
            {**on_card, **optimizer},
            {**beside, **({} if shared else {"copies": parts.checkpoint})},
        ),
        PhaseMemory("registration", on_card, beside),
    ]
    if config.registry.register_model:
        trial = sizes.drawing_memory(config.adapter, {"libraries, of two processes": 2 * (libraries + LATER_BYTES)})
        largest = max(trial, key=lambda phase: phase.on_host(shared))
        phases.append(PhaseMemory("smoke test", largest.device, largest.host))
    return RunMemory(tuple(phases), shared)


def evaluation_memory(config: RunConfig, source: str, shared: bool, libraries: float) -> RunMemory:
    """Of `evaluate`, `promote`, `diagnose` and sampling studies: photographs are looked at, nothing is trained."""
    sizes = _Sizes(config, source)
    host = {"libraries": libraries + LATER_BYTES}
    adapter = config.adapter
    drawing = max(sizes.drawing(adapter), sizes.decoding)
    device = {"UNet": sizes.drawn_unet(adapter), "autoencoder": sizes.vae, "activations": drawing}
    return RunMemory((*_preparing(sizes, libraries), PhaseMemory("evaluation", device, host)), shared)


def sampling_memory(config: RunConfig, source: str, shared: bool, libraries: float) -> RunMemory:
    """Of a sampler that is loaded and draws: `sample`, `serve`, the registered model."""
    sizes = _Sizes(config, source)
    return RunMemory(tuple(sizes.drawing_memory(config.adapter, {"libraries": libraries})), shared)


def _preparing(sizes: _Sizes, libraries: float) -> list[PhaseMemory]:
    """What comes before the UNet is loaded, the same for training and evaluation."""
    vae = {"autoencoder": sizes.vae}
    host, later = {"libraries": libraries}, {"libraries": libraries + LATER_BYTES}
    return [
        sizes.text_phase(host),
        PhaseMemory("caching latents", {**vae, "activations": sizes.encoding}, host),
        PhaseMemory("features of photographs", {**vae, "activations": sizes.features}, later),
    ]


class _Sizes:
    """What the networks of a base take, and one pass of each."""

    def __init__(self, config: RunConfig, source: str) -> None:
        self.config, self.source = config, source
        modules = meta_modules(source)
        vae: Any = modules["vae"]
        self._vae = vae
        unet: Any = modules["unet"]
        self._unet_config = unet.config
        self.mapped_unet = min(float(GROUP_BYTES), _file_bytes(source, "unet", unet))
        self.vae = 4.0 * count(modules["vae"])
        self.text = 4.0 * sum(count(modules[name]) for name in TEXT_ENCODERS)
        self.mapped = sum(_file_bytes(source, name, modules[name]) for name in TEXT_ENCODERS)
        self.edge = math.ceil(config.data.resolution_px / 2 ** (len(vae.config.block_out_channels) - 1))

    def text_phase(self, host: Mapping[str, float]) -> PhaseMemory:
        """Prompts are encoded on the host; with a warm cache they are not."""
        encoders = {"text encoders, until prompts are encoded": self.text, "their files": self.mapped}
        return PhaseMemory("encoding prompts", {}, {**host, **encoders})

    @property
    def encoding(self) -> float:
        """One batch of photographs through the autoencoder's first half."""
        side = self.config.data.resolution_px
        return float(encoding_bytes(self._vae, side, encoded_at_once(side)))

    @property
    def decoding(self) -> float:
        """One picture through its second half."""
        return float(decoding_bytes(self._vae, self.edge, 1))

    @property
    def features(self) -> float:
        """Photographs are given back by the autoencoder, then looked at by an extractor."""
        restored = decoding_bytes(self._vae, self.edge, restored_at_once(self.config.data.resolution_px))
        half = self.config.metrics.extractor_size_px / 2
        return float(max(restored, 3 * MAX_BATCH * half**2 * EXTRACTED_CHANNELS * 4))

    def drawn_unet(self, adapter: AdapterConfig) -> float:
        """The UNet's weights as it is drawn with, an adapter's among them."""
        return float(sum(weight.nbytes for weight in self._drawn(adapter).parameters()))

    def drawing(self, adapter: AdapterConfig) -> float:
        """One solver step of a batch, or one pass over the validation grid, whichever sees more pictures."""
        config = self.config
        guided = 2 if config.sampling.guidance_scale > 1 else 1
        validated = min(config.evaluation.validation_images, rows_at_once(self.edge))
        rows, precision = max(guided * config.sampling.batch_size, validated), config.train.mixed_precision
        facts = {
            "pass": [rows, precision, self.edge],
            "unet": dict(self._unet_config),
            "adapter": adapter.model_dump(mode="json"),
        }
        return remembered(
            config.data, facts, lambda: drawing_bytes(self._drawn(adapter), self.edge, rows, precision, guided=False)
        )

    def drawing_memory(self, adapter: AdapterConfig, host: Mapping[str, float]) -> list[PhaseMemory]:
        """A sampler that is loaded and draws."""
        unet = {"UNet": self.drawn_unet(adapter), "autoencoder": self.vae}
        return [
            self.text_phase(host),
            PhaseMemory("loading the UNet", unet, {**host, "file": self.mapped_unet}),
            PhaseMemory("sampling", {**unet, "activations": max(self.drawing(adapter), self.decoding)}, host),
        ]

    def _drawn(self, adapter: AdapterConfig) -> Any:
        """A UNet of shapes in the precisions that it is drawn with."""
        unet: Any = meta_modules(self.source)["unet"]
        half = self.config.train.mixed_precision != "no" and not (adapter.method == "lora" and adapter.use_dora)
        with torch.device("meta"):
            attach(unet, adapter, seed=0)
            if adapter.method == "full":
                unet.requires_grad_(False)
            store_frozen(unet, adapter.model_copy(update={"frozen_dtype": "bfloat16" if half else "float32"}))
        return unet


def _file_bytes(source: str, part: str, network: nn.Module) -> float:
    """A network's weight files, which are mapped into memory while they are read; half precision where unknown."""
    try:
        return float(sum(file.stat().st_size for file in weight_files(Path(source) / part)))
    except OSError:
        return 2.0 * count(network)

"""Sections on what is measured, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dfu_mlflow.config.section import Positive, Section


class SuccessConfig(Section):
    """When a run counts as a success; becomes the tag `verdict`."""

    metric: str = "kid_progress"
    below: float | None = None
    above: float | None = None
    by_epoch: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.below is None) == (self.above is None):
            raise ValueError("a success criterion needs exactly one of below and above")
        return self


class EvaluationConfig(Section):
    """What is measured after each epoch."""

    budget: Annotated[float, Field(gt=0.0)] | None = 0.25
    """UNet passes of all evaluations, as a share of training's: the untouched base and the last epoch are measured in
    full, the epochs between them on as many pictures as that leaves (`eval_quick/...`). None measures all in full."""
    every_epochs: Positive = 1
    samples: Annotated[int, Field(ge=0)] = 240
    """Images generated for the metrics, divided over the classes; at most what is held out is compared."""
    grid_per_class: Positive = 8
    validation_images: Positive = 64
    validation_timesteps: Annotated[int, Field(ge=4)] = 8
    """Timesteps of the fixed validation grid, spread over four bins."""
    ema: bool = True
    """Measure the averaged weights beside the live ones."""
    best_metric: str = "kid"
    """What chooses the best checkpoint and early stopping; `*progress` and `*accuracy` are better when larger."""
    success: SuccessConfig | None = None
    seed: int = 20_000


class MetricsConfig(Section):
    """Features and intervals."""

    extractor: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    extractor_size_px: Annotated[int, Field(ge=32, le=1024)] = 96
    inception_weights: Path | None = None
    """InceptionV3 as ported for FID (`pt_inception-2015-12-05-6726825d.pth` or safetensors); enables `eval/fid`."""
    dino_model: Literal["dinov2-small", "dinov2-base", "dinov2-large"] = "dinov2-small"
    dino_weights: Path | None = None
    """Folder with DINOv2's `config.json` and `model.safetensors`; None looks into the caches."""
    clip_weights: Path | None = None
    """Folder with the same of CLIP ViT-L/14-336, for `cmmd`; None looks into the caches."""
    sscd_weights: Path | None = None
    """SSCD's TorchScript file. It is code: only a file of one's own that is named here is loaded."""
    lpips_network: Literal["alex", "vgg"] = "alex"
    """LPIPS's backbone; `vgg` takes 16 times the memory."""
    lpips_weights: Path | None = None
    """That backbone's ImageNet weights as torchvision publishes them; None looks into torch's hub cache."""
    lpips_size_px: Annotated[int, Field(ge=64, le=512)] = 64
    """LPIPS was calibrated on patches of 64 px."""
    per_epoch: tuple[Literal["efficientnet_lite0", "colour", "pixels", "inception", "lpips", "dinov2", "clip"], ...] = (
        "efficientnet_lite0",
        "colour",
        "pixels",
        "inception",
        "lpips",
    )
    """Extractors used after each epoch where their weights are at hand; `evaluate` uses all."""
    allow_download: bool = False
    """Fetch weights that are missing into torch's hub cache."""
    check_value_range: bool = True
    """`evaluate` refuses pictures that look inverted, wrapped round or not scaled to 0 to 255."""
    floor_draws: Annotated[int, Field(ge=20)] = 20


class MemorisationConfig(Section):
    """When generated pictures count as copies of training photographs."""

    enabled: bool = True
    neighbours: Annotated[int, Field(ge=2)] = 50
    """Training photographs whose mean distance the distance to the nearest one is compared with."""
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4
    """Ratio of the two below which a picture counts as a copy; lowered where over `tail` of real photographs do."""
    tail: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.002
    """Share of real photographs that may look like copies of another patient's photograph."""
    max_copy_excess: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Copies are found when the lower end of their excess is above this."""
    max_membership_auc: Annotated[float, Field(ge=0.5, le=1.0)] = 0.6
    """Lower end of the membership AUC above which the registry refuses a champion."""
    membership_images: Annotated[int, Field(ge=10)] = 120
    """Photographs on each side whose losses are compared."""
    pairs: Annotated[int, Field(ge=0)] = 24
    """Closest pairs written side by side to a folder that only the user can read."""


class UtilityConfig(Section):
    """Does a classifier gain from the synthetic images? Costs (2 + 2 sets of images) x `seeds` trainings."""

    enabled: bool = False
    seeds: Positive = 5
    """Classifiers trained in each arm; intervals from fewer than 4 are wide (Student's with few degrees of freedom)."""
    folds: Positive = 1
    """Divisions of the patients; each needs a generator of its own, so only `study` can use more than one."""
    ratio: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Synthetic images for every real one in the augmented arms."""
    network: str = "small_cnn"
    """`small_cnn`, or a model of timm by name."""
    pretrained: bool = True
    """Start a timm model from pretrained weights, out of `weights` or the hub's cache; nothing is downloaded."""
    weights: Path | None = None
    """Pretrained weights of a timm model, safetensors or a state dict."""
    size_px: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Side the classifier sees; None is the pictures' own for `small_cnn`, else the timm model's own."""
    steps: Positive = 200
    """Optimizer steps, the same in every arm."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-3
    seed: int = 0
    device: str = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.network == "small_cnn" and self.weights is not None:
            raise ValueError("utility.weights are for a timm model: set utility.network, which is small_cnn")
        return self

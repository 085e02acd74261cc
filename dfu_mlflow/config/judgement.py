"""The parts of the configuration that say how generated pictures are judged beyond distances: copies, and their use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from dfu_mlflow.config.section import Positive, Section


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
    """Lower end of the membership AUC above which the registry warns."""
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

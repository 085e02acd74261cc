"""The registered model: rows of `phase` (and optionally `seed`) in, a PNG in base64 a row out.

MLflow runs this file to load the model ("models from code"); `registry.package` logs it. It works outside the
checkout: what it imports travels with the model.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.errors import UserError
from dfu_mlflow.sampling import Sampler
from dfu_mlflow.threading_policy import adapt_waiting
from registry.picture import picture_facts, png

MAX_ROWS = 64
"""Rows a request may have unless `model_config` says otherwise: a request holds the model until it is answered."""
MAX_STEPS = 1000


class Draws(Protocol):
    """What is needed of a sampler."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels that can be drawn."""

    def draw(
        self, labels: list[str], seeds: list[int], guidance_scale: float | None, num_inference_steps: int | None
    ) -> np.ndarray:
        """uint8 [N, H, W, 3], one image for each (label, seed)."""

    def settings_with(self, guidance_scale: float | None, num_inference_steps: int | None) -> Settings:
        """The settings that `draw` uses when told these."""


class SamplerModel(PythonModel):
    """Draws pictures by class label.

    `model_config` of `mlflow.pyfunc.load_model` (or the variable SERVING_MODEL_CONFIG of a server) sets `device`,
    `max_rows` and `model`, the name that answers carry.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle onto the device."""
        adapt_waiting()  # MLflow's own server and the trial in a clean process come here by no entry point
        self.configure(
            Sampler.load(
                Path(context.artifacts["bundle"]), device=str((context.model_config or {}).get("device", "auto"))
            ),
            context.model_config or {},
        )

    def configure(self, sampler: Draws, model_config: Mapping[str, Any]) -> None:
        """Take a loaded sampler; separate from `load_context` so that any sampler can stand in."""
        self.sampler = sampler
        self.name = str(model_config.get("model", "unregistered"))
        self.max_rows = int(model_config.get("max_rows", MAX_ROWS))
        # MLflow's server answers requests in threads, and a diffusers pipeline carries state from step to step.
        self.lock = threading.Lock()

    def predict(
        self, context: PythonModelContext | None, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Draw one picture a row.

        Args:
            model_input: column `phase`; `seed` where wanted. A row without a seed gets `params["seed"]` plus its
                position, so that the rows of a request differ and the request can be repeated.
            params: `seed`, `guidance_scale`, `num_inference_steps`.

        Returns:
            Columns `image` (PNG, base64), `phase`, `seed`, `model`.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE, which servers answer as 400.
        """
        asked = params or {}
        labels = [str(label) for label in model_input["phase"]]
        guidance_scale, steps = asked.get("guidance_scale"), asked.get("num_inference_steps")
        self._check(labels, guidance_scale, steps)
        seeds = _seeds(model_input, int(asked.get("seed") or 0))
        try:
            with self.lock:
                images = self.sampler.draw(labels, seeds, guidance_scale, steps)
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        settings = self.sampler.settings_with(guidance_scale, steps)
        facts = [picture_facts(label, seed, settings, self.name) for label, seed in zip(labels, seeds, strict=True)]
        files = [base64.b64encode(png(*pair)).decode("ascii") for pair in zip(images, facts, strict=True)]
        return pd.DataFrame({"image": files, "phase": labels, "seed": seeds, "model": self.name})

    def _check(self, labels: list[str], guidance_scale: float | None, steps: int | None) -> None:
        problems = []
        unknown = sorted(set(labels) - set(self.sampler.classes))
        if unknown:
            problems.append(
                f"phase {', '.join(unknown)} is unknown: this model draws {', '.join(self.sampler.classes)}"
            )
        if not 1 <= len(labels) <= self.max_rows:
            problems.append(f"{len(labels)} rows: a request takes 1 to {self.max_rows}")
        if guidance_scale is not None and not 0 <= guidance_scale < float("inf"):
            problems.append(f"guidance_scale {guidance_scale}: must be 0 or more")
        if steps is not None and not 1 <= steps <= MAX_STEPS:
            problems.append(f"num_inference_steps {steps}: must be 1 to {MAX_STEPS}")
        if problems:
            raise MlflowException.invalid_parameter_value("; ".join(problems))


def _seeds(rows: pd.DataFrame, first: int) -> list[int]:
    given = rows["seed"] if "seed" in rows else [None] * len(rows)
    return [first + position if pd.isna(seed) else int(seed) for position, seed in enumerate(given)]


mlflow.models.set_model(SamplerModel())

"""Does a generated picture show the class it was asked for?

The judge learns from real training photographs that went through the same autoencoder as the samples, so that blur,
which every sample has, is not what it judges by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dfu_mlflow.metrics.intervals import proportion_estimate
from dfu_mlflow.types import Estimate

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

PENALTY = 1e-2
"""Inverse strength (scikit-learn's C): features outnumber photographs, and 40 ms for 700 x 1,280."""


def fit_classifier(features: torch.Tensor, class_ids: torch.Tensor) -> Pipeline:
    """Logistic regression on standardised features [N, D] of at least two classes [N]; classes weigh alike."""
    from sklearn.linear_model import LogisticRegression  # here: half a second and 30 MiB that not every run needs
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    judge = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=1000)
    return make_pipeline(StandardScaler(), judge).fit(features.double().numpy(), class_ids.numpy())


def class_accuracy(classifier: Pipeline, features: torch.Tensor, class_ids: torch.Tensor) -> Estimate:
    """Share of features [M, D] recognised as the class that was asked for [M], with Wilson's interval."""
    found = classifier.predict(features.double().numpy())
    return proportion_estimate(int((found == class_ids.numpy()).sum()), len(class_ids))

"""The end of a training run: the best checkpoint becomes a registered candidate, and the user is told what to type."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow.types.responses  # noqa: F401  # switches MLflow's messages on again when it is first loaded
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.logging_utils import disable_logging, enable_logging

from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.history import figures_of_weights
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.phases import phase
from dfu_mlflow.tracking import masked
from registry.aliases import write_tags
from registry.card import DESCRIPTION_CHARACTERS
from registry.clean_process import try_version
from registry.package import RegisteredSampler, register_sampler

SMOKE_TEST_TAG = "smoke_test"
"""Tag of a version: `passed: …` or `failed: …`, how drawing with it went right after it was registered."""


@contextmanager
def _unsaid() -> Iterator[None]:
    """MLflow prints that a model is registered; what is said below says more. Errors are raised, not printed."""
    disable_logging()
    try:
        yield
    finally:
        enable_logging()


def publish(result: TrainingResult, config: RunConfig) -> RegisteredSampler | None:
    """Register the result's bundle, if the configuration says so, and print the commands that come next."""
    own = figures_of_weights(result.figures, result.shown)
    headline = [f"{name} {own[f'eval/{name}']:.4g}" for name in ("fid", "fd", "kid") if f"eval/{name}" in own]
    print(f"best: epoch {result.best_epoch}, {result.shown} weights, {', '.join(headline) or 'not measured'}")
    print(f"success criterion: {result.verdict}")
    if not config.registry.register_model or result.bundle is None:
        print(f"not registered; the sampler is in {result.bundle}")
        return None
    tags = {"epoch": str(result.best_epoch), "weights": result.shown, "verdict": result.verdict}
    try:
        with phase("packaging and registering the sampler"), _unsaid():
            version = register_sampler(result.bundle, config, result.run_id, own, tags)
    except MlflowException as error:
        raise UserError(
            f"not registered, MLflow refuses it: {masked(error)}; the trained sampler is in {result.bundle}"
        ) from None
    uri = f"models:/{version.name}@{config.registry.alias}"
    print(
        f"registered {version.name} version {version.version} as @{config.registry.alias}\n\n"
        "Next:\n"
        "  mlflow ui                                              compare runs, look at the samples by epoch\n"
        f"  mlflow run . -e promote -P model={uri} --env-manager uv\n"
        f"  mlflow run . -e sample -P model={uri} --env-manager uv\n"
        f"  mlflow models serve -m {uri} --env-manager local"
    )
    return version


def try_registered(version: RegisteredSampler, config: RunConfig) -> None:
    """Draw with a registered version in a process of its own, and write on the version how it went.

    To be called when the memory of the training is free again. A version that fails stays registered: what was trained
    is in it, and `promote` refuses it.
    """
    trial = try_version(version.uri, config.gates.loads.timeout_s, classes=1)
    outcome = f"{'passed' if trial.passed else 'failed'}: {trial.sentence}"
    write_tags(version.name, version.version, {SMOKE_TEST_TAG: outcome})
    if trial.passed:
        print(f"tried: {trial.sentence}", flush=True)
        return
    client = MlflowClient()
    card = client.get_model_version(version.name, str(version.version)).description or ""
    warning = f"**This version does not draw.** {trial.sentence}"
    client.update_model_version(version.name, str(version.version), f"{warning}\n\n{card}"[:DESCRIPTION_CHARACTERS])
    print(f"warning: {trial.sentence}; {version.name} version {version.version} stays registered", file=sys.stderr)

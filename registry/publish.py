"""The end of a training run: the best checkpoint becomes a registered candidate, and the user is told what to type."""

from __future__ import annotations

from mlflow.exceptions import MlflowException

from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.tracking import masked
from registry.package import RegisteredSampler, register_sampler


def publish(result: TrainingResult, config: RunConfig) -> RegisteredSampler | None:
    """Register the result's bundle, if the configuration says so, and print the commands that come next."""
    group = "eval" if result.shown == "live" else "eval_ema"
    known = {name: result.figures.get(f"{group}/{name}") for name in ("fid", "fd", "kid")}
    headline = [f"{name} {value:.4g}" for name, value in known.items() if value is not None]
    print(f"best: epoch {result.best_epoch}, {result.shown} weights, {', '.join(headline) or 'not measured'}")
    print(f"success criterion: {result.verdict}")
    if not config.registry.register_model or result.bundle is None:
        print(f"not registered; the sampler is in {result.bundle}")
        return None
    figures = {name: value for name, value in result.figures.items() if name.startswith(("eval", "val"))}
    tags = {"epoch": str(result.best_epoch), "weights": result.shown, "verdict": result.verdict}
    try:
        version = register_sampler(result.bundle, config, result.run_id, figures, tags)
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

"""All weights that the metrics can use: what is at hand, what is missing, and how to carry it into a closed network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dfu_mlflow.config.measures import MetricsConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.extractors.files import Unavailable, Weights, fetch
from dfu_mlflow.metrics.extractors.inception import inception_weights
from dfu_mlflow.metrics.extractors.lpips_embedding import lpips_weights
from dfu_mlflow.metrics.extractors.sscd import sscd_weights
from dfu_mlflow.metrics.extractors.vision_transformers import clip_weights, dino_weights


def every_weights(config: MetricsConfig) -> tuple[Weights, ...]:
    """The weights that the metrics can use as configured, in the order of their size.

    EfficientNet-Lite0 is not among them: it comes with its package.
    """
    found = (
        inception_weights(config.inception_weights),
        dino_weights(config.dino_weights, config.dino_model),
        clip_weights(config.clip_weights),
        lpips_weights(config.lpips_weights, config.lpips_network),
        sscd_weights(config.sscd_weights),
    )
    return tuple(sorted(found, key=lambda weights: weights.size_mb))


def weights_lines(every: Sequence[Weights]) -> list[str]:
    """One line each for a person: name, what it is for, size, whether it is at hand and where from, hash, flag."""
    lines = []
    for weights in every:
        path = weights.find()
        if path is None:
            state = "missing, from " + " and ".join(file.urls[0] for file in weights.files)
        else:
            at_hand = "configured" if weights.path is not None else "cached"
            state = f"{at_hand}: {path}" if path.exists() else f"configured, but not there: {path}"
        digits = ", ".join(file.sha256 for file in weights.files if file.sha256)
        stated = f"sha256 {digits}…" if digits else "no hash published"
        lines.append(
            f"{weights.name} (for {weights.used_for}; about {weights.size_mb} MB; {stated}; {weights.flag}): {state}"
        )
    return lines


def fetch_weights(
    config: MetricsConfig, names: Sequence[str] = (), folder: Path | None = None
) -> dict[str, Path | Unavailable]:
    """Download weights that are missing into torch's hub cache, or all that are named into `folder` to carry away.

    Args:
        config: says where weights lie already.
        names: which; none takes all.
        folder: where to put them; what is in it already is not fetched again. None is the cache.

    Returns:
        Name -> path, or why it could not be fetched; one failure does not stop the others.

    Raises:
        UserError: for a name that does not exist.
    """
    known = {weights.name: weights for weights in every_weights(config)}
    if unknown := sorted(set(names) - known.keys()):
        raise UserError(f"weights {', '.join(unknown)}: the metrics can use {', '.join(known)}")
    results: dict[str, Path | Unavailable] = {}
    for name in names or known:
        at_hand = known[name].find() if folder is None else None
        results[name] = at_hand or fetch(known[name], folder)
    return results

"""What the `evaluate` entry point does: find the source, take its own configuration, measure it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import load, merge, parse_flags, read_tree, validate
from dfu_mlflow.config.section import Section
from dfu_mlflow.evaluation_run import EvaluationResult, Origin, run_evaluation
from dfu_mlflow.metrics.extractors.catalogue import every_weights, fetch_weights, weights_lines
from dfu_mlflow.metrics.extractors.files import Unavailable
from dfu_mlflow.preparation import Material
from dfu_mlflow.subject import Subject, open_subject, with_settings
from registry.source import Located, locate

OUTPUT_DIR = "outputs/evaluate"


class EvaluateOptions(Section):
    """What the `evaluate` entry point takes beside the configuration."""

    source: str = "models:/dfu-sampler@challenger"
    """A checkpoint, a training run's folder, an MLflow run or model, a registered version, a diffusers pipeline, or a
    folder with a sub-folder of pictures for each class."""
    weights: Literal["best", "live", "ema"] = "best"
    """Of a checkpoint: `best` is what its run judged better."""


def evaluate(options: EvaluateOptions, config_name: str | None, flags: Sequence[str]) -> EvaluationResult:
    """Measure `options.source`.

    Args:
        config_name: preset or file; None takes the configuration that the source was trained with, where it tells.
        flags: of the configuration; they win.

    Raises:
        UserError: for input that cannot be worked with.
    """
    load(RunConfig, config_name, flags)  # wrong flags are told before anything is looked for
    located = locate(options.source)
    config = configuration(located, config_name, flags)
    typed = parse_flags(flags).get("sampling", {})
    change = {key: getattr(config.sampling, key) for key in typed}

    def open_it(config: RunConfig, material: Material) -> Subject:
        return with_settings(open_subject(located.folder, config, material, options.weights), change)

    origin = Origin(options.source, located.run_id, located.model_id, located.version)
    return run_evaluation(config, origin, open_it)


def configuration(located: Located, config_name: str | None, flags: Sequence[str]) -> RunConfig:
    """The configuration to evaluate under: as typed, over what is named, else over the source's own."""
    if config_name is not None:
        tree = read_tree(config_name)
    else:
        tree = merge(located.configuration or {}, {"output_dir": OUTPUT_DIR, "resume": "none"})
    return validate(RunConfig, merge(tree, parse_flags(flags)))


def fetch(config: RunConfig, folder: Path | None) -> int:
    """List the weights that metrics can use and fetch those that are missing.

    Args:
        folder: where to put them, to carry into a closed network; None is torch's hub cache.

    Returns:
        How many could not be fetched.
    """
    print("\n".join(weights_lines(every_weights(config.metrics))))
    results = fetch_weights(config.metrics, folder=folder)
    for name, result in results.items():
        missing = isinstance(result, Unavailable)
        print(f"{name}: {f'not fetched, {result.reason}' if missing else result}")  # type: ignore[union-attr]
    return sum(isinstance(result, Unavailable) for result in results.values())

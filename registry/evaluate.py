"""What the `evaluate` entry point does: find the source, take its own configuration, measure it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dfu_mlflow.bundle_format import BUNDLE
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import Tree, merge, parse_flags, read_tree, validate
from dfu_mlflow.config.section import Section
from dfu_mlflow.errors import UserError
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
    located = locate(options.source)
    stated = merge(read_tree(config_name) if config_name else {}, parse_flags(flags))
    config = configuration(located, stated)

    def open_it(config: RunConfig, material: Material) -> Subject:
        subject = open_subject(located.folder, config, material, options.weights)
        refuse_unused(located, stated, options)
        change = {key: getattr(config.sampling, key) for key in stated.get("sampling", {})}
        return with_settings(subject, change)

    origin = Origin(options.source, located.run_id, located.model_id, located.version, located.data_digest)
    return run_evaluation(config, origin, open_it)


def configuration(located: Located, stated: Tree) -> RunConfig:
    """The configuration to evaluate under: what the user stated, over the source's own.

    Raises:
        UserError: where neither says which photographs to compare with.
    """
    if located.configuration is None and "data" not in stated:
        raise UserError(
            f"{located.folder} does not tell which photographs it belongs to: give --config or --data.root "
            "(phantom for the embedded ones)"
        )
    own = merge(located.configuration or {}, {"output_dir": OUTPUT_DIR, "resume": "none"})
    return validate(RunConfig, merge(own, stated))


def refuse_unused(located: Located, stated: Tree, options: EvaluateOptions) -> None:
    """A packaged sampler has its prompts and its weights: what cannot change them is refused, not ignored.

    Raises:
        UserError: naming the flag.
    """
    if not (located.folder / BUNDLE).is_file():
        return
    if "prompts" in stated:
        raise UserError("--prompts: a packaged sampler draws from its own prompts; evaluate its checkpoint instead")
    if options.weights != "best":
        raise UserError("--weights: a packaged sampler holds one set of weights; evaluate its checkpoint instead")


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

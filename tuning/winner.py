"""The best settings of a sampling study become the defaults of a new version of the same weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import optuna
from mlflow import MlflowClient
from optuna.trial import FrozenTrial

from dfu_mlflow.bundle import copy_bundle
from dfu_mlflow.bundle_format import BUNDLE, read_settings
from dfu_mlflow.config import RunConfig
from registry.package import register_sampler
from registry.source import locate
from tuning.nested_runs import NUMBER_TAG, RUN_ATTRIBUTE, STUDY_TAG
from tuning.sampling_study import SECONDS, tuned

TUNED = "sampler_tuned"
"""Name of the LoggedModel."""
KEPT_TAGS = ("epoch", "weights")
"""Of the version that was searched with: what is true of the weights. Its figures were of other settings."""


def register_winner(config: RunConfig, study: optuna.Study, trial: FrozenTrial, names: tuple[str, ...]) -> str | None:
    """Register the studied version's weights with a trial's settings as defaults, under `config.registry.alias`.

    It is a candidate as any other: `promote` judges it. Its run is the one that trained the weights, so that
    photographs, findings and configuration are found from it; the study is named in the version's tags.

    Args:
        config: of the study; `config.tune.source` is what it drew with.
        trial: the winner.
        names: the objectives.

    Returns:
        `NAME/VERSION`; None, with the reason printed, where the study did not draw with a registered version.
    """
    source = config.tune.source
    located = locate(source)
    if located.version is None or located.run_id is None:
        print(f"not registered: --tune.source {source} is no registered version (models:/NAME@ALIAS)")
        return None
    name, _, number = located.version.rpartition("/")
    before = MlflowClient().get_model_version(name, number).tags
    tags = {key: before[key] for key in KEPT_TAGS if key in before} | {
        "tuned_from": located.version,
        STUDY_TAG: study.study_name,
        NUMBER_TAG: str(trial.number),
        "study.run_id": str(study.user_attrs[RUN_ATTRIBUTE]),
        "metric_identity": "; ".join(study.user_attrs["metric_identity"]),
    }
    own = config.model_copy(update={"registry": config.registry.model_copy(update={"name": name})})
    with tempfile.TemporaryDirectory() as folder:
        settings = tuned(read_settings(located.folder / BUNDLE), trial.params)
        bundle = copy_bundle(located.folder, Path(folder) / "bundle", settings)
        version = register_sampler(bundle, own, located.run_id, figures(trial, names), tags, TUNED)
    said = f"registered {version.name} version {version.version} as @{own.registry.alias}: the weights of version"
    print(f"{said} {number}, drawn as in trial {trial.number}", flush=True)
    return f"{version.name}/{version.version}"


def figures(trial: FrozenTrial, names: tuple[str, ...]) -> dict[str, float]:
    """What the trial was measured as, with intervals, by the names that versions carry."""
    found: dict[str, float] = {}
    for name, value in zip(names, trial.values, strict=True):
        key = name if name == SECONDS else f"eval/{name}"
        found[key] = float(value)
        if name in trial.user_attrs.get("intervals", {}):
            found[f"{key}_low"], found[f"{key}_high"] = map(float, trial.user_attrs["intervals"][name])
    return found

"""The search space: from settings by dotted name to values of a trial and the configuration they make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import optuna

from dfu_mlflow.config import RunConfig, flatten
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.config.tuning import SearchRange, is_fixed
from dfu_mlflow.errors import ConfigError

FREE_SECTIONS = ("tune.", "tracking.", "registry.", "checkpoint.")
FREE = ("output_dir", "resume", "device", "data.cache_dir", "data.root", "data.manifest", "data.bounding_boxes")
"""What processes of one study may set differently."""


def common_settings(config: RunConfig) -> dict[str, Any]:
    """What all processes of a study must agree on, by dotted name; no password is in it."""
    return {
        key: value for key, value in flatten(config).items() if key not in FREE and not key.startswith(FREE_SECTIONS)
    }


Values = dict[str, Any]
"""Setting by dotted name -> value."""


def check_space(config: RunConfig) -> None:
    """Try the ends of every range and every choice on the configuration.

    Raises:
        ConfigError: naming each setting that is unknown, fixed, or takes other values.
    """
    problems: list[str] = []
    where = "tune.space" if config.tune.kind == "training" else "tune.sampling_space"
    space = config.tune.effective_space()
    for name, searched in space.items():
        problems += [f"{where}: {problem}" for problem in _misplaced(name, searched, space, config.tune.kind)]
        for value in _ends(searched):
            try:
                with_values(config, {**(searched.when or {}), name: value})
            except ConfigError as error:
                problems += [f"{where}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def suggest(trial: optuna.Trial, config: RunConfig) -> Values:
    """Draw a trial's values; settings whose condition does not hold are left out."""
    values: Values = {}
    space = config.tune.effective_space()
    for name, searched in sorted(space.items(), key=lambda item: item[1].when is not None):
        if all(values.get(key) == wanted for key, wanted in (searched.when or {}).items()):
            values[name] = _draw(trial, name, searched, config)
    return values


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with some settings changed.

    Raises:
        ConfigError: for settings that it does not know, or values that it does not take.
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        change: dict[str, Any] = {key: value}
        for section in reversed(sections):
            change = {section: change}
        tree = merge(tree, change)
    return validate(RunConfig, merge(config.model_dump(mode="json"), tree))


def describe_space(space: Mapping[str, SearchRange]) -> str:
    """The space as text: equal spaces give equal text."""
    plain = {name: searched.model_dump(mode="json", exclude_defaults=True) for name, searched in space.items()}
    return json.dumps(plain, sort_keys=True)


def _misplaced(name: str, searched: SearchRange, space: Mapping[str, SearchRange], kind: str) -> list[str]:
    if is_fixed(name):
        return [f"--{name} must be the same in every trial: take it out"]
    if kind == "sampling" and not name.startswith("sampling."):
        return [f"--{name} needs a training: a sampling study takes sampling.* alone (or set --tune.kind training)"]
    if kind == "training" and name.startswith("sampling."):
        return [f"--{name} needs no training: guidance is swept by tune.guidance, the rest by --tune.kind sampling"]
    return [
        f"--{name}: when names {key}, which is not searched with that value"
        for key, wanted in (searched.when or {}).items()
        if key not in space or wanted not in (space[key].choices or ())
    ]


def _ends(searched: SearchRange) -> tuple[Any, ...]:
    return searched.choices if searched.choices is not None else (searched.low, searched.high)


def _draw(trial: optuna.Trial, name: str, searched: SearchRange, config: RunConfig) -> Any:
    if searched.choices is not None:
        return trial.suggest_categorical(name, list(searched.choices))
    assert searched.low is not None
    assert searched.high is not None
    if _is_integer(name, searched, config):
        return trial.suggest_int(name, int(searched.low), int(searched.high), log=searched.log)
    return trial.suggest_float(name, searched.low, searched.high, log=searched.log)


def _is_integer(name: str, searched: SearchRange, config: RunConfig) -> bool:
    """Does the configuration make an integer of the range's lower end?"""
    found: Any = with_values(config, {**(searched.when or {}), name: searched.low})
    for part in name.split("."):
        found = getattr(found, part)
    return isinstance(found, int)

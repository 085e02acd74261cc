"""One frozen schema, read from presets, YAML files and flags."""

from dfu_mlflow.config.load import dump_yaml, flatten, load, preset_names
from dfu_mlflow.config.schema import RunConfig

__all__ = ["RunConfig", "dump_yaml", "flatten", "load", "preset_names"]

"""A LoRA checkpoint in MLflow's own flavor `diffusers`, which others load without this project's code.

`mlflow.diffusers.load_model(URI).load_pipeline(base_model=...)` gives a diffusers pipeline with the adapter in it. The
flavor keeps the adapter and the base's name or absolute path alone (mlflow 3.17.2, `mlflow/diffusers/__init__.py`,
`load_pipeline`): no prompts, no sampling defaults, no seeds, and on another machine the base has to be named again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import mlflow
import mlflow.diffusers
from diffusers import StableDiffusionXLPipeline
from mlflow.models import Model
from safetensors.torch import load_file

from dfu_mlflow.base.adapters import ADAPTER, lora_config
from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.bundle_format import BUNDLE
from dfu_mlflow.config.schema import AdapterConfig


def log_adapter(bundle: Path, run_id: str, requirements: list[str]) -> str | None:
    """Log a bundle's LoRA as a model of the run; `models:/m-…`, or None where the whole UNet was trained."""
    facts = json.loads((bundle / BUNDLE).read_text(encoding="utf-8"))
    adapter = AdapterConfig.model_validate(facts["adapter"])
    if adapter.method != "lora":
        return None
    base = resolve_base(facts["base"]["source"])
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(bundle / "weights.safetensors", adapter, Path(folder))
        info = Model.log(
            artifact_path=None,
            name="lora",
            flavor=mlflow.diffusers,
            run_id=run_id,
            adapter_path=folder,
            base_model=str(Path(base).resolve()) if Path(base).is_dir() else base,
            pip_requirements=requirements,
        )
    return str(info.model_uri)


def write_adapter(weights: Path, adapter: AdapterConfig, folder: Path) -> None:
    """Write a checkpoint's LoRA as `load_lora_weights` of any SDXL pipeline reads it: one safetensors file.

    Args:
        weights: safetensors file by the UNet's parameter names.
        adapter: rank and scale, which the names do not tell; stored in the file's header.
    """
    layers = {_published(name): value for name, value in load_file(weights).items()}
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=lora_config(adapter).to_dict()
    )


def _published(name: str) -> str:
    """`x.lora_A.default.weight` is `x.lora_A.weight` outside peft; DoRA's magnitude has no `.weight` there."""
    name = name.replace(f".{ADAPTER}", "")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name

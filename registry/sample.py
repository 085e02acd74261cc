"""A registered model -> a class-balanced folder of synthetic images with a manifest."""

from __future__ import annotations

import base64
import csv
from pathlib import Path
from typing import Annotated

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from pydantic import Field
from tqdm import tqdm

from dfu_mlflow.config.section import Positive, Section
from dfu_mlflow.errors import UserError
from dfu_mlflow.runtime import derive_seed

ROWS_PER_CALL = 64
COLUMNS = ("path", "class", "seed", "model")


class CountSection(Section):
    """How many pictures."""

    per_class: Positive = 8


class SampleConfig(Section):
    """What the `sample` entry point takes."""

    model: str = "models:/dfu-sampler@challenger"
    """Any registered sampler: `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    output_dir: Path = Path("outputs/samples")
    seed: int = 0
    guidance_scale: Annotated[float, Field(ge=0.0)] | None = None
    """None takes the model's own."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sample: CountSection = CountSection()


def sample(config: SampleConfig) -> Path:
    """Draw `sample.per_class` pictures of each class into OUTPUT_DIR/CLASS/SEED.png, and write `manifest.csv`.

    Returns:
        The manifest: path, class, seed, model.

    Raises:
        UserError: for a model that is not registered, or a folder that holds other pictures.
    """
    manifest = config.output_dir / "manifest.csv"
    if manifest.exists():
        raise UserError(f"--output_dir {config.output_dir} holds samples already: give another folder")
    try:
        name = _version(config.model)
        model = mlflow.pyfunc.load_model(f"models:/{name}", model_config={"model": name})
    except (MlflowException, OSError) as error:
        raise UserError(f"--model {config.model} cannot be loaded: {str(error).splitlines()[0]}") from None
    classes = model.unwrap_python_model().sampler.classes
    rows = [
        {"phase": label, "seed": derive_seed(config.seed, "sample", class_id, number) % 2**32}
        for class_id, label in enumerate(classes)
        for number in range(config.sample.per_class)
    ]
    wanted = {"guidance_scale": config.guidance_scale, "num_inference_steps": config.num_inference_steps}
    params = {name: value for name, value in wanted.items() if value is not None}
    lines = []
    with tqdm(total=len(rows), unit="image") as bar:
        for start in range(0, len(rows), ROWS_PER_CALL):
            answers = model.predict(pd.DataFrame(rows[start : start + ROWS_PER_CALL]), params=params)
            lines += [_write(config.output_dir, answer) for answer in answers.to_dict("records")]
            bar.update(len(answers))
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    return manifest


def _version(uri: str) -> str:
    """`NAME/VERSION` of a registered model; an alias is looked up once, so that all pictures come from one version."""
    if not uri.startswith("models:/"):
        raise UserError(f"--model {uri}: give models:/NAME@ALIAS or models:/NAME/VERSION")
    name, _, alias = uri.removeprefix("models:/").partition("@")
    return f"{name}/{mlflow.MlflowClient().get_model_version_by_alias(name, alias).version}" if alias else name


def _write(folder: Path, answer: dict[str, object]) -> dict[str, object]:
    path = folder / str(answer["phase"]) / f"{answer['seed']}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(str(answer["image"])))
    return {
        "path": path.relative_to(folder),
        "class": answer["phase"],
        "seed": answer["seed"],
        "model": answer["model"],
    }

"""Labelled picture grids and loss curves for the documentation.

python -m dfu_mlflow.base.pretraining.grids --base dfu_mlflow/base/weights/tiny_sdxl --docs docs
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw

from dfu_mlflow.config.prompts import DETAILED, MINIMAL
from dfu_mlflow.data.phantom import PHASES, render

Pictures = npt.NDArray[np.uint8]
_CELL_PX = 96
_LABEL_PX = 250


def labelled_grid(rows: list[tuple[str, Pictures]], path: Path) -> None:
    """Write a PNG with one labelled row of pictures, uint8 [N, H, W, 3], for each entry."""
    width = max(len(pictures) for _, pictures in rows) * _CELL_PX + _LABEL_PX
    sheet = Image.new("RGB", (width, len(rows) * _CELL_PX), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(rows):
        words, line = label.split(), ""
        lines: list[str] = []
        for word in words:
            if len(line) + len(word) > 36:
                lines, line = [*lines, line], ""
            line = f"{line} {word}".strip()
        pen.multiline_text((8, row * _CELL_PX + 4), "\n".join([*lines, line][:6]), fill="black")
        for column, picture in enumerate(pictures):
            cell = Image.fromarray(picture).resize((_CELL_PX, _CELL_PX), Image.Resampling.BICUBIC)
            sheet.paste(cell, (_LABEL_PX + column * _CELL_PX, row * _CELL_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def draw_prompt(pipe: Any, prompt: str, count: int, guidance: float, seed: int = 0) -> Pictures:
    """Sample `count` pictures, uint8 [count, 64, 64, 3], from one prompt in 20 steps."""
    output = pipe(
        prompt=[prompt] * count,
        height=64,
        width=64,
        guidance_scale=guidance,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    return np.asarray(np.round(output.images * 255), np.uint8)


def world_prompts() -> list[str]:
    """Prompts of the base's own world, then the project's class prompts, which it draws as cartoons too."""
    return [
        "stock illustration of large red house, sky and hills",
        "cartoon of green tree",
        "large yellow sun, striped blue background",
        "orange fish, plain cyan background",
        "illustration of purple flower, dotted pink background, halftone print",
        "blue car, vector art",
        "yellow face, gradient purple background",
        "wound on a blue foot, close-up",
        *MINIMAL.values(),
        DETAILED["I"],
    ]


def phantom_rows(columns: int = 10) -> list[tuple[str, Pictures]]:
    """One row a phase, one column a patient."""
    names = {"I": "I: inflammatory", "P": "P: proliferative", "R": "R: remodeling"}
    return [
        (names[phase], np.stack([render(patient, visit, 0, phase) for patient in range(columns)]))
        for visit, phase in enumerate(PHASES)
    ]


def plot_curve(source: Path, columns: tuple[str, ...], path: Path) -> None:
    """Plot columns of a loss-curve CSV against its minutes, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with source.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(1, len(columns), figsize=(5 * len(columns), 3.2), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        points = [(float(row["minutes"]), float(row[column])) for row in rows if row[column] != "nan"]
        axis.plot(*zip(*points, strict=True))
        axis.set(xlabel="minutes", ylabel=column, yscale="linear" if column.endswith("_db") else "log")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    given = parser.parse_args()
    labelled_grid(phantom_rows(), given.docs / "phantom.png")
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(given.base, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    rows = [(prompt, draw_prompt(pipe, prompt, 8, 3.0)) for prompt in world_prompts()]
    labelled_grid(rows, given.docs / "tiny_sdxl_world.png")
    for name, columns in (("autoencoder", ("squared_error", "held_out_psnr_db")), ("diffusion", ("loss",))):
        curve = given.base / f"loss_curve_{name}.csv"
        if curve.is_file():
            plot_curve(curve, columns, curve.with_suffix(".png"))


if __name__ == "__main__":
    main()

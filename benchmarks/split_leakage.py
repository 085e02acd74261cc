"""What a split that parts pictures of one foot does to floors: `python -m benchmarks.split_leakage FOLDER`.

FOLDER holds photographs whose patients are not known, numbered by file name. The held-out share is drawn three ways:
file by file, by blocks of ten neighbouring numbers, and by look-alikes kept together (average linkage of
EfficientNet-Lite0 features at 128 px). Leakage makes floors too low and the nearest training photograph too near. The
figures come from other pixels than the look-alikes do (64 px; cells of colour), yet not from independent ones.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from dfu_mlflow.data.images import load_rgb
from dfu_mlflow.metrics.coarse_pixels import coarse_pixels
from dfu_mlflow.metrics.extractors.efficientnet import efficientnet_lite0
from dfu_mlflow.metrics.frechet import frechet_distance
from dfu_mlflow.metrics.neighbours import neighbour_figures

BLOCK = 10
HELD_OUT_FRACTION = 0.25
FLOOR_DRAWS = 3
COLUMNS = ("fd floor", "nearest, 10 %", "nearest, median", "coverage")

Groups = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Views:
    """Features of the same N photographs: `looks` [N, D] tells who looks alike, the others are measured."""

    looks: torch.Tensor
    judged: torch.Tensor
    cells: torch.Tensor


def read_views(files: Sequence[Path]) -> Views:
    """Whole pictures, squeezed to squares."""
    network, device = efficientnet_lite0, torch.device("cpu")
    large, small = (_pictures(files, side) for side in (128, 64))
    return Views(network(128, device)(large), network(96, device)(small), coarse_pixels(small))


def _pictures(files: Sequence[Path], side_px: int) -> torch.Tensor:
    squares = [Image.fromarray(load_rgb(file)).resize((side_px, side_px), Image.Resampling.BICUBIC) for file in files]
    return torch.from_numpy(np.stack([np.asarray(square) for square in squares]))


def number_of(file: Path) -> int:
    """The first number in a file's name."""
    found = re.search(r"\d+", file.stem)
    if found is None:
        raise SystemExit(f"{file.name} has no number in its name")
    return int(found.group())


def look_alikes(features: torch.Tensor, share: float) -> Groups:
    """Average linkage, cut at the distance below which `share` of the photographs have their nearest neighbour."""
    distances = torch.cdist(features, features)
    nearest = (distances + torch.eye(len(features)) * distances.max()).amin(1)
    tree = linkage(squareform(distances.numpy(), checks=False), "average")
    return np.asarray(fcluster(tree, float(nearest.quantile(share)), "distance"), np.int64)


def figures(views: Views, groups: Groups, seed: int) -> list[float]:
    """`COLUMNS` of one split: groups are held out in random order until their share is reached."""
    rng = np.random.default_rng(seed)
    count = round(HELD_OUT_FRACTION * len(groups))
    held = np.zeros(len(groups), bool)
    for group in rng.permutation(np.unique(groups)):
        if held.sum() >= count:
            break
        held |= groups == group
    out = torch.from_numpy(rng.permutation(np.flatnonzero(held))[:count])
    rest = [torch.from_numpy(rng.permutation(np.flatnonzero(~held))) for _ in range(FLOOR_DRAWS)]
    floors = [frechet_distance(views.judged[out], views.judged[rows[:count]]) for rows in rest]
    nearest = torch.cdist(views.cells[out], views.cells[rest[0]]).amin(1)
    coverage = neighbour_figures(views.judged[out], views.judged[rest[0][:count]])["coverage"]
    return [float(np.mean(floors)), float(nearest.quantile(0.1)), float(nearest.median()), coverage]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args(arguments)
    files = sorted(path for path in given.folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    numbers = np.array([number_of(file) for file in files])
    views = read_views(files)
    ways = {
        "file by file": np.arange(len(files)),
        f"blocks of {BLOCK} numbers": numbers // BLOCK,
        "look-alikes, nearest 25 %": look_alikes(views.looks, 0.25),
        "look-alikes, nearest 40 %": look_alikes(views.looks, 0.40),
    }
    distances = torch.cdist(views.looks, views.looks).fill_diagonal_(float("inf"))
    gap = np.abs(numbers - numbers[distances.argmin(1).numpy()])
    chance = (np.abs(numbers[:, None] - numbers) <= BLOCK // 2).sum() / len(numbers) ** 2
    near = (gap <= BLOCK // 2).mean()
    print(f"{len(files)} photographs; the nearest look-alike lies within {BLOCK // 2} numbers for {near:.1%}")
    print(f"(by chance {chance:.1%}). Mean and standard error over {given.seeds} splits:")
    print(f"{'held out by':26} {'groups':>6} " + " ".join(f"{name:>16}" for name in COLUMNS))
    for name, groups in ways.items():
        found = np.array([figures(views, groups, seed) for seed in range(given.seeds)])
        errors = found.std(0, ddof=1) / given.seeds**0.5
        cells = [f"{mean:9.3f} ± {error:.3f}" for mean, error in zip(found.mean(0), errors, strict=True)]
        print(f"{name:26} {len(np.unique(groups)):6d} " + " ".join(f"{cell:>16}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

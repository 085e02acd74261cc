"""The likeliest copies beside the photographs they resemble, in a folder of the user's own: a person has to decide.

The pictures show patients. They are written to the local disk, readable by the user alone, and never logged.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfu_mlflow.data.packs import make_private_folder, storage_error, write_private
from dfu_mlflow.metrics.memorisation import Suspect

Pixels = npt.NDArray[np.uint8]

LISTING = "pairs.csv"
PREFIX = "pair_"
GUTTER_PX = 4
MIN_SIDE_PX = 256
"""Smaller pictures are enlarged by a whole factor, so that a person sees something."""
COLUMNS = ("rank", "file", "generated", "photograph", "patient", "features", "ratio", "similarity", "below_threshold")


def write_closest_pairs(
    folder: Path,
    suspects: Sequence[Suspect],
    generated: Pixels,
    photograph: Callable[[int], Pixels],
    names: Sequence[tuple[str, str]],
) -> Path:
    """Write `pair_001.png` (generated left, photograph right) ... and `pairs.csv`, the likeliest copy first.

    Pairs of an earlier call in the same folder are removed. Folder 0700, files 0600, whatever the umask.

    Args:
        folder: made if it is not there.
        suspects: of `MemorisationReport.suspects`, as many as should be written.
        generated: uint8 [M, H, W, 3].
        photograph: row -> uint8 [H, W, 3], called for the rows needed alone.
        names: (file name, patient) of each training photograph.

    Returns:
        The listing.

    Raises:
        UserError: where the folder cannot be written.
    """
    make_private_folder(folder)
    try:
        folder.chmod(0o700)
        for old in [*folder.glob(f"{PREFIX}*.png"), folder / LISTING]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from None
    rows = []
    for rank, suspect in enumerate(suspects, start=1):
        file = f"{PREFIX}{rank:03d}.png"
        pair = _side_by_side(generated[suspect.generated], photograph(suspect.photograph))
        write_private(folder / file, _png(pair))
        name, patient = names[suspect.photograph]
        figures = (f"{suspect.ratio:.4f}", f"{suspect.similarity:.4f}", suspect.below)
        rows.append((rank, file, suspect.generated, name, patient, suspect.features, *figures))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    write_private(folder / LISTING, text.getvalue().encode())
    return folder / LISTING


def _side_by_side(left: Pixels, right: Pixels) -> Pixels:
    """Both at the larger one's height, with a white gutter: uint8 [H, W, 3]."""
    height = max(left.shape[0], right.shape[0])
    height *= -(-MIN_SIDE_PX // height) if height < MIN_SIDE_PX else 1
    parts = [_with_height(each, height) for each in (left, right)]
    gutter = np.full((height, GUTTER_PX, 3), 255, dtype=np.uint8)
    return np.concatenate([parts[0], gutter, parts[1]], axis=1)


def _with_height(picture: Pixels, height: int) -> Pixels:
    width = round(picture.shape[1] * height / picture.shape[0])
    exact = height % picture.shape[0] == 0
    return np.asarray(
        Image.fromarray(picture).resize(
            (width, height), Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS
        )
    )


def _png(picture: Pixels) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    return content.getvalue()

"""One look into every file: can it be used, what is in it, and which other files hold the same picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image

from dfu_mlflow.data.audit import Problem
from dfu_mlflow.data.cache import RowCache
from dfu_mlflow.data.images import decode_rgb
from dfu_mlflow.errors import UserError
from dfu_mlflow.runtime import file_digest

HASH_SIDE = 16
NEAR_BITS = 28
"""Bits of 256 by which copies may differ. Measured: re-encoding at JPEG quality 60, resizing to 70 % and brightening
by 15 % change at most 24 bits (95th percentile 17); the closest pictures of different patients are 38 bits apart among
960 phantoms and 56 among 810 photographs. The common 64-bit hash has no such gap: 10 bits against 2. Of
400 photographs cut out and put on a plain background (5 to 35 % of it) copies are at most 22 bits apart and others at
least 29 where the grid lies over the content alone; where it lay over the background too, that linked a tenth to all
of the pairs."""
PLAIN_LEVELS = 12
"""Of a background: more than JPEG leaves in one colour, less than between it and skin."""
PLAIN_SHARE = 0.95
TRIM_SIDE = 128
"""Of the grid in which a plain background is looked for: wide enough cells to be without noise."""
BLANK_LEVELS = 2
MASK_LEVELS = 12
MASK_BETWEEN = 0.02
"""Largest share of a mask's pixels between its two levels."""
BLOCK = 2048
VERSION = 3
"""Of what `inspect_file` does: change it when the same file would be described otherwise."""
ROW_BYTES = 8 + 32 + HASH_SIDE**2 // 8
FILES_AT_ONCE = 64


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        digest: SHA-256 of its bytes.
        size_px: (width, height), upright.
        pixel_digest: SHA-256 of its decoded pixels: equal for copies with other names, metadata or lossless formats.
        difference_hash: bool [256], see `difference_hash`.
    """

    digest: str
    size_px: tuple[int, int]
    pixel_digest: str
    difference_hash: npt.NDArray[np.bool_]


def inspect_files(
    paths: Sequence[Path], min_side_px: int, cache: RowCache
) -> tuple[dict[Path, Inspection], list[Problem]]:
    """Look into every file, in threads; files that cannot be used come back as problems.

    What a file holds is kept under its digest, so that files are decoded once and only read (a tenth of the time for
    photographs of a megapixel) from then on. Problems are looked at anew: their sentences name the file.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip(paths, pool.map(_digest, paths), strict=True))
        readable = [path for path in paths if digests[path]]

        def compute(positions: list[int]) -> torch.Tensor:
            looked = pool.map(lambda position: inspect_file(readable[position], min_side_px), positions)
            return torch.from_numpy(np.stack([_to_row(item) for item in looked]))

        keys = [f"{digests[path]}:{min_side_px}" for path in readable]
        rows = cache.rows(f"inspections-{VERSION}-pillow-{PIL.__version__}", keys, compute, FILES_AT_ONCE)
    known = dict(zip(readable, rows.numpy(), strict=True))
    good: dict[Path, Inspection] = {}
    problems: list[Problem] = []
    for path in paths:
        item = _from_row(known[path], digests[path]) if path in known else None
        found = item or inspect_file(path, min_side_px)
        if isinstance(found, Inspection):
            good[path] = found
        else:
            problems.append(found)
    return good, problems


def _digest(path: Path) -> str:
    """SHA-256 of a file's bytes, or nothing where it cannot be read."""
    try:
        return file_digest(path)
    except OSError:
        return ""


def _to_row(item: Inspection | Problem) -> npt.NDArray[np.uint8]:
    """uint8 [72]: width and height, pixel digest, difference hash; all zero for a problem."""
    if isinstance(item, Problem):
        return np.zeros(ROW_BYTES, dtype=np.uint8)
    size = np.array(item.size_px, dtype="<u4").tobytes()
    packed = np.packbits(item.difference_hash).tobytes()
    return np.frombuffer(size + bytes.fromhex(item.pixel_digest) + packed, dtype=np.uint8)


def _from_row(row: npt.NDArray[np.uint8], digest: str) -> Inspection | None:
    """What `_to_row` wrote; None for a problem."""
    content = row.tobytes()
    width, height = np.frombuffer(content[:8], dtype="<u4").tolist()
    if not width:
        return None
    bits = np.unpackbits(np.frombuffer(content[40:], dtype=np.uint8)).astype(bool)
    return Inspection(digest, (width, height), content[8:40].hex(), bits)


def inspect_file(path: Path, min_side_px: int) -> Inspection | Problem:
    """Decode one file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Problem(path, "missing file", "no such file")
    except OSError as error:
        return Problem(path, "unreadable", str(error.strerror))
    if not content:
        return Problem(path, "empty file", "0 bytes")
    try:
        pixels = decode_rgb(content, path.name)
    except UserError as error:
        return Problem(path, "unreadable", str(error).partition(": ")[2])
    height, width = pixels.shape[:2]
    if min(height, width) < min_side_px:
        return Problem(path, "too small", f"{width}x{height}, below --data.min_side_px {min_side_px}")
    image = Image.fromarray(pixels)
    if all(int(np.ptp(np.asarray(band.getextrema()))) <= BLANK_LEVELS for band in image.split()):
        return Problem(path, "blank", "one colour all over")
    if _is_mask(pixels):
        return Problem(path, "mask", "two levels of grey, as a segmentation has: no photograph")
    pixel_digest = hashlib.sha256(f"{width}x{height}".encode())
    pixel_digest.update(pixels.data)
    return Inspection(
        digest=hashlib.sha256(content).hexdigest(),
        size_px=(width, height),
        pixel_digest=pixel_digest.hexdigest(),
        difference_hash=difference_hash(image),
    )


def _is_mask(pixels: npt.NDArray[np.uint8]) -> bool:
    """Two levels of grey and nothing between them, but for what JPEG leaves at the edges."""
    grey = pixels[..., 0]
    if not (np.array_equal(grey, pixels[..., 1]) and np.array_equal(grey, pixels[..., 2])):
        return False
    low, high = int(grey.min()), int(grey.max())
    between = (grey > low + MASK_LEVELS) & (grey < high - MASK_LEVELS)
    return high - low > 4 * MASK_LEVELS and float(between.mean()) < MASK_BETWEEN


def difference_hash(image: Image.Image) -> npt.NDArray[np.bool_]:
    """dHash (Krawetz 2013) of 256 bits: is each cell of a 16 x 16 grid brighter than its left neighbour? bool [256].

    The grid lies over what a plain background leaves: its cells would be equal in all pictures of one studio.
    """
    box = content_box(image)
    cells = np.asarray(image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX, box))
    return (cells[:, 1:] > cells[:, :-1]).reshape(-1)


def content_box(image: Image.Image) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of what is not background; the whole where the edge has several colours.

    Two standard deviations about the content's centre, which is an ellipse's extent: outermost pixels are noise.
    """
    grid = np.asarray(image.convert("RGB").resize((TRIM_SIDE, TRIM_SIDE), Image.Resampling.BOX)).astype(int)
    edge = np.concatenate([grid[0], grid[-1], grid[1:-1, 0], grid[1:-1, -1]])
    background = np.median(edge, axis=0)
    plain = (np.abs(edge - background).max(axis=1) <= PLAIN_LEVELS).mean() >= PLAIN_SHARE
    content = np.abs(grid - background).max(axis=2) > PLAIN_LEVELS
    if not plain or not content.any():
        return (0.0, 0.0, float(image.width), float(image.height))
    left, right = _extent(content.sum(axis=0), image.width)
    top, bottom = _extent(content.sum(axis=1), image.height)
    return (left, top, right, bottom)


def _extent(weights: npt.NDArray[np.int_], length: int) -> tuple[float, float]:
    places = (np.arange(TRIM_SIDE) + 0.5) * length / TRIM_SIDE
    centre = float(np.average(places, weights=weights))
    half = max(2 * float(np.average((places - centre) ** 2, weights=weights)) ** 0.5, length / TRIM_SIDE)
    return max(0.0, centre - half), min(float(length), centre + half)


def near_pairs(hashes: npt.NDArray[np.bool_], patients: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs i < j of pictures [N, 256] that look alike although their patients differ; O(N²) by blocks of products."""
    signs = np.where(hashes, 1.0, -1.0).astype(np.float32)
    _, who = np.unique(np.asarray(patients), return_inverse=True)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(signs), BLOCK):
        distances = (signs.shape[1] - signs[start : start + BLOCK] @ signs.T) / 2
        rows, columns = np.nonzero(distances <= NEAR_BITS)
        rows += start
        chosen = (rows < columns) & (who[rows] != who[columns])
        pairs += list(zip(rows[chosen].tolist(), columns[chosen].tolist(), strict=True))
    return pairs

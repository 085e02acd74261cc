"""One look into every file: can it be used, what is in it, and which other files hold the same picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image

from dfu_mlflow.data.audit import Problem
from dfu_mlflow.data.cache import RowCache, Work
from dfu_mlflow.data.images import decode_rgb
from dfu_mlflow.errors import UserError
from dfu_mlflow.phases import phase
from dfu_mlflow.runtime import file_digest

HASH_SIDE = 16
NEAR_BITS = 28
"""Bits of 256 by which copies may differ. Measured: re-encoding at JPEG quality 60, resizing to 70 % and brightening
by 15 % change at most 24 bits (95th percentile 17); the closest pictures of different patients are 38 bits apart among
960 phantoms and 56 among 810 photographs. The common 64-bit hash has no such gap: 10 bits against 2. Of
400 photographs cut out and put on a plain background (5 to 35 % of it) copies are at most 22 bits apart and others at
least 29 where the grid lies over the content alone; where it lies over the background too, that links a tenth to all
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
VERSION = 4
"""Of what `inspect_file` does: change it when the same file would be described otherwise."""
HASH_BYTES = HASH_SIDE**2 // 8
ROW_BYTES = 8 + 32 + 1 + 2 * HASH_BYTES
FILES_AT_ONCE = 64


class Hashes(NamedTuple):
    """What a picture looks like: dHashes (Krawetz 2013), see `difference_hash`.

    Attributes:
        whole: bool [256], of all of it.
        content: bool [256], of what a plain background leaves; None where there is no such background.
    """

    whole: npt.NDArray[np.bool_]
    content: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        digest: SHA-256 of its bytes.
        size_px: (width, height), upright.
        pixel_digest: SHA-256 of its decoded pixels: equal for copies with other names, metadata or lossless formats.
        hashes: copies have nearly the same, see `near_pairs`.
    """

    digest: str
    size_px: tuple[int, int]
    pixel_digest: str
    hashes: Hashes


def inspect_files(
    paths: Sequence[Path], min_side_px: int, cache: RowCache
) -> tuple[dict[Path, Inspection], list[Problem]]:
    """Look into every file, in threads; files that cannot be used come back as problems.

    What a file holds is kept under its digest, so that files are decoded once and only read (a tenth of the time for
    photographs of a megapixel) from then on. Problems are looked at anew: their sentences name the file.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = _digests(paths, pool)
        readable = [path for path in paths if digests[path]]

        def compute(positions: list[int]) -> torch.Tensor:
            looked = pool.map(lambda position: inspect_file(readable[position], min_side_px), positions)
            return torch.from_numpy(np.stack([_to_row(item) for item in looked]))

        keys = [f"{digests[path]}:{min_side_px}" for path in readable]
        kind = f"inspections-{VERSION}-pillow-{PIL.__version__}"
        rows = cache.rows(kind, keys, compute, FILES_AT_ONCE, Work("looking into the photographs", "files"))
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


def _digests(paths: Sequence[Path], pool: ThreadPoolExecutor) -> dict[Path, str]:
    found: dict[Path, str] = {}
    with phase("reading the photographs", len(paths), "files") as progress:
        for path, digest in zip(paths, pool.map(_digest, paths), strict=True):
            found[path] = digest
            progress.advance()
    return found


def _digest(path: Path) -> str:
    """SHA-256 of a file's bytes, or nothing where it cannot be read."""
    try:
        return file_digest(path)
    except OSError:
        return ""


def _to_row(item: Inspection | Problem) -> npt.NDArray[np.uint8]:
    """uint8 [105]: width and height, pixel digest, is the background plain, two hashes; all zero for a problem."""
    if isinstance(item, Problem):
        return np.zeros(ROW_BYTES, dtype=np.uint8)
    size = np.array(item.size_px, dtype="<u4").tobytes()
    whole, content = item.hashes
    packed = np.packbits(np.stack([whole, whole if content is None else content])).tobytes()
    plain = bytes([content is not None])
    return np.frombuffer(size + bytes.fromhex(item.pixel_digest) + plain + packed, dtype=np.uint8)


def _from_row(row: npt.NDArray[np.uint8], digest: str) -> Inspection | None:
    """What `_to_row` wrote; None for a problem."""
    content = row.tobytes()
    width, height = np.frombuffer(content[:8], dtype="<u4").tolist()
    if not width:
        return None
    whole, inner = np.unpackbits(np.frombuffer(content[41:], dtype=np.uint8)).astype(bool).reshape(2, -1)
    return Inspection(digest, (width, height), content[8:40].hex(), Hashes(whole, inner if content[40] else None))


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
        hashes=hashes_of(image),
    )


def _is_mask(pixels: npt.NDArray[np.uint8]) -> bool:
    """Two levels of grey and nothing between them, but for what JPEG leaves at the edges."""
    grey = pixels[..., 0]
    if not (np.array_equal(grey, pixels[..., 1]) and np.array_equal(grey, pixels[..., 2])):
        return False
    low, high = int(grey.min()), int(grey.max())
    between = (grey > low + MASK_LEVELS) & (grey < high - MASK_LEVELS)
    return high - low > 4 * MASK_LEVELS and float(between.mean()) < MASK_BETWEEN


def hashes_of(image: Image.Image) -> Hashes:
    """The hash of the whole picture, and that of its content."""
    box = content_box(image)
    return Hashes(difference_hash(image), None if box is None else difference_hash(image, box))


def difference_hash(image: Image.Image, box: tuple[float, float, float, float] | None = None) -> npt.NDArray[np.bool_]:
    """dHash (Krawetz 2013) of 256 bits: is each cell of a 16 x 16 grid brighter than its left neighbour? bool [256].

    Args:
        box: (left, top, right, bottom) in pixels that the grid lies over; None is the whole.
    """
    cells = np.asarray(image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX, box))
    return (cells[:, 1:] > cells[:, :-1]).reshape(-1)


def content_box(image: Image.Image) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) in pixels of what is not background; None where the edge has several colours.

    Two standard deviations about the content's centre, which is an ellipse's extent: outermost pixels are noise.
    """
    grid = np.asarray(image.convert("RGB").resize((TRIM_SIDE, TRIM_SIDE), Image.Resampling.BOX)).astype(int)
    edge = np.concatenate([grid[0], grid[-1], grid[1:-1, 0], grid[1:-1, -1]])
    background = np.median(edge, axis=0)
    plain = (np.abs(edge - background).max(axis=1) <= PLAIN_LEVELS).mean() >= PLAIN_SHARE
    content = np.abs(grid - background).max(axis=2) > PLAIN_LEVELS
    if not plain or not content.any():
        return None
    left, right = _extent(content.sum(axis=0), image.width)
    top, bottom = _extent(content.sum(axis=1), image.height)
    return (left, top, right, bottom)


def _extent(weights: npt.NDArray[np.int_], length: int) -> tuple[float, float]:
    places = (np.arange(TRIM_SIDE) + 0.5) * length / TRIM_SIDE
    centre = float(np.average(places, weights=weights))
    half = max(2 * float(np.average((places - centre) ** 2, weights=weights)) ** 0.5, length / TRIM_SIDE)
    return max(0.0, centre - half), min(float(length), centre + half)


def near_pairs(hashes: Sequence[Hashes], patients: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs i < j of pictures [N] that look alike although their patients differ; O(N²) by blocks of products.

    Two on plain backgrounds are compared by their content: the cells of a background are equal in all pictures of one
    studio. A copy in which a background is no longer plain (or is only now) is known by the whole.
    """
    whole = _signs([item.whole for item in hashes])
    content = _signs([item.whole if item.content is None else item.content for item in hashes])
    plain = np.array([item.content is not None for item in hashes], dtype=bool)
    _, who = np.unique(np.asarray(patients), return_inverse=True)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(whole), BLOCK):
        block = slice(start, start + BLOCK)
        alike = np.where(plain[block, None] & plain, content[block] @ content.T, whole[block] @ whole.T)
        rows, columns = np.nonzero((whole.shape[1] - alike) / 2 <= NEAR_BITS)
        rows += start
        chosen = (rows < columns) & (who[rows] != who[columns])
        pairs += list(zip(rows[chosen].tolist(), columns[chosen].tolist(), strict=True))
    return pairs


def _signs(hashes: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.float32]:
    return np.where(np.stack(hashes), 1.0, -1.0).astype(np.float32)

"""What a report says, apart from how it looks."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """A plot or a grid of samples.

    Attributes:
        caption: one sentence.
        source: what `img src` takes: a `data:` address, so that the file needs nothing beside it.
        width_px: natural width; 0 lets it fill the column.
    """

    caption: str
    source: str
    width_px: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        caption: one sentence, may be empty.
        columns: headings.
        rows: one text a column.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it, in this order."""

    title: str
    sentences: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Report:
    """The whole document.

    Attributes:
        title: heading and window title.
        summary: sentences a reader in a hurry sees first.
        sections: the rest.
        footer: what the figures depend on: metric identities, versions.
    """

    title: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    footer: tuple[str, ...]


def png_source(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a `data:` address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def svg_source(svg: str) -> str:
    """An SVG document -> a `data:` address."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"

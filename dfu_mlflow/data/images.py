"""Any picture a camera, scanner or annotation tool wrote -> upright 8-bit RGB."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from dfu_mlflow.errors import UserError

Pixels = npt.NDArray[np.uint8]

TWELVE_BITS = 4095
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def load_rgb(path: Path) -> Pixels:
    """Decode an image file: EXIF orientation applied, alpha on white, greyscale and CMYK converted, first frame only.

    Colours are those of sRGB: a profile in the file (phones write Display P3, cameras Adobe RGB) is followed.

    Returns:
        uint8 [H, W, 3].

    Raises:
        UserError: for a file that is missing, truncated or no image.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return decode_rgb(content, str(path))


def decode_rgb(content: bytes, name: str) -> Pixels:
    """`load_rgb` of a file's bytes; `name` is what messages call it."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.array(_upright_rgb(image))
    except UnidentifiedImageError:
        kind = "HEIC, whatever its name: convert it" if content[4:8] == b"ftyp" else "not an image in a known format"
        raise UserError(f"{name} cannot be decoded: {kind}") from None
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, struct.error, KeyError and others
        raise UserError(f"{name} cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = _in_srgb(ImageOps.exif_transpose(image))
    if image.mode in DEEP_MODES:
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _in_srgb(image: Image.Image) -> Image.Image:
    """What a colour profile means; one that is broken or of another kind of image is left aside, as viewers do."""
    content = image.info.get("icc_profile")
    if not content or image.mode not in ("RGB", "CMYK"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted or image


def _to_8_bit(values: npt.NDArray[np.generic]) -> Pixels:
    """Scale a deep greyscale image [H, W] by its container's range; Pillow's own `convert` clips at 255.

    Floats are taken as 0..1, 0..255 or 0..65535, whichever is the smallest range that holds them.

    Raises:
        ValueError: for 16 bits of which 12 or fewer are used: nearly black, and nobody can tell which range was meant.
    """
    deep = values.astype(np.float64)
    if not np.isfinite(deep).all():
        raise ValueError("not finite in some pixels")
    if deep.min() < 0:
        deep = deep - deep.min()
    if values.dtype.kind != "f" and 0 < deep.max() <= TWELVE_BITS:
        raise ValueError(f"16 bits a pixel, none brighter than {deep.max():.0f} of 65535: scale it to 8 bits")
    ceilings = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (65535.0,)
    ceiling = next((top for top in ceilings if deep.max() <= top), deep.max())
    return np.rint(deep * (255.0 / ceiling)).astype(np.uint8)

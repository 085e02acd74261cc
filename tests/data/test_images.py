"""Every odd format becomes upright 8-bit RGB."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dfu_mlflow.data import load_rgb
from dfu_mlflow.errors import UserError

RAMP = np.linspace(0, 1, 40 * 30).reshape(30, 40)


def test_plain_png_is_untouched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_rgb(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20] = (200, 60, 20)  # the upper left corner is marked
    stored = {  # inverse of what a viewer does for each EXIF value
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_rgb(tmp_path / "a.png"), upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0)).convert(mode)
    image.paste(Image.new("RGBA", (16, 32), (0, 0, 0, 128)).convert(mode), (0, 0))
    image.save(tmp_path / "a.png")
    pixels = load_rgb(tmp_path / "a.png")
    assert (pixels[:, 16:] == 255).all()
    assert (abs(pixels[:, :16].astype(int) - 127) <= 1).all()


def test_transparent_palette_colour_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 750)
    image.paste(0, (0, 0, 4, 8))
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "transparent.png", transparency=0)
    assert load_rgb(tmp_path / "plain.png")[0, 0].tolist() == [10, 20, 30]
    assert load_rgb(tmp_path / "transparent.png")[0, 0].tolist() == [255, 255, 255]
    assert load_rgb(tmp_path / "transparent.png")[0, 7].tolist() == [200, 100, 50]


def test_greyscale_and_bilevel_are_repeated_over_channels(tmp_path: Path) -> None:
    grey = Image.fromarray((RAMP * 255).astype(np.uint8))
    grey.save(tmp_path / "grey.png")
    grey.convert("1").save(tmp_path / "bilevel.png")
    pixels = load_rgb(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels, np.asarray(grey)[..., None].repeat(3, 2))
    assert set(np.unique(load_rgb(tmp_path / "bilevel.png"))) == {0, 255}


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert (abs(load_rgb(tmp_path / "a.jpg").astype(int) - [255, 0, 0]) <= 3).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(load_rgb(tmp_path / f"a.{suffix}")[..., 1], RAMP * 255, atol=0.51)


@pytest.mark.parametrize("ceiling", [1.0, 255.0, 65535.0])
def test_float_tiff_is_scaled_by_its_range(tmp_path: Path, ceiling: float) -> None:
    Image.fromarray((RAMP * ceiling).astype(np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_allclose(load_rgb(tmp_path / "a.tif")[..., 0], RAMP * 255, atol=0.51)


def test_animation_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("#ff0000", "#00ff00")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_rgb(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_file_is_an_error(tmp_path: Path, kind: str) -> None:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, kind)
    (tmp_path / "a.img").write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    with pytest.raises(UserError, match=r"a\.img cannot be decoded: \w+"):
        load_rgb(tmp_path / "a.img")


def test_text_and_missing_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(UserError, match="not an image in a known format"):
        load_rgb(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_rgb(tmp_path / "b.png")


def swapped_profile() -> bytes:
    """sRGB's own with the primaries of red and green changed over, under another name."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = range(132, 132 + 12 * int.from_bytes(content[128:132], "big"), 12)
    entries = {bytes(content[at : at + 4]): at for at in table}
    red, green = (slice(entries[name] + 4, entries[name] + 12) for name in (b"rXYZ", b"gXYZ"))
    content[red], content[green] = content[green], content[red]
    return bytes(content).replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


@pytest.mark.parametrize(("profile", "seen"), [(swapped_profile(), 1), (b"broken", 0), (None, 0)])
def test_a_colour_profile_is_followed_where_it_can_be(tmp_path: Path, profile: bytes | None, seen: int) -> None:
    red = Image.new("RGB", (4, 4), (230, 20, 20))
    red.save(tmp_path / "a.png", icc_profile=profile)
    (pixel,) = {tuple(pixel) for pixel in load_rgb(tmp_path / "a.png").reshape(-1, 3).tolist()}
    assert int(np.argmax(pixel)) == seen
    assert (pixel == (230, 20, 20)) == (seen == 0)

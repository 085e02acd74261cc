"""The stock-illustration world that `tiny_sdxl` knows before it meets a clinic: cartoons with rich captions.

Saturated palettes, thick outlines, clean gradients, halftone and paper. Half of the pictures show feet, legs and hands,
most of them with a "wound" as an illustrator with no clinic would draw it. Phase words choose *symbols* (inflammatory:
a zigzag; proliferative: beads; remodeling: stitches); place, size, outline and colour are drawn independently of it, so
that a classifier trained on phantoms is at chance on these pictures: the base knows no phase of the clinic.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dfu_mlflow.base.pretraining.subjects import Colour, Pen, lighter, limbs, subjects

Picture = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float32]
_OVERSAMPLING = 2
_WOUND_SHARE = 0.45


@dataclass(frozen=True)
class _Paint:
    """Colours by the names captions use."""

    fills: dict[str, Colour]
    skins: dict[str, Colour]


@dataclass(frozen=True)
class _Wound:
    phase: str  # "" when the caption does not say
    colour: str
    size: str


def _paint() -> _Paint:
    fills = {
        "red": (225, 45, 45),
        "orange": (245, 140, 30),
        "yellow": (250, 215, 50),
        "green": (60, 180, 75),
        "blue": (50, 110, 220),
        "purple": (150, 70, 190),
        "pink": (250, 130, 180),
        "brown": (150, 95, 45),
        "white": (245, 245, 245),
        "black": (45, 45, 55),
        "cyan": (70, 205, 220),
        "grey": (150, 155, 165),
    }
    skins = {
        "pale": (255, 222, 196),
        "tan": (240, 180, 130),
        "brown": (175, 110, 65),
        "dark": (115, 70, 45),
        "green": (140, 205, 120),
        "blue": (130, 170, 230),
        "yellow": (255, 214, 90),
        "purple": (190, 140, 220),
    }
    return _Paint(fills, skins)


def draw_scene(rng: np.random.Generator, size_px: int = 64) -> tuple[Picture, str]:
    """Draw one illustration and write its caption.

    Returns:
        uint8 RGB picture [size_px, size_px, 3] and a caption of 2 to about 70 tokens.
    """
    paint = _paint()
    side = size_px * _OVERSAMPLING
    back, back_words = _background(rng, paint, size_px)
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    words = _wounded_limb(rng, paint, layer) if rng.random() < _WOUND_SHARE else _plain_subject(rng, paint, layer)
    flat = np.asarray(np.asarray(layer.reduce(_OVERSAMPLING)) / 255, np.float32)
    picture = _compose(rng, flat, back)
    picture, style_words = _style(rng, picture)
    return np.asarray(np.clip(255 * picture + 0.5, 0, 255), np.uint8), _caption(rng, words, back_words, style_words)


def _pick(rng: np.random.Generator, options: list[str] | tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _background(rng: np.random.Generator, paint: _Paint, size_px: int) -> tuple[Field, str]:
    """Clean gradients and patterns [H, W, 3] with their words."""
    name = _pick(rng, list(paint.fills))
    colour = np.array(paint.fills[name], np.float32) / 255
    kind = _pick(rng, ("plain", "gradient", "dotted", "striped", "sky and hills", "sunburst", "table"))
    axis = np.linspace(-1, 1, size_px, dtype=np.float32)
    x, y = axis[None, :], axis[:, None]
    pale = 0.55 * colour + 0.45
    if kind == "plain":
        weight = 0.12 * (x + y)
    elif kind == "gradient":
        weight = y * float(rng.choice([-0.9, 0.9])) + 0 * x
    elif kind == "dotted":
        weight = 1.6 * ((np.cos(14 * x) * np.cos(14 * y)) > 0.45) - 0.6
    elif kind == "striped":
        weight = np.where(np.sin(9 * (x + float(rng.choice([-1, 0, 1])) * y)) > 0, 0.8, -0.6)
    elif kind == "sunburst":
        weight = np.where(np.sin(10 * np.arctan2(y + 0.1, x)) > 0, 0.7, -0.5)
    else:
        line = 0.35 + (0.12 * np.sin(3 * x + rng.uniform(0, 6)) if kind == "sky and hills" else 0 * x)
        ground = np.array(paint.fills["green" if kind == "sky and hills" else "brown"], np.float32) / 255
        sky = pale * (1 - 0.15 * y[..., None]) + 0 * x[..., None]
        below = (y > line)[..., None]
        return np.asarray(np.where(below, ground * (1.1 - 0.25 * y[..., None]), sky), np.float32), f"{name} {kind}"
    shade = (0.5 + 0.5 * np.clip(weight, -1, 1))[..., None]
    return np.asarray(colour + shade * (pale - colour), np.float32), f"{kind} {name} background"


def _pen(rng: np.random.Generator, layer: Image.Image, scale: float, spread: float) -> tuple[Pen, str]:
    side = layer.size[0]
    x, y = (float(np.clip(rng.normal(0, spread), -0.45, 0.45)) for _ in range(2))
    where = "left" if x < -0.15 else "right" if x > 0.15 else "top" if y < -0.15 else "bottom" if y > 0.15 else "centre"
    centre = (side * (0.5 + 0.5 * x), side * (0.5 + 0.5 * y))
    ink: Colour = (25, 20, 35) if rng.random() < 0.8 else (80, 30, 60)
    pen = Pen(ImageDraw.Draw(layer), centre, scale * side / 2, float(rng.normal(0, 0.15)), ink, _OVERSAMPLING * 2, rng)
    return pen, where


def _plain_subject(rng: np.random.Generator, paint: _Paint, layer: Image.Image) -> str:
    shapes = {**subjects(), **(limbs() if rng.random() < 0.25 else {})}
    name = _pick(rng, list(shapes))
    size = _pick(rng, ("small", "large", ""))
    scale = {"small": 0.38, "large": 0.8, "": 0.58}[size] * float(np.exp(rng.normal(0, 0.08)))
    colour = _pick(rng, list(paint.fills))
    pen, where = _pen(rng, layer, scale, 0.22)
    shapes[name](pen, paint.fills[colour])
    if rng.random() < 0.15:
        second = _pick(rng, list(subjects()))
        other, there = _pen(rng, layer, 0.3, 0.4)
        subjects()[second](other, paint.fills[_pick(rng, list(paint.fills))])
        return " ".join(f"{size} {colour} {name} and a {second} on the {there}".split())
    return " ".join(f"{size} {colour} {name} {'' if rng.random() < 0.6 else 'at the ' + where}".split())


def _wounded_limb(rng: np.random.Generator, paint: _Paint, layer: Image.Image) -> str:
    name = _pick(rng, list(limbs()))
    skin = _pick(rng, list(paint.skins))
    near = rng.random() < 0.4
    scale = (1.25 if near else 0.75) * float(np.exp(rng.normal(0, 0.1)))
    pen, _ = _pen(rng, layer, scale, 0.12)
    limbs()[name](pen, paint.skins[skin])
    wound = _Wound(
        _pick(rng, ("inflammatory", "proliferative", "remodeling", "")),
        _pick(rng, list(paint.fills)),
        _pick(rng, ("small", "large", "")),
    )
    _draw_wound(rng, pen, wound, paint)
    place = f"on a {skin} {name}" if rng.random() < 0.6 else _pick(rng, (f"on {name}", "", f"{skin} skin"))
    return f"{_wound_words(rng, wound)} {place}{', close-up' if near and rng.random() < 0.7 else ''}".strip()


def _draw_wound(rng: np.random.Generator, pen: Pen, wound: _Wound, paint: _Paint) -> None:
    """An illustrator's ulcer: an outlined blob with a symbol in it.

    The phase chooses the symbol and nothing else. Place, size, colour and outline come from one pool, and every symbol
    covers about as much of the blob with the same ink: a judge of photographs must find nothing to go by.
    """
    fill = paint.fills[wound.colour]
    r = {"small": 0.2, "large": 0.42, "": 0.3}[wound.size]
    x, y = float(rng.normal(0, 0.08)), float(rng.normal(0.15, 0.12))
    angle = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    wobble = 1 + 0.14 * np.cos(3 * angle + rng.uniform(0, 6))
    pen.polygon([(x + a, y + b) for a, b in ring * wobble[:, None] * r], fill)
    mark = lighter(fill, 0.6) if rng.random() < 0.5 else lighter(fill, -0.35)
    if wound.phase == "inflammatory":
        zigzag = [(x + r * (-0.7 + 0.28 * k), y + r * (0.4 if k % 2 else -0.4)) for k in range(6)]
        pen.line(zigzag, mark, 1.5)
    elif wound.phase == "proliferative":
        for k in range(7):
            a, b = (0.0, 0.0) if k == 6 else ring[k * 3] * 0.6 * r
            pen.dot(x + a, y + b, 0.17 * r, mark)
    elif wound.phase == "remodeling":
        pen.line([(x - 0.75 * r, y), (x + 0.75 * r, y)], mark, 1.2)
        for k in range(4):
            at = x + r * (-0.54 + 0.36 * k)
            pen.line([(at, y - 0.35 * r), (at, y + 0.35 * r)], mark, 1.2)
    else:
        pen.oval(x, y, 0.5 * r, 0.45 * r, mark)


def _wound_words(rng: np.random.Generator, wound: _Wound) -> str:
    kind = _pick(
        rng, ("diabetic foot ulcer", "diabetic foot ulcer wound", "ulcer", "wound", "foot ulcer", "open wound")
    )
    words = [" ".join(w for w in (wound.size, wound.colour, kind) if w and (w != wound.size or rng.random() < 0.7))]
    if rng.random() < 0.35:
        words = [kind]
    if wound.phase:
        words.append(_pick(rng, (f", {wound.phase} phase", f" in {wound.phase} phase")))
        if rng.random() < 0.5:
            words.append(", " + _pick(rng, _phrases(wound.phase)))
        if rng.random() < 0.3:
            words.append(", " + _pick(rng, _phrases(wound.phase)))
    return "".join(words)


def _phrases(phase: str) -> tuple[str, ...]:
    """Phrases as in textbook prompts, so that over-specified prompts hit what the base already draws."""
    return {
        "inflammatory": (
            "acute open wound with redness erythema and swelling edema around wound margins",
            "early wound response showing tissue inflammation and wound debridement stage",
            "acute wound with redness and swelling",
            "detailed wound bed texture with surrounding inflamed tissue",
        ),
        "proliferative": (
            "open wound with red granulation tissue and new blood vessels filling the wound bed",
            "active wound response showing tissue growth and wound contraction stage",
            "open wound with red granulation tissue",
            "detailed wound bed texture with surrounding healthy tissue",
        ),
        "remodeling": (
            "closed wound with pale pink scar tissue and new epithelium over wound margins",
            "late wound response showing tissue maturation and wound closure stage",
            "closed wound with pale scar tissue",
            "detailed scar surface texture with surrounding healed tissue",
        ),
    }[phase]


def _compose(rng: np.random.Generator, layer: Field, back: Field) -> Field:
    """Lay the drawing over its background with a drop shadow, and shade it as vector art is: one clean gradient."""
    alpha = layer[..., 3:]
    colour = layer[..., :3] / np.maximum(alpha, 1e-3) * (alpha > 0.02)
    size_px = layer.shape[0]
    axis = np.linspace(-1, 1, size_px, dtype=np.float32)
    shade = 1 + rng.uniform(0.05, 0.22) * (-axis[None, :] * rng.choice([-1, 1]) - axis[:, None])
    if rng.random() < 0.6:
        dx, dy = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        shadow = np.roll(alpha, (dy, dx), (0, 1)) * 0.35
        back = back * (1 - shadow)
    return np.asarray(back + alpha * (np.clip(colour * shade[..., None], 0, 1) - back), np.float32)


def _style(rng: np.random.Generator, picture: Field) -> tuple[Field, str]:
    """Print textures, each with the words that stock sites would put under them."""
    size_px = picture.shape[0]
    axis = np.arange(size_px)
    draw = rng.random()
    if draw < 0.25:
        grain = rng.standard_normal((size_px // 2 + 1, size_px // 2 + 1, 1)).repeat(2, 0).repeat(2, 1)
        return np.asarray(picture * (1 + 0.05 * grain[:size_px, :size_px]), np.float32), "textured paper"
    if draw < 0.45:
        dots = np.cos(axis[None, :] * 1.6) * np.cos(axis[:, None] * 1.6)
        return np.asarray(picture + 0.09 * dots[..., None] * (1.1 - picture), np.float32), "halftone print"
    if draw < 0.65:
        wash = np.kron(rng.standard_normal((5, 5)), np.ones((size_px // 4, size_px // 4)))[:size_px, :size_px]
        smooth = (
            Image.fromarray(wash.astype(np.float32)).resize((5, 5)).resize((size_px, size_px), Image.Resampling.BICUBIC)
        )
        return np.asarray(picture * (1 + 0.10 * np.asarray(smooth)[..., None]), np.float32), "watercolour wash"
    return picture, _pick(rng, ("vector art", "flat design", "clip art"))


def _caption(rng: np.random.Generator, words: str, back_words: str, style_words: str) -> str:
    draw = rng.random()
    if draw < 0.25:
        return words
    opening = (
        "stock illustration of ",
        "illustration of ",
        "cartoon of ",
        "Close-up clinical photograph of ",
        "drawing of ",
    )
    text = (_pick(rng, opening) if rng.random() < 0.6 else "") + words
    if rng.random() < 0.6:
        text += ", " + back_words
    if rng.random() < 0.5:
        text += ", " + style_words
    if rng.random() < 0.4:
        text += ", professional medical documentation" if rng.random() < 0.7 else ", stock photo"
    if rng.random() < 0.4:
        text += ", high resolution, sharp focus, clinical lighting" if rng.random() < 0.6 else ", high resolution"
    return text

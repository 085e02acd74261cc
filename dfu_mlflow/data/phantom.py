"""Phantom clinic photographs: a procedural stand-in for private photographs of diabetic foot ulcers.

As in medical physics, a phantom has known factors, so that exact tests are possible: skin tone, limb outline and wound
site belong to the patient, the wound bed to phase and visit, light, framing and noise to the image. All texture is
coarse (at most about 12 cycles a side): an autoencoder keeps one cell per 4 x 4 pixels, so finer would be pure floor.

What a nurse looks for: I (inflammatory) a dark red bed with yellow slough, swelling and a red halo; P (proliferative) a
beefy, granulating, moist bed with a pale rim; R (remodeling) a small dry scar with a wrinkled rim.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float32]
PHASES = ("I", "P", "R")
# Lowest and highest radius of the wound in units of half a picture side.
_RADIUS = {"I": (0.40, 0.56), "P": (0.36, 0.52), "R": (0.24, 0.36)}
# Height of the wound's edge and of its bed against the skin, and how bumpy the bed is: drives the relief shading.
_RELIEF = {"I": (0.10, -0.08, 0.022), "P": (0.03, -0.03, 0.032), "R": (0.02, 0.03, 0.012)}
_SKIN = ((0.93, 0.76, 0.68), (0.86, 0.66, 0.54), (0.74, 0.53, 0.40), (0.56, 0.38, 0.27), (0.40, 0.27, 0.20))
_CLOTH = ((0.30, 0.52, 0.66), (0.20, 0.45, 0.42), (0.80, 0.82, 0.84), (0.10, 0.11, 0.13), (0.30, 0.28, 0.28))


@dataclass(frozen=True)
class _Patient:
    skin: Array  # [3], linear RGB
    cloth: Array  # [3]
    angle: float  # radians, the limb's axis against the picture's vertical
    half_width: float  # of the limb, in half picture sides
    taper: float
    end: float  # where a rounded end (heel, stump) cuts the limb; > 2 means outside of the picture
    site: tuple[float, float]  # wound centre along and across the limb
    stretch: float  # long to short axis of the wound
    lobes: Array  # [2, 5] amplitude and phase of the outline's harmonics
    size: float  # 0..1 within the phase's range of radii


@dataclass(frozen=True)
class _View:
    turn: float
    zoom: float
    shift: tuple[float, float]
    light: Array  # [3] direction, unit length
    gain: float
    balance: Array  # [3]
    gamma: float
    falloff: tuple[float, float]  # brightness gradient over the picture
    glow: float  # strength of specular reflection


def render(patient: int, visit: int, image: int, phase: str, seed: int = 0, size_px: int = 64) -> npt.NDArray[np.uint8]:
    """Draw one photograph; the same arguments always give the same bytes.

    Args:
        patient, visit, image: numbers from 0, which choose the random factors of each level.
        phase: one of `PHASES`.
        seed: another seed is another clinic's worth of patients.
        size_px: side of the square picture in pixels.

    Returns:
        uint8 RGB picture, [size_px, size_px, 3].

    Raises:
        ValueError: for an unknown phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}; allowed are {', '.join(PHASES)}")
    person = _draw_patient(np.random.default_rng([seed, patient, 1]))
    bed_rng = np.random.default_rng([seed, patient, visit, 2])
    view_rng = np.random.default_rng([seed, patient, visit, image, 3])
    view = _draw_view(view_rng)
    along, across = _limb_coordinates(person, view, size_px)
    limb, tube = _limb(person, along, across)
    radius, bearing = _wound_coordinates(person, phase, along, across, bed_rng)
    albedo, height, gloss = _tissue(phase, person, radius, bearing, bed_rng)
    shaded = _light(albedo, height + tube, gloss * view.glow, view.light)
    cloth = _cloth(person, limb, bed_rng, size_px)
    picture = cloth + limb[..., None] * (shaded - cloth)
    return _expose(picture, view, view_rng)


def visit_phases(patient: int, seed: int = 0) -> tuple[str, ...]:
    """Phases of a patient's three visits: healing goes forward only, and over many patients each phase is a third."""
    draw = np.random.default_rng([seed, patient, 4]).random()
    courses = (("I", "P", "R"), ("I", "I", "P"), ("P", "R", "R"))
    return courses[0 if draw < 0.6 else 1 if draw < 0.8 else 2]


def write_phantom(root: Path, patients: int, seed: int, size_px: int = 64, images_per_visit: int = 2) -> None:
    """Write a data set `root/CLASS/P{patient:03d}V{visit:02d}N{image}.png`, about six pictures a patient.

    Patients are numbered from 0 and come three times; `seed` is the clinic; the class folders are I, P and R.
    """
    for phase in PHASES:
        (root / phase).mkdir(parents=True, exist_ok=True)
    for patient in range(patients):
        for visit, phase in enumerate(visit_phases(patient, seed)):
            for image in range(images_per_visit):
                picture = render(patient, visit, image, phase, seed, size_px)
                Image.fromarray(picture).save(root / phase / f"P{patient:03d}V{visit:02d}N{image}.png")


def _draw_patient(rng: np.random.Generator) -> _Patient:
    tone = rng.beta(1.3, 1.5) * (len(_SKIN) - 1.001)
    low = int(tone)
    skin = np.array(_SKIN[low]) + (tone - low) * (np.array(_SKIN[low + 1]) - np.array(_SKIN[low]))
    lobes = np.stack([rng.uniform(0.2, 1.0, 5) * 0.14 / np.arange(1, 6) ** 0.7, rng.uniform(0, 2 * np.pi, 5)])
    return _Patient(
        skin=(skin * rng.normal(1.0, 0.03, 3)).astype(np.float32),
        cloth=np.array(_CLOTH[rng.integers(len(_CLOTH))], np.float32) * np.float32(rng.uniform(0.8, 1.15)),
        angle=float(rng.normal(0.0, 0.45)),
        half_width=float(rng.uniform(0.72, 1.25)),
        taper=float(rng.normal(0.0, 0.12)),
        end=float(rng.uniform(0.65, 0.95) if rng.random() < 0.4 else 9.0),
        site=(float(rng.normal(0.0, 0.12)), float(rng.normal(0.0, 0.12))),
        stretch=float(np.exp(rng.uniform(-0.1, 0.45))),
        lobes=lobes.astype(np.float32),
        size=float(rng.random()),
    )


def _draw_view(rng: np.random.Generator) -> _View:
    light = np.array([rng.normal(0, 0.35), rng.normal(-0.35, 0.3), 1.0])
    warmth = rng.normal(0.0, 0.05)
    return _View(
        turn=float(rng.normal(0, 0.12)),
        zoom=float(np.exp(rng.normal(0, 0.10))),
        shift=(float(rng.normal(0, 0.07)), float(rng.normal(0, 0.07))),
        light=(light / np.linalg.norm(light)).astype(np.float32),
        gain=float(np.exp(rng.normal(0.0, 0.10))),
        balance=np.array([1 + warmth, 1 + rng.normal(0, 0.015), 1 - warmth], np.float32),
        gamma=float(rng.uniform(0.92, 1.12)),
        falloff=(float(rng.normal(0, 0.09)), float(rng.normal(0, 0.09))),
        glow=float(rng.uniform(0.6, 1.2)),
    )


@cache
def _spline(size_px: int, knots: int) -> Array:
    """Cubic B-spline interpolation matrix [size_px, knots + 3]: smooth noise from a small random grid."""
    position = np.linspace(0, knots, size_px, endpoint=False)
    cell, f = position.astype(int), position % 1.0
    weights = np.stack([(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3], 1) / 6
    matrix = np.zeros((size_px, knots + 3))
    for k in range(4):
        matrix[np.arange(size_px), cell + k] = weights[:, k]
    return matrix.astype(np.float32)


def _noise(rng: np.random.Generator, size_px: int, knots: int) -> Array:
    """Smooth noise [size_px, size_px] of about unit deviation and `knots` cells a side."""
    grid = rng.standard_normal((knots + 3, knots + 3)).astype(np.float32)
    spline = _spline(size_px, knots)
    return np.asarray(2.0 * (spline @ grid @ spline.T), np.float32)


def _step(x: Array, width: float) -> Array:
    """Smooth step from 0 (x < -width) to 1 (x > width)."""
    t = np.clip(x / (2 * width) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _mix(below: Array, above: Array | tuple[float, ...], weight: Array) -> Array:
    return np.asarray(below + weight[..., None] * (np.asarray(above, np.float32) - below), np.float32)


def _limb_coordinates(person: _Patient, view: _View, size_px: int) -> tuple[Array, Array]:
    """Coordinates along and across the limb for every pixel, each [size_px, size_px]; the picture spans -1..1."""
    axis = (np.arange(size_px, dtype=np.float32) + 0.5) * (2.0 / size_px) - 1.0
    x, y = axis[None, :] - view.shift[0], axis[:, None] - view.shift[1]
    turn = person.angle + view.turn
    c, s = np.float32(np.cos(turn) / view.zoom), np.float32(np.sin(turn) / view.zoom)
    return y * c - x * s, x * c + y * s


def _limb(person: _Patient, along: Array, across: Array) -> tuple[Array, Array]:
    """Coverage of the limb (0..1) and its height as a rounded tube, each [H, W]."""
    width = person.half_width * (1 + person.taper * along)
    cap = np.clip((along - person.end + width * 0.6) / (width * 0.6), 0, None) if person.end < 2 else np.float32(0)
    q = (across / width) ** 2 + cap**2
    tube = np.sqrt(np.clip(1 - q, 0, 1) + 0.02)
    return _step(np.asarray(1 - np.sqrt(q), np.float32), 0.035), np.asarray(0.75 * tube, np.float32)


def _wound_coordinates(
    person: _Patient, phase: str, along: Array, across: Array, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Distance from the wound's centre in units of its outline (1 on the edge) and bearing, each [H, W]."""
    low, high = _RADIUS[phase]
    size = low + (high - low) * np.clip(0.75 * person.size + 0.25 * rng.random(), 0, 1)
    a = (along - person.site[0]) / np.sqrt(person.stretch)
    b = (across - person.site[1]) * np.sqrt(person.stretch)
    bearing = np.arctan2(a, b)
    outline = np.ones_like(bearing)
    for k in range(5):
        outline += person.lobes[0, k] * np.cos((k + 1) * bearing + person.lobes[1, k])
    return np.asarray(np.hypot(a, b) / (size * outline), np.float32), np.asarray(bearing, np.float32)


def _tissue(
    phase: str, person: _Patient, radius: Array, bearing: Array, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Albedo [H, W, 3], height [H, W] and gloss [H, W] of skin and wound."""
    size_px = radius.shape[0]
    mottle, patches, bumps = (_noise(rng, size_px, knots) for knots in (4, 5, 11))
    skin = person.skin * (1 + 0.05 * mottle[..., None]) * (1 + 0.03 * bumps[..., None])
    skin = skin + 0.02 * patches[..., None] * np.array([1.0, -0.5, -0.5], np.float32)
    radius = radius + 0.06 * patches + 0.03 * bumps
    inside = _step(1 - radius, 0.20)
    outside = np.maximum(radius - 1, 0)
    painter = {"I": _inflamed, "P": _granulating, "R": _scarred}[phase]
    albedo, gloss = painter(skin, inside, outside, (radius, bearing, patches, bumps))
    edge, floor, rough = _RELIEF[phase]
    height = edge * np.exp(-((radius - 1.15) ** 2) * 6) + inside * (floor + rough * bumps) + 0.008 * bumps
    return albedo, np.asarray(height, np.float32), gloss


Fields = tuple[Array, Array, Array, Array]


def _inflamed(skin: Array, inside: Array, outside: Array, fields: Fields) -> tuple[Array, Array]:
    radius, _, patches, bumps = fields
    halo = 0.8 * np.exp(-outside * 1.6)
    flushed = skin * np.array([0.95, 0.45, 0.42], np.float32) + np.array([0.12, 0.0, 0.02], np.float32)
    albedo = skin + halo[..., None] * (flushed - skin)
    bed = _mix(np.zeros_like(skin) + np.array([0.40, 0.07, 0.08], np.float32), (0.55, 0.16, 0.12), _step(bumps, 1.2))
    slough = _step(patches + 0.5 * bumps - 0.1 + 0.3 * (0.6 - radius), 0.5)
    bed = _mix(bed, (0.78, 0.66, 0.30), 0.9 * slough)
    bed = _mix(bed, (0.14, 0.09, 0.08), 0.8 * _step(-patches - 1.2, 0.4))
    return _mix(albedo, bed, inside), np.asarray(0.25 * inside + 0.10 * halo, np.float32)


def _granulating(skin: Array, inside: Array, outside: Array, fields: Fields) -> tuple[Array, Array]:
    radius, _, patches, bumps = fields
    rim = np.exp(-(((radius - 1.12) / 0.16) ** 2))
    albedo = _mix(skin, (0.93, 0.74, 0.72), 0.65 * rim)
    albedo = _mix(albedo, (0.80, 0.45, 0.45), np.asarray(0.25 * np.exp(-outside * 5) * (1 - inside), np.float32))
    bed = _mix(np.zeros_like(skin) + np.array([0.63, 0.14, 0.17], np.float32), (0.85, 0.37, 0.38), _step(bumps, 1.6))
    bed = bed * (1 + 0.06 * patches[..., None])
    return _mix(albedo, bed, inside), np.asarray(1.0 * inside, np.float32)


def _scarred(skin: Array, inside: Array, outside: Array, fields: Fields) -> tuple[Array, Array]:
    radius, bearing, patches, bumps = fields
    folds = np.cos(6 * bearing + 1.6 * patches + 0.8 * bumps)
    wrinkles = folds * (0.6 + 0.4 * bumps) * np.exp(-(((radius - 1.2) / 0.5) ** 2))
    albedo = skin * (1 - 0.15 * wrinkles[..., None])
    albedo = _mix(albedo, skin * np.array([0.82, 0.70, 0.68], np.float32), 0.7 * np.exp(-outside * 2.2) * (1 - inside))
    pale = 0.45 * skin + np.array([0.50, 0.39, 0.38], np.float32)
    seam = np.exp(-((radius / 0.5) ** 2))
    scar = _mix(pale * (1 + 0.05 * bumps[..., None]), (0.72, 0.40, 0.42), 0.45 * seam)
    return _mix(albedo, scar, 0.9 * inside), np.asarray(0.05 * inside, np.float32)


def _light(albedo: Array, height: Array, gloss: Array, light: Array) -> Array:
    """Lambert shading with a Blinn-Phong highlight (Blinn 1977) of a height field; returns [H, W, 3]."""
    size_px = height.shape[0]
    slope_y, slope_x = np.gradient(height, 2.0 / size_px)
    normal_z = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    facing = (light[2] - slope_x * light[0] - slope_y * light[1]) * normal_z
    half = light + np.array([0, 0, 1], np.float32)
    half = half / np.linalg.norm(half)
    mirror = np.clip((half[2] - slope_x * half[0] - slope_y * half[1]) * normal_z, 0, 1)
    shade = 0.28 + 0.80 * np.clip(facing, 0, None)
    return np.asarray(albedo * shade[..., None] + (0.50 * gloss * mirror**24)[..., None], np.float32)


def _cloth(person: _Patient, limb: Array, rng: np.random.Generator, size_px: int) -> Array:
    """Drape behind the limb [H, W, 3]: folds, and the limb's soft shadow."""
    folds = _noise(rng, size_px, 3) + 0.5 * _noise(rng, size_px, 6)
    shade = (0.85 + 0.13 * folds) * (1 - 0.35 * _blur(limb))
    return np.asarray(person.cloth * np.clip(shade, 0.2, None)[..., None], np.float32)


def _blur(x: Array) -> Array:
    """Box blur of a twelfth of the picture's side, by cumulative sums along both axes."""
    for axis in (0, 1):
        reach = x.shape[axis] // 12
        pad = [(reach + 1, reach) if a == axis else (0, 0) for a in (0, 1)]
        total = np.cumsum(np.pad(x, pad, mode="edge"), axis=axis, dtype=np.float32)
        width = 2 * reach + 1
        x = np.take(total, range(width, total.shape[axis]), axis) - np.take(total, range(x.shape[axis]), axis)
        x = x / width
    return x


def _expose(picture: Array, view: _View, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    axis = np.linspace(-1, 1, len(picture), dtype=np.float32)
    fall = 1 + view.falloff[0] * axis[None, :] + view.falloff[1] * axis[:, None]
    fall = fall - 0.06 * (axis[None, :] ** 2 + axis[:, None] ** 2)
    exposed = picture * fall[..., None] * (view.gain * view.balance)
    # A soft shoulder keeps highlights from clipping flat, as cameras do.
    exposed = np.clip(np.where(exposed > 0.8, 0.8 + 0.2 * np.tanh((exposed - 0.8) / 0.2), exposed), 1e-4, 1)
    noise = rng.standard_normal(picture.shape, np.float32) * np.float32(1.5)
    return np.asarray(np.clip(255 * exposed**view.gamma + noise + 0.5, 0, 255), np.uint8)

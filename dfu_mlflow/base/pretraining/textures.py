"""Stand-ins for natural photographs, for the autoencoder: dead leaves and 1/f fields in random palettes.

Dead leaves (Lee, Mumford and Huang 2001, "Occlusion models for natural images") give edges and occlusion, 1/f fields
give texture and shading. Networks trained on both carry over to photographs they have not seen (Baradad et al. 2021).
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def draw_texture(rng: np.random.Generator, size_px: int = 64) -> npt.NDArray[np.uint8]:
    """One random picture, uint8 RGB [size_px, size_px, 3]: leaves with texture and light, or texture alone."""
    palette = _palette(rng)
    if rng.random() < 0.3:
        picture = _blend(palette, pink_noise(rng, size_px, float(rng.uniform(1.5, 2.6))))
    else:
        picture = _leaves(rng, palette, size_px)
    roughness = rng.uniform(0.0, 0.12)
    picture = picture * (1 + roughness * pink_noise(rng, size_px, float(rng.uniform(0.6, 1.8)))[..., None])
    picture = picture * (1 + rng.uniform(0, 0.3) * pink_noise(rng, size_px, 3.0)[..., None])
    return np.asarray(np.clip(255 * picture + 0.5, 0, 255), np.uint8)


def pink_noise(rng: np.random.Generator, size_px: int, power: float) -> Array:
    """Zero-mean, unit-deviation field [size_px, size_px] whose amplitude falls as 1 / frequency**power."""
    fy, fx = np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None, :]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1.0
    spectrum = (rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)) / frequency**power
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, (size_px, size_px))
    return np.asarray(field / field.std(), np.float32)


def _palette(rng: np.random.Generator) -> Array:
    """Six colours [6, 3]: half of the palettes are earthy and near one hue, as skin, wood and cloth are."""
    if rng.random() < 0.5:
        return np.asarray(rng.random((6, 3)), np.float32)
    middle = np.array([0.6, 0.5, 0.42]) + rng.normal(0, 0.15, 3)
    value = rng.uniform(0.2, 1.5, (6, 1))
    return np.asarray(np.clip(middle * value + rng.normal(0, 0.07, (6, 3)), 0, 1), np.float32)


def _blend(palette: Array, field: Array) -> Array:
    """Run a field through a palette, with linear mixing between neighbours."""
    position = np.clip((field + 2) / 4, 0, 0.999) * (len(palette) - 1)
    low = position.astype(int)
    part = (position - low)[..., None]
    return np.asarray(palette[low] * (1 - part) + palette[low + 1] * part, np.float32)


def _leaves(rng: np.random.Generator, palette: Array, size_px: int) -> Array:
    """Opaque ellipses and half-planes of power-law sizes over one another; each has its own colour gradient."""
    axis = np.linspace(-1, 1, size_px, dtype=np.float32)
    x, y = axis[None, :], axis[:, None]
    picture = np.broadcast_to(palette[0], (size_px, size_px, 3)).astype(np.float32)
    for _ in range(int(rng.integers(4, 28))):
        angle, (cx, cy) = rng.uniform(0, 2 * np.pi), rng.uniform(-1.1, 1.1, 2)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = (x - cx) * c + (y - cy) * s, (y - cy) * c - (x - cx) * s
        radius = 0.08 * rng.random() ** -0.7
        if rng.random() < 0.25:
            reach = np.maximum(np.abs(u) / radius, np.abs(v) / (radius * rng.uniform(0.2, 1.0)))
        else:
            reach = np.sqrt((u / radius) ** 2 + (v / (radius * rng.uniform(0.35, 1.0))) ** 2)
        softness = 1.2 / size_px / radius * rng.choice([1.0, 1.0, 4.0])
        cover = np.clip((1 - reach) / (2 * softness) + 0.5, 0, 1)[..., None]
        colour = palette[rng.integers(6)] * (1 + rng.normal(0, 0.25) * u / max(radius, 0.2))[..., None]
        picture = picture + cover * (colour - picture)
    return picture

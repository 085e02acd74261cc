"""Cartoon subjects of the stock-illustration world: each draws itself with thick outlines and saturated fills.

Every function takes a pen (a canvas, a centre, a scale, an ink) and a fill colour; the scene's shading comes later.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Pen:
    """Where and how to draw: local coordinates run over about -1..1 and are turned, scaled and moved to pixels."""

    draw: ImageDraw.ImageDraw
    centre: Point  # pixels
    scale: float  # pixels a local unit
    turn: float  # radians
    ink: Colour
    line_px: int
    rng: np.random.Generator

    def at(self, x: float, y: float) -> Point:
        c, s = float(np.cos(self.turn)), float(np.sin(self.turn))
        return (self.centre[0] + self.scale * (x * c - y * s), self.centre[1] + self.scale * (x * s + y * c))

    def polygon(self, points: list[Point], fill: Colour | None) -> None:
        corners = [self.at(*p) for p in points]
        if fill is not None:
            self.draw.polygon(corners, fill=fill)
        self.draw.line([*corners, corners[0], corners[1]], fill=self.ink, width=self.line_px, joint="curve")

    def line(self, points: list[Point], colour: Colour | None = None, width: float = 1.0) -> None:
        wide = max(1, round(self.line_px * width))
        self.draw.line([self.at(*p) for p in points], fill=colour or self.ink, width=wide, joint="curve")

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour | None) -> None:
        angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        self.polygon([(x + rx * float(np.cos(a)), y + ry * float(np.sin(a))) for a in angle], fill)

    def dot(self, x: float, y: float, radius: float, fill: Colour) -> None:
        px, py = self.at(x, y)
        r = radius * self.scale
        self.draw.ellipse([px - r, py - r, px + r, py + r], fill=fill)


def lighter(colour: Colour, amount: float) -> Colour:
    """Towards white for a positive amount, towards black for a negative one."""
    goal = 255 if amount > 0 else 0
    r, g, b = (round(c + abs(amount) * (goal - c)) for c in colour)
    return (r, g, b)


def house(pen: Pen, fill: Colour) -> None:
    pen.polygon([(-0.7, -0.1), (0.7, -0.1), (0.7, 0.8), (-0.7, 0.8)], fill)
    pen.polygon([(-0.95, -0.1), (0, -0.85), (0.95, -0.1)], lighter(fill, -0.4))
    pen.polygon([(-0.15, 0.25), (0.2, 0.25), (0.2, 0.8), (-0.15, 0.8)], (120, 70, 30))
    pen.polygon([(-0.55, 0.1), (-0.28, 0.1), (-0.28, 0.4), (-0.55, 0.4)], (250, 240, 140))


def tree(pen: Pen, fill: Colour) -> None:
    pen.polygon([(-0.15, 0.1), (0.15, 0.1), (0.2, 0.9), (-0.2, 0.9)], (130, 80, 35))
    pen.oval(-0.35, -0.1, 0.45, 0.42, fill)
    pen.oval(0.35, -0.1, 0.45, 0.42, fill)
    pen.oval(0, -0.45, 0.5, 0.45, fill)


def apple(pen: Pen, fill: Colour) -> None:
    pen.oval(0, 0.1, 0.72, 0.66, fill)
    pen.line([(0, -0.5), (0.12, -0.9)], width=1.5)
    pen.polygon([(0.12, -0.75), (0.5, -0.95), (0.55, -0.65)], (60, 180, 60))
    pen.dot(-0.3, -0.1, 0.13, lighter(fill, 0.75))


def sun(pen: Pen, fill: Colour) -> None:
    for k in range(10):
        c, s = float(np.cos(k * np.pi / 5)), float(np.sin(k * np.pi / 5))
        pen.line([(0.6 * c, 0.6 * s), (0.95 * c, 0.95 * s)], fill, 2.0)
    pen.oval(0, 0, 0.5, 0.5, fill)


def fish(pen: Pen, fill: Colour) -> None:
    pen.polygon([(0.45, 0), (0.95, -0.45), (0.95, 0.45)], lighter(fill, -0.25))
    pen.oval(-0.1, 0, 0.7, 0.42, fill)
    pen.dot(-0.45, -0.08, 0.1, (255, 255, 255))
    pen.dot(-0.47, -0.08, 0.05, pen.ink)
    pen.line([(0.0, -0.25), (0.1, 0), (0.0, 0.25)])


def cup(pen: Pen, fill: Colour) -> None:
    pen.oval(0.6, 0.1, 0.3, 0.28, None)
    pen.polygon([(-0.6, -0.5), (0.6, -0.5), (0.45, 0.7), (-0.45, 0.7)], fill)
    pen.oval(0, -0.5, 0.6, 0.16, lighter(fill, -0.5))


def face(pen: Pen, fill: Colour) -> None:
    pen.oval(0, 0, 0.75, 0.82, fill)
    for x in (-0.28, 0.28):
        pen.dot(x, -0.15, 0.12, (255, 255, 255))
        pen.dot(x, -0.13, 0.07, pen.ink)
    pen.line([(-0.35, 0.3), (-0.15, 0.45), (0.15, 0.45), (0.35, 0.3)], (200, 30, 60), 1.5)


def flower(pen: Pen, fill: Colour) -> None:
    pen.line([(0, 0.1), (0.05, 0.95)], (40, 150, 50), 2.0)
    for k in range(6):
        pen.oval(0.42 * float(np.cos(k * np.pi / 3)), -0.2 + 0.42 * float(np.sin(k * np.pi / 3)), 0.26, 0.26, fill)
    pen.oval(0, -0.2, 0.25, 0.25, (250, 210, 40))


def car(pen: Pen, fill: Colour) -> None:
    pen.polygon([(-0.5, -0.1), (-0.3, -0.5), (0.3, -0.5), (0.55, -0.1)], (190, 225, 250))
    pen.polygon([(-0.95, -0.1), (0.95, -0.1), (0.95, 0.35), (-0.95, 0.35)], fill)
    for x in (-0.5, 0.5):
        pen.oval(x, 0.38, 0.23, 0.23, (50, 50, 55))
        pen.dot(x, 0.38, 0.1, (220, 220, 220))


def star(pen: Pen, fill: Colour) -> None:
    reach = [0.95 if k % 2 == 0 else 0.4 for k in range(10)]
    angle = [k * np.pi / 5 - np.pi / 2 for k in range(10)]
    pen.polygon([(r * float(np.cos(a)), r * float(np.sin(a))) for r, a in zip(reach, angle, strict=True)], fill)


def boat(pen: Pen, fill: Colour) -> None:
    pen.line([(0, -0.9), (0, 0.3)], width=1.5)
    pen.polygon([(0.06, -0.85), (0.7, 0.15), (0.06, 0.15)], (250, 250, 245))
    pen.polygon([(-0.9, 0.3), (0.9, 0.3), (0.55, 0.75), (-0.55, 0.75)], fill)


def mushroom(pen: Pen, fill: Colour) -> None:
    pen.polygon([(-0.25, 0), (0.25, 0), (0.3, 0.85), (-0.3, 0.85)], (245, 235, 215))
    pen.polygon([(-0.85, 0.1), (-0.6, -0.5), (0, -0.75), (0.6, -0.5), (0.85, 0.1)], fill)
    for x, y in ((-0.35, -0.25), (0.1, -0.4), (0.4, -0.12)):
        pen.dot(x, y, 0.12, (255, 255, 255))


def foot(pen: Pen, fill: Colour) -> None:
    pen.polygon(
        [(-0.42, -1.3), (0.15, -1.3), (0.2, -0.1), (0.55, 0.2), (1.0, 0.45), (1.0, 0.72), (-0.5, 0.72), (-0.55, 0.2)],
        fill,
    )
    for k in range(4):
        pen.oval(0.98 - 0.14 * k, 0.5 - 0.07 * k, 0.1, 0.1, lighter(fill, 0.15))


def sole(pen: Pen, fill: Colour) -> None:
    pen.polygon(
        [(-0.45, -0.6), (-0.1, -0.75), (0.4, -0.6), (0.5, -0.1), (0.35, 0.5), (0.28, 0.9), (-0.22, 0.9), (-0.3, 0.4)],
        fill,
    )
    for k in range(5):
        pen.oval(-0.42 + 0.21 * k, -0.86 + 0.03 * k * (k - 2), 0.14 - 0.012 * k, 0.17 - 0.015 * k, lighter(fill, 0.12))


def leg(pen: Pen, fill: Colour) -> None:
    pen.polygon([(-0.5, -1.6), (0.5, -1.6), (0.55, 0), (0.38, 1.6), (-0.38, 1.6), (-0.5, 0)], fill)


def hand(pen: Pen, fill: Colour) -> None:
    for k, height in enumerate((0.75, 0.95, 0.9, 0.7)):
        x = -0.42 + 0.24 * k
        pen.polygon([(x - 0.1, 0.1), (x - 0.1, -height), (x + 0.1, -height), (x + 0.1, 0.1)], fill)
    pen.polygon([(0.35, 0.3), (0.8, -0.15), (0.92, 0.05), (0.5, 0.6)], fill)
    pen.polygon([(-0.55, 0), (0.45, 0), (0.5, 0.6), (0.25, 0.95), (-0.4, 0.95), (-0.6, 0.5)], fill)


def subjects() -> dict[str, Callable[[Pen, Colour], None]]:
    """Everyday things by the name their captions use."""
    return {
        "house": house,
        "tree": tree,
        "apple": apple,
        "sun": sun,
        "fish": fish,
        "cup": cup,
        "face": face,
        "flower": flower,
        "car": car,
        "star": star,
        "boat": boat,
        "mushroom": mushroom,
    }


def limbs() -> dict[str, Callable[[Pen, Colour], None]]:
    """Body parts, with or without a wound."""
    return {"foot": foot, "sole": sole, "leg": leg, "hand": hand}

"""Made images of which everything is known: curves and lines, gratings, colours, textures, shapes.

All are grey at rest and have one contrast; what varies is in their labels. Every image has its own place, phase and
polarity, drawn by the seed, so that another seed gives fresh images of the same kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.errors import InputError
from vesalius.images.pictures import Pictures, Scaling
from vesalius.seeds import generator_for

RADII = tuple(round(10 * 1.2**n) for n in range(12))
"""Radii of curves in pixels, of an image of 64: 10 to 74."""
ORIENTATIONS = tuple(range(0, 360, 10))
"""In degrees: where a curve's bulge points to, from the right, clockwise on the screen."""
LINE = "line"
HUES = {"red": (1, 0, 0), "yellow": (1, 1, 0), "green": (0, 1, 0), "cyan": (0, 1, 1), "blue": (0, 0, 1),
        "magenta": (1, 0, 1)}  # fmt: skip
FREQUENCIES = (2, 4, 8, 16)
"""Of gratings, in periods across the image."""
TEXTURES, SHAPES = ("checks", "dots", "noise", "stripes with noise"), ("disk", "square", "triangle", "ring")
CONTRAST, WIDTH = 0.45, 1.5
_REACH = 9.0
"""Standard deviation of the window on a curve, in pixels of an image of 64."""
_JITTER = 3.0


def curves(
    scaling: Scaling,
    radii: Sequence[int] = RADII,
    orientations: Sequence[int] = ORIENTATIONS,
    repeats: int = 1,
    seed: int = 0,
) -> Pictures:
    """Curved lines of every radius and orientation, and straight ones of every orientation, as long and as strong.

    Labels: family (curve, line), radius (line for straight ones), orientation. A line's orientation is that of the
    curves that it is the limit of; it comes `len(radii)` times as often as one curve.
    """
    draw = generator_for("curves", seed)
    drawn: list[Tensor] = []
    labels: dict[str, list[str]] = {"family": [], "radius": [], "orientation": []}
    for _ in range(repeats):
        for orientation in orientations:
            for radius in [*radii, *[math.inf] * len(radii)]:
                drawn.append(_arc(scaling.size, radius, orientation, draw))
                straight = radius == math.inf
                labels["family"].append(LINE if straight else "curve")
                labels["radius"].append(LINE if straight else str(radius))
                labels["orientation"].append(str(orientation))
    return _pictures("curve", drawn, labels, scaling, seed)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Columns and rows in pixels of an image of 64, from the middle."""
    at = (torch.arange(size) + 0.5) * 64 / size - 32
    return at[None, :].expand(size, size), at[:, None].expand(size, size)


def _uniform(draw: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=draw))


def _sign(draw: torch.Generator) -> float:
    return 1.0 if float(torch.rand((), generator=draw)) < 0.5 else -1.0


def _arc(size: int, radius: float, orientation: float, draw: torch.Generator) -> Float[Tensor, "3 row column"]:
    """A piece of a circle around its point that the bulge points with, at the middle but for the jitter."""
    columns, rows = _grid(size)
    x, y = (one - _uniform(draw, -_JITTER, _JITTER) for one in (columns, rows))
    angle = math.radians(orientation + _uniform(draw, -4, 4))
    along, across = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
    if radius == math.inf:
        off, way = along, across
    else:
        off = torch.hypot(along + radius, across) - radius
        # Length along the curve from its foremost point; the other side of the circle lies beyond the window.
        way = radius * torch.atan2(across, along + radius)
    level = torch.exp(-((off / WIDTH) ** 2) / 2) * torch.exp(-((way / _REACH) ** 2) / 2)
    return (0.5 + CONTRAST * _sign(draw) * level).expand(3, size, size)


def stimuli(scaling: Scaling, repeats: int = 4, seed: int = 0) -> Pictures:
    """Gratings, curves, colours, textures and shapes, `repeats` of every kind that the labels name.

    Labels: family, orientation (of gratings and curves; a grating's is that of its normal, from 0 to 180), frequency,
    radius, colour, texture, shape; "none" where an image has none. Raises InputError for no repeats.
    """
    if repeats < 1:
        raise InputError(f"at least one image of each kind is needed; got repeats={repeats}")
    draw, size = generator_for("stimuli", seed), scaling.size
    drawn: list[Tensor] = []
    rows: list[Mapping[str, str]] = []
    for _ in range(repeats):
        for orientation in range(0, 180, 15):
            for frequency in FREQUENCIES:
                drawn.append(_grating(size, orientation, frequency, draw))
                rows.append({"family": "grating", "orientation": str(orientation), "frequency": str(frequency)})
        for orientation in range(0, 360, 45):
            for radius in (*RADII[::4], math.inf):
                drawn.append(_arc(size, radius, orientation, draw))
                family = LINE if radius == math.inf else "curve"
                said = LINE if radius == math.inf else str(radius)
                rows.append({"family": family, "orientation": str(orientation), "radius": said})
        for colour, hue in HUES.items():
            for shape in (*SHAPES, "field"):
                drawn.append(_shape(size, shape, hue, draw))
                rows.append({"family": "colour" if shape == "field" else "shape", "colour": colour, "shape": shape})
        for texture in TEXTURES:
            for _ in range(4):
                drawn.append(_texture(size, texture, draw))
                rows.append({"family": "texture", "texture": texture})
    names = ("family", "orientation", "frequency", "radius", "colour", "texture", "shape")
    labels = {name: [row.get(name, "none") for row in rows] for name in names}
    return _pictures("stimulus", drawn, labels, scaling, seed)


def _grating(size: int, orientation: float, frequency: int, draw: torch.Generator) -> Float[Tensor, "3 row column"]:
    columns, rows = _grid(size)
    angle, phase = math.radians(orientation), _uniform(draw, 0, 2 * math.pi)
    wave = torch.sin(2 * math.pi * frequency / 64 * (columns * math.cos(angle) + rows * math.sin(angle)) + phase)
    return (0.5 + CONTRAST * wave).expand(3, size, size)


def _shape(size: int, shape: str, hue: Sequence[int], draw: torch.Generator) -> Float[Tensor, "3 row column"]:
    columns, rows = _grid(size)
    x, y = (one - _uniform(draw, -6, 6) for one in (columns, rows))
    radius = _uniform(draw, 12, 20)
    away = {
        "disk": torch.hypot(x, y) - radius,
        "square": torch.maximum(x.abs(), y.abs()) - 0.89 * radius,
        "triangle": torch.maximum(y - 0.7 * radius, (x.abs() * math.sqrt(3) - y) / 2 - 0.65 * radius),
        "ring": (torch.hypot(x, y) - radius).abs() - 2.5,
        "field": torch.full_like(x, -9.0),
    }[shape]
    inside = torch.sigmoid(-2 * away)
    colour = 0.5 + CONTRAST * (2 * torch.tensor(hue, dtype=torch.float32) - 1)
    return 0.5 + (colour[:, None, None] - 0.5) * inside


def _texture(size: int, texture: str, draw: torch.Generator) -> Float[Tensor, "3 row column"]:
    columns, rows = _grid(size)
    shift = [_uniform(draw, 0, 16) for _ in range(2)]
    period = _uniform(draw, 6, 12)
    u, v = 2 * math.pi * (columns + shift[0]) / period, 2 * math.pi * (rows + shift[1]) / period
    noise = torch.randn(1, 1, size, size, generator=draw)
    soft = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)[0, 0] * 2
    level = {
        "checks": torch.sign(torch.sin(u) * torch.sin(v)),
        "dots": 2 * ((torch.cos(u) + torch.cos(v)) > 1).float() - 1,
        "noise": soft.clamp(-1, 1),
        "stripes with noise": (torch.sin(u + v) + soft).clamp(-1, 1),
    }[texture]
    return (0.5 + CONTRAST * level).expand(3, size, size)


def _pictures(
    what: str, drawn: Sequence[Tensor], labels: Mapping[str, Sequence[str]], scaling: Scaling, seed: int
) -> Pictures:
    values = torch.stack(list(drawn))[:, : scaling.channels]
    names = tuple(f"{what} {number}, seed {seed}" for number in range(len(values)))
    return Pictures(scaling.scaled(values), names, {key: tuple(some) for key, some in labels.items()})

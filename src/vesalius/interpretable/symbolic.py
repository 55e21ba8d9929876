"""Names for curves: which function of a small library a curve of a KAN is, up to scale and shift, and how well it fits.

c * f(a x + b) + d, as in Liu et al. 2024 (arXiv:2404.19756), section 2.5.1. A name is a suggestion with its R²; among
those that fit as well the simplest is taken, since on a short piece many functions look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.errors import InputError, UnknownNameError
from vesalius.interpretable.kan import KAN

Function = Callable[[Tensor], Tensor]
LIBRARY: Mapping[str, tuple[int, Function]] = {
    "x": (1, lambda x: x),
    "x^2": (2, lambda x: x**2),
    "x^3": (3, lambda x: x**3),
    "exp": (2, lambda x: x.clamp(max=30).exp()),
    "log": (2, lambda x: x.clamp_min(1e-6).log()),
    "sqrt": (2, lambda x: x.clamp_min(0).sqrt()),
    "abs": (3, lambda x: x.abs()),
    "sin": (3, torch.sin),
    "tanh": (3, torch.tanh),
    "1/x": (3, lambda x: 1 / torch.where(x.abs() < 1e-3, 1e-3, x)),
}
"""Name -> how complex it is, and the function. `sin` has a shift, so that it is the cosine too."""
GOOD = 0.999
"""R² from which a name is worth saying."""
CLOSE = 10.0
"""A simpler function is taken while it leaves at most so many times as much unexplained as the best."""
ROUNDING = 1e-4
"""Unexplained variance that counts as none: curves are fitted, and not exact."""


@dataclass(frozen=True)
class Suggestion:
    """c * f(a x + b) + d. r2: share of the curve's variance over the rows that it explains."""

    name: str
    r2: float
    a: float
    b: float
    c: float
    d: float

    def __str__(self) -> str:
        inside = f"{self.a:.3g} x {'+' if self.b >= 0 else '-'} {abs(self.b):.3g}"
        of = "({})" if self.name == "x" else "({})^" + self.name[2:] if self.name[:2] == "x^" else f"{self.name}({{}})"
        return f"{self.c:.3g} {of.format(inside)} {'+' if self.d >= 0 else '-'} {abs(self.d):.3g} (R² {self.r2:.4f})"

    @property
    def fits(self) -> bool:
        """Whether the name is worth saying."""
        return self.r2 >= GOOD


def fit_function(
    x: Float[Tensor, " row"], y: Float[Tensor, " row"], name: str, *, rounds: int = 5, steps: int = 31
) -> Suggestion:
    """The best a, b, c and d for one function: a grid over a and b that is laid anew around the best, c and d by least
    squares. Raises UnknownNameError for another function, InputError for a constant curve."""
    if name not in LIBRARY:
        raise UnknownNameError("function", name, LIBRARY)
    x, y = x.double(), y.double()
    if not float(y.std()) > 0 or not float(x.std()) > 0:
        raise InputError("this curve is constant; there is nothing to name")
    f = LIBRARY[name][1]
    # Only scale and shift of what goes in matter, so that it is measured in its own spread.
    middle, spread = float(x.mean()), float(x.std())
    unit = (x - middle) / spread
    if name == "x":
        return _told(name, 1.0, 0.0, unit, y, f, middle, spread)
    best, low_a, high_a, low_b, high_b = (-1.0, 1.0, 0.0), -5.0, 5.0, -5.0, 5.0
    for _ in range(rounds):
        a, b = torch.linspace(low_a, high_a, steps).double(), torch.linspace(low_b, high_b, steps).double()
        inside = a[:, None, None] * unit + b[None, :, None]
        scores = _explained(f(inside), y)
        at = int(scores.argmax())
        own = (float(scores.flatten()[at]), float(a[at // steps]), float(b[at % steps]))
        best = max(best, own)
        reach_a, reach_b = 2 * (high_a - low_a) / steps, 2 * (high_b - low_b) / steps
        low_a, high_a, low_b, high_b = best[1] - reach_a, best[1] + reach_a, best[2] - reach_b, best[2] + reach_b
    return _told(name, best[1], best[2], unit, y, f, middle, spread)


def _explained(found: Float[Tensor, "a b row"], y: Float[Tensor, " row"]) -> Float[Tensor, "a b"]:
    """R² of the best line from each found curve to y; 0 for what is not finite."""
    centred, target = found - found.mean(-1, keepdim=True), y - y.mean()
    along, size = (centred * target).sum(-1), (centred**2).sum(-1)
    scores = along**2 / (size * (target**2).sum() + 1e-300)
    return torch.nan_to_num(torch.where(size > 1e-12, scores, 0.0), 0.0, 0.0, 0.0)


def _told(
    name: str, a: float, b: float, unit: Tensor, y: Tensor, f: Function, middle: float, spread: float
) -> Suggestion:
    inside = f(a * unit + b)
    centred = inside - inside.mean()
    c = float((centred * (y - y.mean())).sum() / (centred**2).sum().clamp_min(1e-300))
    r2 = float(_explained(inside[None, None], y))
    return Suggestion(name, r2, a / spread, b - a * middle / spread, c, float(y.mean() - c * inside.mean()))


def suggest(
    x: Float[Tensor, " row"], y: Float[Tensor, " row"], names: Sequence[str] = tuple(LIBRARY)
) -> tuple[Suggestion, ...]:
    """Functions of the library for one curve, the suggested one first, then by how well they fit."""
    found = sorted((fit_function(x, y, name) for name in names), key=lambda one: -one.r2)
    left = CLOSE * (1 - found[0].r2) + ROUNDING
    simple = min((one for one in found if 1 - one.r2 <= left), key=lambda one: (LIBRARY[one.name][0], -one.r2))
    return (simple, *(one for one in found if one is not simple))


@torch.no_grad()
def name_edges(
    net: KAN, values: Float[Tensor, "row column"], most: int = 200
) -> dict[tuple[int, int, int], Suggestion]:
    """For every edge that was kept, (layer, node, input) -> the function that is suggested. most: rows looked at.

    Raises InputError when an edge is constant over these rows; prune first.
    """
    here, found = net.scale(values[:most]), {}
    for number, (layer, edges) in enumerate(zip(net.layers, net.edges, strict=True)):
        curves = edges.curves(here)
        for node, own in edges.kept.nonzero().tolist():
            found[number, node, own] = suggest(here[:, own], curves[:, node, own])[0]
        here = layer(here)
    return found

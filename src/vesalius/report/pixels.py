"""Pictures in pages: shares over an image, and tables of numbers as squares."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

FOR, AGAINST = np.array([194, 87, 12]), np.array([33, 102, 172])
"""Colours of what speaks for a number and against it."""


def over(
    pixels: UInt8[np.ndarray, "row column channel"], shares: Float[np.ndarray, "row column"]
) -> UInt8[np.ndarray, "row column channel"]:
    """Shares drawn over an image in grey: orange speaks for the number, blue against it."""
    grey = 255 - (255 - pixels[..., :3].mean(2, keepdims=True)) * 0.55
    # The largest hundredth may be a few pixels that would leave the rest white.
    top = float(np.quantile(np.abs(shares), 0.99)) or float(np.abs(shares).max()) or 1.0
    part = np.clip(np.abs(shares) / top, 0, 1)[..., None] * 0.85
    colour = np.where((shares >= 0)[..., None], FOR, AGAINST)
    found: NDArray[np.uint8] = (grey * (1 - part) + colour * part).round().astype(np.uint8)
    return found


def tuning_picture(values: Float[np.ndarray, "row column"], side: int = 6) -> UInt8[np.ndarray, "r c 3"]:
    """A table of numbers as squares from white (smallest) to dark (largest)."""
    low, high = float(values.min()), float(values.max())
    part = ((values - low) / ((high - low) or 1.0))[..., None]
    colour = 255 * (1 - part) + np.array([26, 82, 74]) * part
    return np.repeat(np.repeat(colour.round().astype(np.uint8), side, 0), side, 1)

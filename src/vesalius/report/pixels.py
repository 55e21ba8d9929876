"""Images in pages: PNG files as data addresses, and colours for shares."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
FOR, AGAINST = np.array([194, 87, 12]), np.array([33, 102, 172])
"""Colours of what speaks for a number and against it."""


def png(pixels: UInt8[np.ndarray, "row column channel"]) -> bytes:
    """An RGB image as a PNG file."""
    rows, columns, _ = pixels.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels[..., :3].reshape(rows, -1)], 1)
    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def data_address(pixels: UInt8[np.ndarray, "row column channel"]) -> str:
    """For the src of an img."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")


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

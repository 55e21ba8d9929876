"""Pixels as PNG files, and as addresses that hold them: for pages, and for models that see."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from jaxtyping import UInt8

SIGNATURE = b"\x89PNG\r\n\x1a\n"


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

"""Pictures: images as a network takes them, read from a folder, with what is known of each; and how they are scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vesalius.errors import FileFormatError, InputError, NotFiniteError
from vesalius.inputs import Corpus, Raw

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
MOST_PIXELS = 64_000_000
"""Of one file; a small file can say that it holds any number."""


@dataclass(frozen=True)
class Scaling:
    """How a network's images are made: square of `size` pixels, then (value / 255 - mean) / std of each channel."""

    size: int = 224
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.size < 1 or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise InputError(f"a scaling has a size and, of each channel, a mean and a positive std; got {self}")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(one, dtype=like.dtype, device=like.device) for one in (self.mean, self.std))
        return mean[:, None, None], std[:, None, None]

    def scaled(self, fractions: Float[Tensor, "*any channel row column"]) -> Float[Tensor, "*any channel row column"]:
        """From 0 (black) to 1, to what the network takes."""
        mean, std = self._columns(fractions)
        return (fractions - mean) / std

    def fractions(self, values: Float[Tensor, "*any channel row column"]) -> Float[Tensor, "*any channel row column"]:
        """The way back; values outside of what a picture can have are clipped."""
        mean, std = self._columns(values)
        return (values * std + mean).clamp(0, 1)

    def clipped(self, values: Float[Tensor, "*any channel row column"]) -> Float[Tensor, "*any channel row column"]:
        """The nearest values that a picture can have."""
        return self.scaled(self.fractions(values))

    def bytes_of(self, values: Float[Tensor, "channel row column"]) -> UInt8[np.ndarray, "row column channel"]:
        """As pixels of 0 to 255."""
        fractions = self.fractions(values.detach().float().cpu())
        return (fractions * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    def check(self, values: Any) -> None:
        """Refuse images [image, channel, row, column] that the network does not take.

        Raises InputError for another size, the channels last, or values that no picture has; NotFiniteError for NaN.
        """
        if not isinstance(values, Tensor) or values.ndim != 4 or not values.is_floating_point() or not len(values):
            given = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"images are floats [image, channel, row, column]; got {given}")
        wanted = (self.channels, self.size, self.size)
        if tuple(values.shape[1:]) != wanted:
            last = " The channels seem to come last: give images.permute(0, 3, 1, 2)."
            hint = last if values.shape[3] == self.channels != values.shape[1] else ""
            raise InputError(f"this network takes images {list(wanted)}; got {list(values.shape[1:])}.{hint}")
        if not bool(torch.isfinite(values).all()):
            raise NotFiniteError("the images hold NaN or infinity")
        low, high = ((end - mean) / std for end in (0, 1) for mean, std in [(self.mean[0], self.std[0])])
        if float(values.min()) < low - 1e-3 or float(values.max()) > high + 1e-3:
            raise InputError(
                f"values go from {float(values.min()):.3g} to {float(values.max()):.3g}; this network's pictures have "
                f"{low:.3g} to {high:.3g}: scale them with Scaling.scaled(fractions of 0 to 1)"
            )


LITE0 = Scaling(224, (127 / 255,) * 3, (128 / 255,) * 3)
"""Of EfficientNet-Lite0: (value - 127) / 128."""


@dataclass(frozen=True, eq=False, repr=False)
class Pictures:
    """values: as the network takes them. names: of each. labels: what is known of each image, label -> values."""

    values: Float[Tensor, "image channel row column"]
    names: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "labels", {key: tuple(map(str, some)) for key, some in self.labels.items()})
        for what, some in {"names": self.names, **self.labels}.items():
            if len(some) != len(self.values):
                raise InputError(f"{len(some)} {what} for {len(self.values)} images")

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Pictures({len(self)} of {list(self.values.shape[1:])}; labels {', '.join(self.labels) or 'none'})"

    def subset(self, rows: Sequence[int]) -> Pictures:
        """Some of them, in this order."""
        labels = {key: tuple(some[row] for row in rows) for key, some in self.labels.items()}
        return Pictures(self.values[list(rows)], tuple(self.names[row] for row in rows), labels)

    def corpus(self, splits: Sequence[str] = (), name: str = "") -> Corpus:
        """As data for quantities and claims; each image counts by itself."""
        return Corpus(Raw(self.values), {"template": self.names}, tuple(splits), name, self.labels)


def picture(pixels: Any, scaling: Scaling) -> Float[Tensor, "channel row column"]:
    """One image from pixels [row, column, channel] of 0 to 255: its middle square, brought to size.

    Raises InputError for another shape or number of channels, or values outside of 0 to 255.
    """
    found = np.asarray(pixels)
    found = np.stack([found] * scaling.channels, -1) if found.ndim == 2 else found
    if found.ndim != 3 or found.shape[2] not in (scaling.channels, scaling.channels + 1):
        raise InputError(f"pixels are [row, column, {scaling.channels}], or [row, column] in grey; got {found.shape}")
    if found.dtype != np.uint8 and (found.min() < 0 or found.max() > 255):
        raise InputError(f"pixels go from 0 to 255; got {found.min()} to {found.max()}")
    side = min(found.shape[:2])
    top, left = ((size - side) // 2 for size in found.shape[:2])
    square = found[top : top + side, left : left + side, : scaling.channels].astype(np.float32)
    whole = torch.from_numpy(square / 255).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(
        whole, size=(scaling.size, scaling.size), mode="bicubic", align_corners=False, antialias=True
    )
    return scaling.scaled(small.clamp(0, 1))[0]


def read_picture(path: str | Path, scaling: Scaling) -> Float[Tensor, "channel row column"]:
    """An image file. Raises FileFormatError for one that is not there, is broken or too large; InputError without
    Pillow."""
    image = _pillow()
    try:
        with image.open(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise FileFormatError(f"{path} says that it has {opened.width} x {opened.height} pixels, too many")
            pixels = np.asarray(opened.convert("L" if scaling.channels == 1 else "RGB"))
    except FileNotFoundError as error:
        raise FileFormatError(f"there is no image {path}") from error
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise FileFormatError(f"{path} cannot be read as an image: {error}") from error
    return picture(pixels, scaling)


def read_pictures(folder: str | Path, scaling: Scaling, most: int = 10_000) -> Pictures:
    """All image files of a folder and the folders in it, by name; the folder of each is its label "category".

    Raises FileFormatError for no folder, or one without images.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileFormatError(f"there is no folder {root}")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())[:most]
    if not paths:
        raise FileFormatError(f"{root} holds no images ({', '.join(SUFFIXES)})")
    values = torch.stack([read_picture(path, scaling) for path in paths])
    categories = tuple(path.parent.name if path.parent != root else "none" for path in paths)
    return Pictures(values, tuple(str(path.relative_to(root)) for path in paths), {"category": categories})


def _pillow() -> Any:
    try:
        return import_module("PIL.Image")
    except ImportError as error:
        raise InputError("image files are read by Pillow: pip install 'vesalius[images]'") from error

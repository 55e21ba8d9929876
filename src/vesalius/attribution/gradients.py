"""Attribution by gradients: the slope at the input, times the input, averaged along a line or over noise.

All give a value to every element of the input. Of references there may be several; values are means over them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.attribution.question import Question
from vesalius.describe.attribution import integrated_gradients as along_line
from vesalius.errors import InputError
from vesalius.seeds import generator_for

Values = Float[Tensor, "*any"]


def slope(question: Question, points: Float[Tensor, "point ..."]) -> Float[Tensor, "point ..."]:
    """Gradient of the number with respect to the input, at each of some points."""
    points = points.detach().clone().requires_grad_()
    with torch.enable_grad():
        found = question.score(points, grad=True)
        if not found.requires_grad:
            return torch.zeros_like(points)
        (gradient,) = torch.autograd.grad(found.sum(), points, allow_unused=True)
    return torch.zeros_like(points) if gradient is None else gradient.detach()


def gradient(question: Question) -> Values:
    """Size of the gradient at the input: saliency (Simonyan et al. 2014, section 3). It has no sign."""
    question.network("gradient")
    return slope(question, question.x[None])[0].abs()


def gradient_x_input(question: Question) -> Values:
    """(input - reference) times the gradient at the input."""
    question.network("gradient_x_input")
    at = slope(question, question.x[None])[0]
    return torch.cat([(x - other) * at for x, other in question.points()]).mean(0)


def integrated_gradients(question: Question, steps: int = 64) -> Values:
    """The gradient averaged along the line from the reference, by midpoints (Sundararajan et al. 2017, section 3).

    Over several references: expected gradients, without their sampling.
    """
    question.network("integrated_gradients")

    def score(points: Tensor) -> Tensor:
        return question.score(points, grad=True)

    found = []
    with torch.enable_grad():
        for x, other in question.points():
            together = max(1, question.batch // len(x))
            found.append(along_line(score, x, other, steps, together)[0].detach())
    return torch.cat(found).mean(0)


def smoothgrad(question: Question, draws: int = 25, noise: float = 0.15, seed: int = 0) -> Values:
    """Size of the gradient averaged over noisy inputs (Smilkov et al. 2017).

    noise: standard deviation, as a share of the distance between the input's smallest and largest value. Raises
    InputError for no draws or negative noise.
    """
    question.network("smoothgrad")
    if draws < 1 or noise < 0:
        raise InputError(f"smoothgrad takes at least one draw and no negative noise; got {draws} and {noise}")
    generator = generator_for("smoothgrad", seed)
    spread = noise * float(question.x.max() - question.x.min())
    total = torch.zeros_like(question.x, dtype=torch.float64)
    for some in torch.arange(draws).split(question.batch):
        drawn = torch.randn(len(some), *question.x.shape, generator=generator).to(question.x)
        total += slope(question, question.x + spread * drawn).double().sum(0)
    return (total / draws).abs()

"""Attribution by other rules than the gradient's at the activation functions: guided backpropagation and DeepLift.

Both replace what an activation module returns by the same value with another slope, so the ordinary backward pass does
the rest. Activation functions that are no modules keep their gradient; DeepLift's completeness gap shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.attribution.gradients import Values, slope
from vesalius.attribution.question import Question
from vesalius.errors import InputError
from vesalius.model.hooks import OutputTap, Tap, tapped

RELUS = (nn.ReLU, nn.ReLU6)
ELEMENTWISE = (
    *RELUS, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh,
    nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid,
)  # fmt: skip
_SMALL = 1e-6
"""Differences of inputs under which a quotient of differences is no better than the gradient."""


class _Guided(torch.autograd.Function):
    """The identity, through which only positive gradients go back."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp_min(0)


def guided_backprop(question: Question) -> Values:
    """Guided backpropagation (Springenberg et al. 2015, section 3.4), by its size.

    Adebayo et al. (2018) show that it hardly depends on what the network has learned: `examine` reports that. Raises
    InputError for a network without ReLU modules.
    """
    model = question.network("guided_backprop").model
    modules = [module for module in model.module.modules() if isinstance(module, RELUS)]
    if not modules:
        raise InputError(f"guided_backprop changes ReLU modules, and {model.name} has none")
    with tapped([OutputTap(module, lambda _, output: _Guided.apply(output)) for module in modules]):
        return slope(question, question.x[None])[0].abs()


def deep_lift(question: Question) -> Values:
    """DeepLift with the rescale rule (Shrikumar et al. 2017, section 3.5.1), mean over the references.

    An activation's slope is its difference over that of its input, between input and reference. Exact for networks of
    linear modules and elementwise activation modules; products (attention, gates) and maxima keep their gradient.
    Raises InputError for a network without activation modules.
    """
    model = question.network("deep_lift").model
    modules = [module for module in model.module.modules() if isinstance(module, ELEMENTWISE)]
    if not modules:
        raise InputError(f"deep_lift changes activation modules, and {model.name} has none of them")
    found = []
    with rescaled(modules):
        for x, other in question.points():
            multiplier = slope(question, torch.cat([x, other]))
            # Both halves have the same multipliers, and the number of a reference is not asked for.
            found.append(multiplier[: len(x)] * (x - other))
    return torch.cat(found).mean(0)


@contextmanager
def rescaled(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, slopes of these modules are quotients of differences; batches hold inputs, then references."""
    inputs: dict[int, Tensor] = {}
    taps: list[Tap | OutputTap] = []
    for module in modules:
        taps += [Tap(module, "in", _remember(inputs, module)), OutputTap(module, _rescale(inputs, module))]
    with tapped(taps):
        yield


def _remember(inputs: dict[int, Tensor], module: nn.Module) -> Any:
    def visit(given: Tensor) -> Tensor:
        inputs[id(module)] = given
        return given.clone()  # the module may work in place

    return visit


def _rescale(inputs: dict[int, Tensor], module: nn.Module) -> Any:
    def visit(_args: tuple[Any, ...], output: Tensor) -> Tensor:
        given = inputs.pop(id(module))
        half = len(given) // 2
        slopes = _quotients(given.detach(), output.detach(), half, module)
        return output.detach() + slopes * (given - given.detach())

    return visit


def _quotients(given: Tensor, output: Tensor, half: int, module: nn.Module) -> Float[Tensor, "*any"]:
    rise, run = output[:half] - output[half:], given[:half] - given[half:]
    near = run.abs() < _SMALL
    slopes = torch.where(near, 0.0, rise / torch.where(near, 1.0, run))
    if bool(near.any()):
        with torch.enable_grad():
            point = given[:half].clone().requires_grad_()
            # The class's own forward: the module itself is tapped.
            (own,) = torch.autograd.grad(type(module).forward(module, point.clone()).sum(), point)
        slopes = torch.where(near, own, slopes)
    return torch.cat([slopes, slopes])

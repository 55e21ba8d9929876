"""Edge pruning: learn which edges to keep, all at once (Bhaskar et al. 2024, section 3).

Every edge has a gate between 0 (cut) and 1 (kept), drawn from a hard concrete distribution whose location is learned
(Louizos et al. 2018). The loss is how far the metric is from that of the run without edits, plus a price on the
expected number of gates that are open; the price rises from 0 until the wanted share of edges is left. Gates that are
open more often than not are the circuit.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.circuits.cutting import Ablation
from vesalius.circuits.masked import masked
from vesalius.errors import InputError
from vesalius.jobs import Event, Sink, silent
from vesalius.seeds import generator_for

STEPS, RATE = 300, 0.3
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Of the hard concrete distribution (Louizos et al. 2018, section 2.3)."""


def prune_edges(
    cut: Ablation,
    *,
    size: int | None = None,
    price: float = 0.05,
    steps: int = STEPS,
    rate: float = RATE,
    seed: int = 0,
    sink: Sink = silent,
) -> Bool[Tensor, " edge"]:
    """The edges whose gates stay open.

    size: how many of the most open gates to take; None takes those that are open more often than not. price: of an open
    gate, as a share of the effect of cutting all edges. Raises InputError for no steps.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1; got {steps}")
    generator, edges = generator_for("edge pruning", seed), len(cut.wired.graph)
    location = torch.full((edges,), 3.0, device=cut.wired.model.device, requires_grad=True)
    optimiser = torch.optim.Adam([location], lr=rate)
    base = cut.score(cut.base.logits)[0].detach()
    with torch.no_grad():
        total = (
            (masked(cut, torch.ones(1, edges, device=cut.wired.model.device))[0] - base).abs().mean().clamp_min(1e-6)
        )
    sink(Event("note", "pruning", message=f"{steps} steps, each a forward and a backward pass of all pairs"))
    sink(Event("start", "pruning", 0, steps))
    for step in range(steps):
        gates = _drawn(location, torch.rand(edges, generator=generator).to(location))
        with torch.enable_grad():
            distance = (masked(cut, 1 - gates[None], grad=True)[0] - base).abs().mean() / total
            paid = price * min(1.0, 2 * (step + 1) / steps) * _open(location).sum()
            optimiser.zero_grad()
            torch.autograd.backward(distance + paid, inputs=[location])
        optimiser.step()
        sink(Event("advance", "pruning", step + 1, steps, f"{int((location > 0).sum())} gates open"))
    sink(Event("end", "pruning", steps, steps))
    location = location.detach().cpu()
    if size is None:
        return location > 0
    found = torch.zeros(edges, dtype=torch.bool)
    found[location.argsort(descending=True, stable=True)[:size]] = True
    return found


def _drawn(location: Float[Tensor, " edge"], uniform: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """Gates, by which gradients reach their locations."""
    noise = uniform.clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((noise.log() - (1 - noise).log() + location) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def _open(location: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """Probability that a gate is not shut."""
    return torch.sigmoid(location - TEMPERATURE * math.log(-LOW / HIGH))

"""Kolmogorov-Arnold networks: a curve on every edge, and only sums at the nodes (Liu et al. 2024, arXiv:2404.19756).

    phi(x) = base * silu(x) + sum_k c_k B_k(x)         on every edge, B_k cubic B-splines (equations 2.10 and 2.11)

A curve can be looked at, pruned, and named (`vesalius.interpretable.symbolic`). The curves of a row are a tensor of the
network, `module:layers.<n>.edges|out`, so that each of them is a Part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.errors import InputError, NotFiniteError
from vesalius.inputs import Table
from vesalius.interpretable.fitted import Fitted, fitted
from vesalius.interpretable.fitting import Standardise, check_table, count_weights, outputs_of, table_loss
from vesalius.interpretable.splines import DEGREE, b_splines, uniform_knots
from vesalius.parts import Part
from vesalius.quantities import coordinate
from vesalius.site import Site

NOISE = 0.1
"""Size of the first coefficients: curves begin nearly flat (section 2.2, initialization scales)."""
PRUNED = 0.02
"""Edges whose curve varies by less than this share of the most that any edge of the layer does are taken away."""


class Edges(nn.Module):
    """[row, in] to [row, out * in]: the value of every edge's curve, those that lead to one node side by side."""

    knots: Tensor
    kept: Tensor

    def __init__(self, n_in: int, n_out: int, intervals: int, generator: torch.Generator) -> None:
        super().__init__()
        low, high = -torch.ones(n_in), torch.ones(n_in)
        self.register_buffer("knots", uniform_knots(low, high, intervals))
        self.register_buffer("kept", torch.ones(n_out, n_in))
        drawn = torch.randn(n_out, n_in, intervals + DEGREE, generator=generator)
        self.weights = nn.Parameter(NOISE / intervals * drawn)
        self.base = nn.Parameter(torch.randn(n_out, n_in, generator=generator) / n_in**0.5)

    def forward(self, values: Float[Tensor, "row in"]) -> Float[Tensor, "row edge"]:
        """Of each row, every curve at its own input."""
        return self.curves(values).reshape(len(values), -1)

    def curves(self, values: Float[Tensor, "row in"]) -> Float[Tensor, "row out in"]:
        """The same with two axes."""
        bent = torch.einsum("rik,oik->roi", b_splines(values, self.knots), self.weights)
        return (bent + self.base * nn.functional.silu(values)[:, None]) * self.kept


class KANLayer(nn.Module):
    """Curves, and their sum at every node."""

    def __init__(self, n_in: int, n_out: int, intervals: int, generator: torch.Generator) -> None:
        super().__init__()
        self.edges = Edges(n_in, n_out, intervals, generator)

    def forward(self, values: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """What the nodes hold."""
        found: Tensor = self.edges(values).unflatten(1, self.edges.kept.shape).sum(-1)
        return found


class KAN(nn.Module):
    """Layers after each other. scale: what is done to the columns first."""

    def __init__(
        self, widths: Sequence[int], *, intervals: int = 5, seed: int = 0, scale: nn.Module | None = None
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise InputError(f"widths are two or more positive numbers, such as [2, 1, 1]; got {list(widths)}")
        generator = torch.Generator().manual_seed(seed)
        self.scale = scale if scale is not None else nn.Identity()
        self.layers = nn.ModuleList(KANLayer(own, after, intervals, generator) for own, after in pairwise(widths))

    def forward(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row output"]:
        """What the last layer's nodes hold."""
        for layer in (self.scale, *self.layers):
            values = layer(values)
        return values

    @property
    def edges(self) -> tuple[Edges, ...]:
        """The curves of every layer."""
        return tuple(layer.edges for layer in self.layers)  # type: ignore[misc]


@dataclass(frozen=True)
class KANConfig:
    """How a network is fitted: `grids` of knots one after the other, each finer, with so many steps of L-BFGS; sparsity
    is the weight of the curves' mean sizes and of their entropy (section 2.5.1), in all but the last grid."""

    hidden: tuple[int, ...] = (2,)
    grids: tuple[int, ...] = (5, 10)
    steps: int = 60
    sparsity: float = 0.0
    prune: bool = False
    seed: int = 0


@torch.no_grad()
def update_grid(net: KAN, values: Float[Tensor, "row column"], intervals: int, margin: float = 0.01) -> None:
    """Lay every layer's knots anew over the values that it gets, in so many intervals, and fit the curves on them to
    what they were at these rows by least squares (grid extension, section 2.4). Changes the network in place."""
    values = net.scale(values)
    for layer in net.layers:
        edges = layer.edges
        assert isinstance(edges, Edges)
        low, high = values.amin(0), values.amax(0)
        room = margin * (high - low) + 1e-6
        basis = b_splines(values, edges.knots)
        old = torch.einsum("rik,oik->ior", basis, edges.weights)
        edges.knots = uniform_knots(low - room, high + room, intervals).to(edges.knots)
        new = b_splines(values, edges.knots).permute(1, 0, 2)
        # In float64: fine grids with few rows between the knots are badly conditioned.
        solved = torch.linalg.lstsq(new.double(), old.transpose(1, 2).double(), driver="gelsd").solution
        edges.weights = nn.Parameter(solved.permute(2, 0, 1).to(edges.weights).contiguous())
        values = layer(values)


@torch.no_grad()
def prune(net: KAN, values: Float[Tensor, "row column"], threshold: float = PRUNED) -> int:
    """Take away the edges whose curve varies by less than a share of its layer's largest over these rows, those of
    nodes that nothing reads, and those into them. Changes the network in place; returns how many edges are left."""
    values = net.scale(values)
    for layer in net.layers:
        edges = layer.edges
        assert isinstance(edges, Edges)
        spread = edges.curves(values).std(0)
        edges.kept *= spread > threshold * spread.max()
        values = layer(values)
    for before, after in reversed(list(pairwise(net.edges))):
        before.kept *= after.kept.any(0)[:, None]
    return int(sum(edges.kept.sum() for edges in net.edges))


def fit_kan_to(
    net: KAN, values: Float[Tensor, "row column"], loss: Callable[[Tensor], Tensor], config: KANConfig
) -> KAN:
    """Fit a network in place, grid after grid; with `prune`, small edges go before the last one."""
    for number, intervals in enumerate(config.grids):
        last = number == len(config.grids) - 1
        if last and config.prune and number:
            prune(net, values)
        update_grid(net, values, intervals)
        _lbfgs(net, values, loss, config.steps, 0.0 if last and number else config.sparsity)
    return net.eval().requires_grad_(False)


def _lbfgs(net: KAN, values: Tensor, loss: Callable[[Tensor], Tensor], steps: int, sparsity: float) -> None:
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimiser = torch.optim.LBFGS(
        weights, max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = loss(net(values))
        if sparsity:
            found = found + sparsity * _size(net, values)
        found.backward()
        return found

    end = optimiser.step(closure).detach()
    if not bool(torch.isfinite(end)):
        raise NotFiniteError(f"the loss is {float(end)}; fit with fewer knots (grids=) or other columns")


def _size(net: KAN, values: Tensor) -> Tensor:
    """Mean size of every curve, summed, and the entropy of their shares, layer by layer (equations 2.17 to 2.20)."""
    total, here = values.new_zeros(()), net.scale(values)
    for layer in net.layers:
        curves = layer.edges.curves(here)  # type: ignore[union-attr, operator]
        sizes = curves.abs().mean(0).flatten()
        shares = sizes / (sizes.sum() + 1e-9)
        total = total + sizes.sum() - (shares * (shares + 1e-9).log()).sum()
        here = curves.sum(-1)
    return total


def fit_kan(table: Table, config: KANConfig | None = None) -> Fitted:
    """A Kolmogorov-Arnold network of a table, on standardised columns.

    Raises InputError as `fitting.check_table`, NotFiniteError when the fit runs away.
    """
    check_table(table)
    chosen, values = config or KANConfig(), table.values.float()
    widths = (len(table.columns), *chosen.hidden, outputs_of(table))
    net = KAN(widths, intervals=chosen.grids[0], seed=chosen.seed, scale=Standardise(values))
    loss = table_loss(table)
    spread, mean = (1.0, 0.0) if table.classes else (float(table.target.std()), float(table.target.mean()))
    fit_kan_to(net, values, loss if table.classes else lambda found: loss(found * spread + mean), chosen)
    made: nn.Module = net if table.classes else Rescaled(net, spread, mean)
    kept = int(sum(edges.kept.sum() for edges in net.edges))
    per = net.edges[0].weights.shape[-1] + 1
    return fitted(table, made, "KAN", edge_parts(net, table.columns, "" if table.classes else "net."), kept * per)


class Rescaled(nn.Module):
    """A network's number on the scale of the target."""

    def __init__(self, net: nn.Module, spread: float, mean: float) -> None:
        super().__init__()
        self.net, self.spread, self.mean = net, spread, mean

    def forward(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row 1"]:
        """[row, 1]."""
        found: Tensor = self.net(values) * self.spread + self.mean
        return found


def edge_site(layer: int, prefix: str = "") -> Site:
    """Where the curves of a layer are."""
    return Site("module", module=f"{prefix}layers.{layer}.edges")


def edge_parts(net: KAN, columns: Sequence[str], prefix: str = "") -> tuple[Part, ...]:
    """Every edge that was kept, as a part by name: from what, to which node of which layer."""
    found: list[Part] = []
    for number, edges in enumerate(net.edges):
        n_out, n_in = edges.kept.shape
        for edge in edges.kept.flatten().nonzero()[:, 0].tolist():
            node, own = divmod(edge, n_in)
            start = columns[own] if number == 0 else f"node {number}.{own}"
            label = f"{start} to node {number + 1}.{node}"
            found.append(coordinate(edge_site(number, prefix), edge, n_out * n_in, label))
    return tuple(found)


def equal_mlp(table: Table, weights: int) -> int:
    """Width of the hidden layer with which an MLP of this table has about so many weights."""
    own, out = len(table.columns), outputs_of(table)
    return max(1, round((weights - out) / (own + out + 1)))


def weights_of(found: Fitted) -> int:
    """Numbers that were fitted; the edges that were pruned are not counted."""
    module = found.model.module
    net = module.net if isinstance(module, Rescaled) else module
    if not isinstance(net, KAN):
        return count_weights(found.model.module)
    return int(sum(float(edges.kept.sum()) * (edges.weights.shape[-1] + 1) for edges in net.edges))

"""What all fits share: what is refused, columns brought to one scale, and one small training loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.errors import InputError, NotFiniteError
from vesalius.inputs import Table

FEWEST = 20
"""Rows that a fit needs."""


class Standardise(nn.Module):
    """Columns with mean 0 and spread 1 on the rows that it was made from; without weights to train."""

    mean: Tensor
    spread: Tensor

    def __init__(self, values: Float[Tensor, "row column"]) -> None:
        super().__init__()
        self.register_buffer("mean", values.mean(0))
        self.register_buffer("spread", values.std(0))

    def forward(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
        """The same rows on the other scale."""
        return (values - self.mean) / self.spread


class MLP(nn.Module):
    """Standardised columns, hidden layers with ReLU, and logits [row, class] or one number [row, 1].

    Each hidden layer's output is at `module:hidden.<n>|out`, numbered from 0.
    """

    def __init__(self, scale: nn.Module, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = scale
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(own, after), nn.ReLU()) for own, after in pairwise(widths[:-1])
        )
        self.head = nn.Linear(widths[-2], widths[-1])

    def forward(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row output"]:
        """Logits of every row, or the number that is predicted."""
        found = self.scale(values)
        for layer in self.hidden:
            found = layer(found)
        logits: Tensor = self.head(found)
        return logits


def check_table(table: Table) -> None:
    """Raises InputError for too few rows, a class that has no row, targets that are all alike, constant columns."""
    if len(table) < FEWEST:
        raise InputError(f"{table!r} has {len(table)} rows; a fit takes at least {FEWEST}")
    seen = set(table.target.tolist())
    missing = [name for number, name in enumerate(table.classes) if number not in seen]
    if len(seen) < 2:
        only = table.classes[int(table.target[0])] if table.classes else f"{float(table.target[0]):g}"
        raise InputError(f"every row has the same target, {only}; there is nothing to tell apart")
    if missing:
        raise InputError(f"no row is of class {missing[0]!r}; give rows of every class, or leave the class out")
    constant = [name for name, spread in zip(table.columns, table.values.std(0), strict=True) if not spread > 0]
    if constant:
        raise InputError(f"{len(constant)} columns hold one value only ({', '.join(constant[:4])}); leave them out")


def outputs_of(table: Table) -> int:
    """Numbers that a network gives for a row: one a class, or one."""
    return max(1, len(table.classes))


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network whose first weights are drawn by a seed, and nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def table_loss(table: Table) -> Callable[[Tensor], Tensor]:
    """Mean loss of logits [row, class] of these rows, or of one number [row, 1]."""
    if table.classes:
        return lambda logits: nn.functional.cross_entropy(logits, table.target)
    target = table.target.float()
    return lambda found: ((found[:, 0] - target) ** 2).mean() / target.var()


def train(
    net: nn.Module,
    values: Float[Tensor, "row column"],
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int = 600,
    lr: float = 0.01,
    decay: float = 1e-3,
) -> nn.Module:
    """Adam on all rows at once; the network is changed in place and returned, ready for use.

    decay: weight decay. Raises NotFiniteError when the loss is no longer finite.
    """
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    net.train()
    for step in range(steps):
        optimiser.zero_grad()
        found = loss(net(values))
        if not bool(torch.isfinite(found)):
            raise NotFiniteError(f"the loss is {float(found)} after {step} steps; use a smaller lr")
        found.backward()
        optimiser.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def count_weights(net: nn.Module) -> int:
    """Numbers that were fitted."""
    return sum(weight.numel() for weight in net.parameters())

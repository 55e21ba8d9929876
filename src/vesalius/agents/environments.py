"""Worlds to act in, many at a time as tensors: a grid with a goal and a hazard, and a pole on a cart.

Nothing here needs gymnasium; `from_gymnasium` plays one of its environments with a policy, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.errors import InputError

Step = tuple[Tensor, Float[Tensor, " world"], Bool[Tensor, " world"]]
MISSING = "environments of gymnasium need the package: pip install 'vesalius[agents]'"


class World(Protocol):
    """Many copies of one environment. state: [world, ...]; all are over after `horizon` steps."""

    @property
    def actions(self) -> tuple[str, ...]: ...
    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is observed."""
        ...

    @property
    def horizon(self) -> int: ...
    def start(self, count: int, generator: torch.Generator) -> Tensor: ...
    def observe(self, state: Tensor) -> Float[Tensor, "world column"]: ...
    def step(self, state: Tensor, action: Int[Tensor, " world"]) -> Step:
        """The next state, the reward, and whether it is over."""
        ...


@dataclass(frozen=True)
class Grid:
    """A square grid: reaching the goal gives 1, the hazard costs 1, every step .05. state: [world, 6], row and column
    of the agent, the goal and the hazard.

    Observed is where each of them is, one-hot. Raises InputError for fewer than 3 rows.
    """

    size: int = 5
    horizon: int = 12

    def __post_init__(self) -> None:
        if self.size < 3:
            raise InputError(f"a grid has at least 3 rows; got {self.size}")

    @property
    def actions(self) -> tuple[str, ...]:
        return ("up", "down", "left", "right")

    @property
    def columns(self) -> tuple[str, ...]:
        cells = [(row, column) for row in range(self.size) for column in range(self.size)]
        return tuple(f"{who} {row},{column}" for who in ("agent", "goal", "hazard") for row, column in cells)

    def start(self, count: int, generator: torch.Generator) -> Int[Tensor, "world 6"]:
        """Three different cells each."""
        cells = torch.rand(count, self.size**2, generator=generator).argsort(1)[:, :3]
        return torch.stack([cells // self.size, cells % self.size], 2).flatten(1)

    def observe(self, state: Int[Tensor, "world 6"]) -> Float[Tensor, "world column"]:
        """One-hot cells of the agent, the goal and the hazard."""
        cells = state[:, ::2] * self.size + state[:, 1::2]
        return torch.nn.functional.one_hot(cells, self.size**2).float().flatten(1)

    def step(self, state: Int[Tensor, "world 6"], action: Int[Tensor, " world"]) -> Step:
        """A step against the edge stays where it is."""
        move = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])[action]
        here = (state[:, :2] + move).clamp(0, self.size - 1)
        goal, hazard = ((here == state[:, first : first + 2]).all(1) for first in (2, 4))
        return torch.cat([here, state[:, 2:]], 1), goal.float() - hazard.float() - 0.05, goal | hazard


@dataclass(frozen=True)
class CartPole:
    """A pole to be balanced on a cart, as in Barto, Sutton and Anderson 1983 (IEEE SMC 13:834) and gymnasium's
    CartPole-v1: 1 for every step until the pole leans by 12 degrees or the cart is 2.4 away. state: [world, 4]."""

    horizon: int = 200

    @property
    def actions(self) -> tuple[str, ...]:
        return ("left", "right")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("position", "velocity", "angle", "angular velocity")

    def start(self, count: int, generator: torch.Generator) -> Float[Tensor, "world 4"]:
        """Nearly upright, nearly at rest."""
        return 0.1 * torch.rand(count, 4, generator=generator) - 0.05

    def observe(self, state: Float[Tensor, "world 4"]) -> Float[Tensor, "world column"]:
        """The state."""
        return state

    def step(self, state: Float[Tensor, "world 4"], action: Int[Tensor, " world"]) -> Step:
        """A fiftieth of a second."""
        place, speed, angle, turn = state.unbind(1)
        force, sine, cosine = 20.0 * action - 10.0, angle.sin(), angle.cos()
        # Masses of cart and pole 1 and .1, half the pole's length .5, gravity 9.8.
        push = (force + 0.05 * turn**2 * sine) / 1.1
        bend = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        gain = push - 0.05 * bend * cosine / 1.1
        new = torch.stack([place + 0.02 * speed, speed + 0.02 * gain, angle + 0.02 * turn, turn + 0.02 * bend], 1)
        over = (new[:, 0].abs() > 2.4) | (new[:, 2].abs() > 12 * torch.pi / 180)
        return new, torch.ones(len(state)), over


def from_gymnasium(
    name: str, act: Callable[[Float[Tensor, "1 column"]], int], *, episodes: int = 5, seed: int = 0
) -> list[float]:
    """Returns of a policy in an environment of gymnasium, episode by episode. act: from what is observed to an action.

    Raises InputError when gymnasium is not installed.
    """
    try:
        # Late and here only: an extra.
        import gymnasium
    except ImportError as error:
        raise InputError(MISSING) from error
    world: Any = gymnasium.make(name)
    returns = []
    for episode in range(episodes):
        seen, _ = world.reset(seed=seed + episode)
        total, over = 0.0, False
        while not over:
            seen, reward, ended, cut, _ = world.step(act(torch.as_tensor(seen).float()[None]))
            total, over = total + float(reward), ended or cut
        returns.append(total)
    return returns

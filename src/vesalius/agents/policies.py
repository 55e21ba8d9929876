"""Policies: a network from what is observed to an action; how it is trained, played, and planted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vesalius.agents.environments import Grid, World
from vesalius.directions import Direction
from vesalius.errors import NotFiniteError
from vesalius.inputs import Table
from vesalius.intervention import Intervention
from vesalius.model import Model
from vesalius.seeds import generator_for
from vesalius.site import Site

HIDDEN = Site("module", module="hidden")
WIDTH = 32


class Policy(nn.Module):
    """[world, column] to logits [world, action]; `hidden` is what the agent has made of what it observes."""

    def __init__(self, columns: int, actions: int, width: int = WIDTH) -> None:
        super().__init__()
        self.body = nn.Linear(columns, width)
        self.hidden = nn.Tanh()
        self.act = nn.Linear(width, actions)

    def forward(self, seen: Float[Tensor, "world column"]) -> Float[Tensor, "world action"]:
        """Logits of the actions."""
        logits: Tensor = self.act(self.hidden(self.body(seen)))
        return logits


@dataclass(frozen=True)
class TrainAgent:
    """How a policy is trained: `updates` of policy gradient, each from `worlds` episodes at once."""

    updates: int = 300
    worlds: int = 256
    lr: float = 0.01
    discount: float = 0.95
    entropy: float = 0.01
    width: int = WIDTH
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Episodes:
    """Of each step and world: the state, what was done, the reward, and whether it was still going on.

    returns: [step, world] discounted sum of the rewards from there on.
    """

    states: Tensor
    actions: Int[Tensor, "step world"]
    rewards: Float[Tensor, "step world"]
    going: Float[Tensor, "step world"]
    returns: Float[Tensor, "step world"]

    @property
    def total(self) -> Float[Tensor, " world"]:
        """Sum of the rewards of each episode."""
        return (self.rewards * self.going).sum(0)


def play(
    policy: Model | nn.Module, world: World, start: Tensor, *, interventions: Sequence[Intervention] = (),
    generator: torch.Generator | None = None, discount: float = 0.95,
) -> Episodes:  # fmt: skip
    """Episodes from these states on. generator: draws the actions; without, the likeliest is taken. interventions: on
    the network, in every step."""
    state, on = start, torch.ones(len(start))
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for _ in range(world.horizon):
        logits = _logits(policy, world.observe(state), interventions)
        action = logits.argmax(1) if generator is None else _drawn(logits, generator)
        new, reward, over = world.step(state, action)
        kept.append((state, action, reward, on))
        on, state = on * ~over, new
        if not bool(on.any()):
            break
    states, actions, rewards, going = (torch.stack(part) for part in zip(*kept, strict=True))
    returns, after = torch.zeros_like(rewards), torch.zeros(len(start))
    for step in reversed(range(len(rewards))):
        after = (rewards[step] + discount * after) * going[step]
        returns[step] = after
    return Episodes(states, actions, rewards, going, returns)


@torch.no_grad()
def _logits(policy: Model | nn.Module, seen: Tensor, interventions: Sequence[Intervention]) -> Tensor:
    logits: Tensor = policy.run(seen, interventions=interventions).logits if isinstance(policy, Model) else policy(seen)
    return logits


def _drawn(logits: Tensor, generator: torch.Generator) -> Int[Tensor, " world"]:
    return torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def train_agent(world: World, config: TrainAgent | None = None) -> Model:
    """A policy trained by policy gradient with a learned baseline (Williams 1992, Machine Learning 8:229).

    Raises NotFiniteError when its weights are no longer finite.
    """
    chosen = config or TrainAgent()
    generator = generator_for("agent", chosen.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        policy = Policy(len(world.columns), len(world.actions), chosen.width)
        critic = nn.Sequential(nn.Linear(len(world.columns), 64), nn.Tanh(), nn.Linear(64, 1))
    optimiser = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=chosen.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, chosen.updates)
    for _ in range(chosen.updates):
        start = world.start(chosen.worlds, generator)
        seen = play(policy, world, start, generator=generator, discount=chosen.discount)
        loss = _loss(policy, critic, world, seen, chosen.entropy)
        if not bool(torch.isfinite(loss)):
            raise NotFiniteError(f"the policy's loss is {float(loss)}; train with a smaller lr")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return Model(policy.eval().requires_grad_(False), name=f"agent in {type(world).__name__}")


def _loss(policy: nn.Module, critic: nn.Module, world: World, seen: Episodes, entropy: float) -> Tensor:
    on = seen.going.flatten().bool()
    rows = world.observe(seen.states.flatten(0, 1)[on])
    logs = policy(rows).log_softmax(1)
    returns, value = seen.returns.flatten()[on], critic(rows)[:, 0]
    better = returns - value.detach()
    better = (better - better.mean()) / (better.std() + 1e-6)
    taken = logs.gather(1, seen.actions.flatten()[on][:, None])[:, 0]
    spread = -(logs.exp() * logs).sum(1)
    return -(taken * better).mean() - entropy * spread.mean() + ((returns - value) ** 2).mean()


def grid_table(policy: Model, grid: Grid, count: int = 1200, seed: int = 0) -> Table:
    """States of a grid as rows of a table, in splits, with what could be represented of each as labels.

    labels: `goal` and `hazard`, each left or right of the agent (states where one is in the agent's column are left
    out), and `future`, whether the reward that is to come is high or low. The target is that reward, discounted.
    """
    state = grid.start(3 * count, generator_for("grid table", seed))
    state = state[(state[:, 1] != state[:, 3]) & (state[:, 1] != state[:, 5])].unique(dim=0)
    state = state[torch.randperm(len(state), generator=generator_for("grid rows", seed))][:count]
    future = play(policy, grid, state).returns[0]
    sides = {
        name: tuple("left" if one else "right" for one in (state[:, at] < state[:, 1]).tolist())
        for name, at in (("goal", 3), ("hazard", 5))
    }
    high = tuple("high" if one else "low" for one in (future > future.median()).tolist())
    table = Table(grid.observe(state), grid.columns, future, labels={**sides, "future": high}, name="grid")
    return table.divided(seed)


def planted_agent(grid: Grid, seed: int = 0) -> tuple[Model, dict[str, Direction]]:
    """An agent made by hand, which knows where the goal and the hazard are, and walks to the goal as if there were no
    hazard; and the directions of what it knows, "goal" and "hazard", in its hidden layer.

    What it knows lies along directions that are drawn at random among others that mean nothing.
    """
    generator = generator_for("planted agent", seed)
    policy = Policy(len(grid.columns), len(grid.actions))
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    cells = torch.arange(grid.size**2)
    across, down = (cells % grid.size).float(), (cells // grid.size).float()
    none = torch.zeros(grid.size**2)
    known = torch.stack([
        torch.cat([-across, across, none]), torch.cat([-down, down, none]), torch.cat([-across, none, across]),
    ]) / grid.size  # fmt: skip
    noise = 0.15 * torch.randn(WIDTH - 3, len(grid.columns), generator=generator)
    with torch.no_grad():
        # Small, so that tanh is nearly a line, and its output has the directions that went in.
        policy.body.weight.copy_(0.3 * basis @ torch.cat([known, noise]))
        policy.body.bias.zero_()
        policy.act.weight.copy_(20 * torch.stack([-basis[:, 1], basis[:, 1], -basis[:, 0], basis[:, 0]]))
        policy.act.bias.zero_()
    model = Model(policy.eval().requires_grad_(False), name=f"planted agent {seed}")
    return model, {"goal": Direction(HIDDEN, basis[:, 0], "goal"), "hazard": Direction(HIDDEN, basis[:, 2], "hazard")}

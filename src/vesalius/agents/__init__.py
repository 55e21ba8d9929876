"""Small agents: worlds as tensors, policies that are trained or made by hand, and their states as tables to study."""

from __future__ import annotations

from vesalius.agents.environments import CartPole, Grid, World, from_gymnasium
from vesalius.agents.policies import (
    HIDDEN,
    Episodes,
    Policy,
    TrainAgent,
    grid_table,
    planted_agent,
    play,
    train_agent,
)

__all__ = [
    "HIDDEN",
    "CartPole",
    "Episodes",
    "Grid",
    "Policy",
    "TrainAgent",
    "World",
    "from_gymnasium",
    "grid_table",
    "planted_agent",
    "play",
    "train_agent",
]

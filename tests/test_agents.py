"""Agents: worlds against plain arithmetic, policies that learn, and verdicts on what was planted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vesalius as vs
from vesalius.errors import InputError

A = vs.agents
ACTIONS = {"goal": ([2], [3]), "hazard": ([3], [2])}


def states(count: int = 200, seed: int = 7) -> torch.Tensor:
    return A.Grid().start(count, torch.Generator().manual_seed(seed))


def test_a_grid_is_what_it_says() -> None:
    grid = A.Grid(size=3)
    state = torch.tensor([[0, 0, 0, 1, 2, 2], [1, 1, 2, 2, 1, 0], [0, 0, 2, 2, 1, 1]])
    new, reward, over = grid.step(state, torch.tensor([3, 2, 0]))
    assert new[:, :2].tolist() == [[0, 1], [1, 0], [0, 0]]
    assert torch.allclose(reward, torch.tensor([0.95, -1.05, -0.05]))
    assert over.tolist() == [True, True, False]
    seen = grid.observe(state)
    assert seen.shape == (3, 27) and bool((seen.sum(1) == 3).all())
    assert grid.columns[int(seen[0, 9:18].argmax()) + 9] == "goal 0,1"
    start = grid.start(50, torch.Generator().manual_seed(0))
    assert not bool((start[:, :2] == start[:, 2:4]).all(1).any())
    with pytest.raises(InputError, match="at least 3 rows"):
        A.Grid(size=2)


def test_a_pole_falls_as_in_gymnasium() -> None:
    """One step worked out by hand, from the equations of motion."""
    world = A.CartPole()
    new, reward, over = world.step(torch.tensor([[0.0, 0.0, 0.1, 0.0]]), torch.tensor([1]))
    sine, cosine = torch.tensor(0.1).sin(), torch.tensor(0.1).cos()
    push = 10 / 1.1
    bend = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    gain = push - 0.05 * bend * cosine / 1.1
    assert torch.allclose(new[0], torch.tensor([0.0, 0.02 * gain, 0.1, 0.02 * bend]), atol=1e-6)
    assert float(reward) == 1.0 and not bool(over)
    assert bool(world.step(torch.tensor([[2.39, 3.0, 0.0, 0.0]]), torch.tensor([1]))[2])
    gymnasium = pytest.importorskip("gymnasium")
    theirs = gymnasium.make("CartPole-v1").unwrapped
    theirs.reset(seed=0)
    theirs.state = (0.1, -0.2, 0.05, 0.3)
    seen = theirs.step(0)[0]
    ours = world.step(torch.tensor([[0.1, -0.2, 0.05, 0.3]]), torch.tensor([0]))[0][0]
    assert torch.allclose(torch.as_tensor(seen).float(), ours, atol=1e-5)


def test_returns_are_sums_until_the_end() -> None:
    model, _ = A.planted_agent(A.Grid())
    seen = A.play(model, A.Grid(), states(20), discount=0.5)
    total, factor = torch.zeros(20), torch.ones(20)
    for reward, going in zip(seen.rewards, seen.going, strict=True):
        total, factor = total + factor * reward * going, factor * 0.5
    assert torch.allclose(seen.returns[0], total, atol=1e-6)
    assert bool((seen.going.diff(dim=0) <= 0).all())


def test_an_agent_learns_to_go_to_the_goal_and_round_the_hazard() -> None:
    grid = A.Grid()
    agent = A.train_agent(grid, A.TrainAgent(updates=110, worlds=160))
    trained = float(A.play(agent, grid, states()).total.mean())
    planted = float(A.play(A.planted_agent(grid)[0], grid, states()).total.mean())
    random = float(A.play(vs.validate.reinitialised(agent, 0), grid, states()).total.mean())
    assert trained > 0.3 > random and planted > 0.5
    again = A.train_agent(grid, A.TrainAgent(updates=2, worlds=16))
    assert again.content_hash == A.train_agent(grid, A.TrainAgent(updates=2, worlds=16)).content_hash


@pytest.mark.slow
def test_an_agent_learns_to_balance_a_pole() -> None:
    world = A.CartPole()
    agent = A.train_agent(world, A.TrainAgent(updates=40, worlds=32, discount=0.99, lr=0.02))
    start = world.start(50, torch.Generator().manual_seed(1))
    assert float(A.play(agent, world, start).total.mean()) > 150


@pytest.mark.parametrize("seed", [0, 3])
def test_what_is_planted_and_used_is_told_from_what_is_planted_and_ignored(seed: int, tmp_path: Path) -> None:
    grid = A.Grid()
    model, truth = A.planted_agent(grid, seed)
    table = A.grid_table(model, grid, seed=seed)
    with vs.Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = vs.studies.represented(
            model, table, A.HIDDEN, {"goal": "left", "hazard": "left"}, ledger, answers=ACTIONS
        )
        assert found["goal"].said == vs.studies.USED and found["hazard"].said == vs.studies.UNUSED
        assert not ledger.families()[0].exploratory
    assert all(abs(found[name].direction.angle(truth[name])) > 0.9 for name in truth)


def test_giving_the_goal_another_place_changes_where_it_goes_and_the_hazard_does_not() -> None:
    grid = A.Grid()
    model, truth = A.planted_agent(grid)
    state = states()
    state = state[state[:, 1] < state[:, 3]]  # the goal is to the right
    values = model.run(grid.observe(state), capture=A.HIDDEN)[A.HIDDEN]

    def gone(name: str | None) -> float:
        """Share of the first moves that are to the left."""
        edits = [vs.Patch(truth[name], source=-2 * truth[name].read(values).abs())] if name is not None else []
        logits = model.run(grid.observe(state), interventions=edits).logits
        return float((logits[:, 2:].argmax(1) == 0).float().mean())

    assert gone(None) < 0.05 and gone("goal") > 0.95 and gone("hazard") < 0.05
    held = vs.Patch(truth["goal"], source=torch.full((len(state),), -1.0))
    moved = A.play(model, grid, state, interventions=[held])
    assert float((moved.states[-1][:, 1] <= state[:, 1]).float().mean()) > 0.9


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    grid = A.Grid()
    model, _ = A.planted_agent(grid)
    table = A.grid_table(model, grid, 60)
    asked = pytest.raises(InputError, match="0 of 30 rows have goal 'above'")
    with vs.Ledger(tmp_path / "ledger.sqlite") as ledger, asked:
        vs.studies.represented(model, table, A.HIDDEN, {"goal": "above"}, ledger)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with pytest.raises(InputError, match="pip install 'vesalius\\[agents\\]'"):
        A.from_gymnasium("CartPole-v1", lambda seen: 0)

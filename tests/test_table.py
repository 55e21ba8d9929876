"""Tables of rows: what is refused, splits, and quantities of their columns against plain arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vesalius as vs
from tables_support import linear_table
from vesalius.errors import InputError, NotFiniteError, ProtocolError, UnknownNameError
from vesalius.intervention import derangement
from vesalius.quantities import CARRIES, COLUMNS, HELPS, MOVES, RAISES, REPAIRS, column_part, coordinate
from vesalius.quantities.table_rows import other_coordinates


def linear(weights: list[list[float]]) -> vs.Model:
    """Logits that are a product of the columns."""
    net = torch.nn.Linear(len(weights[0]), len(weights), bias=False).requires_grad_(False)
    net.weight.copy_(torch.tensor(weights))
    return vs.Model(net)


def test_what_is_wrong_with_a_table_is_said() -> None:
    table = linear_table(30)
    x = table.values
    with pytest.raises(NotFiniteError, match="row 3, column 'second'"):
        replace(table, values=x.masked_fill(torch.arange(90).view(30, 3) == 10, float("nan")))
    with pytest.raises(InputError, match="different names"):
        replace(table, columns=("a", "a", "b"))
    with pytest.raises(InputError, match="targets run from 0 to 2"):
        replace(table, target=table.target * 2)
    with pytest.raises(InputError, match="without classes"):
        replace(table, classes=())
    with pytest.raises(InputError, match="labels for 30 rows"):
        replace(table, labels={"size": ("a",)})
    with pytest.raises(UnknownNameError, match="column 'weight'"):
        table.column("weight")
    with pytest.raises(UnknownNameError, match="split 'validation'"):
        table.split("validation")
    with pytest.raises(InputError, match="no row of class 'yes'"):
        replace(table, target=torch.cat([torch.zeros(29), torch.ones(1)]).long()).divided()


def test_splits_keep_equal_rows_and_groups_on_one_side() -> None:
    table = linear_table(200)
    twice = vs.Table(table.values.repeat(2, 1), table.columns, table.target.repeat(2), table.classes)
    halves = twice.divided(seed=1)
    own, other = (set(halves.split(name).example_hashes) for name in halves.split_names)
    assert not own & other and abs(len(own) - len(other)) <= 2
    patients = replace(table, groups={"patient": tuple(str(row // 4) for row in range(200))}).divided()
    sides = [set(patients.split(name).groups["patient"]) for name in ("discovery", "validation")]
    assert not sides[0] & sides[1]
    shares = [patients.split(name).target.float().mean() for name in ("discovery", "validation")]
    assert abs(float(shares[0] - shares[1])) < 0.15


def test_quantities_of_columns_are_what_plain_arithmetic_gives() -> None:
    table = linear_table(60)
    runs = vs.Runs(linear([[0.0, 0.0, 0.0], [2.0, -1.0, 0.0]]), table)
    first, third = (column_part(table, name) for name in ("first", "third"))
    rise = RAISES.measure(runs, first, {"low": -1.0, "high": 0.5, "class": "yes"})
    assert torch.allclose(rise, torch.full((60,), 3.0).double(), atol=1e-5)
    assert float(HELPS.measure(runs, third, {}).abs().max()) == 0.0
    x, own = table.values.double(), torch.arange(60)

    def loss(values: torch.Tensor) -> torch.Tensor:
        odds = 2 * values[:, 0] - values[:, 1]
        return -torch.stack([-odds.exp().log1p(), odds - odds.exp().log1p()], 1)[own, table.target]

    wanted = torch.zeros(60).double()
    for draw in range(4):
        moved = x.clone()
        moved[:, 0] = x[derangement(60, draw), 0]
        wanted += (loss(moved) - loss(x)) / 4
    assert torch.allclose(HELPS.measure(runs, first, {}), wanted, atol=1e-5)
    held = REPAIRS.measure(runs, first, {"value": [0.0]})
    right = ((2 * x[:, 0] - x[:, 1] > 0) == table.target.bool()).double()
    assert torch.equal(held, ((-x[:, 1] > 0) == table.target.bool()).double() - right)
    both = column_part(table, "first", "second")
    assert isinstance(both, vs.Subspace)
    assert torch.allclose(HELPS.measure(runs, both, {}), HELPS.scale_values(runs, both, {}), atol=1e-5)


def test_controls_are_other_columns_and_random_ones_where_there_are_none() -> None:
    table = linear_table(60)
    found = HELPS.matched(vs.Runs(linear([[0.0] * 3] * 2), table), column_part(table, "first"), (), {})
    assert len(found.parts) == 2 and "other coordinates" in found.rule
    assert other_coordinates(vs.Direction(COLUMNS, torch.tensor([1.0, 1.0, 0.0]))) == ()
    with pytest.raises(InputError, match="3 coordinates"):
        coordinate(COLUMNS, 3, 3)


def test_a_concept_in_rows_is_carried_and_used_or_not(tmp_path: Path) -> None:
    """The label is the sign of the third column: a network that reads it uses it, one that does not carries it."""
    table = linear_table(300)
    signs = tuple("up" if one > 0 else "down" for one in table.values[:, 2].tolist())
    table = replace(table, labels={"third": signs}).divided()
    given = {"label": "third", "value": "up"}
    for weight, wanted in ((2.0, "SUPPORTED"), (0.0, "REFUTED")):
        model = linear([[0.0, 0.0, 0.0], [1.0, -1.0, weight]])
        ledger = vs.Ledger(tmp_path / f"{weight}.sqlite")
        with ledger:
            runs = vs.Runs(model, ledger.open(table, "discovery"))
            part = column_part(table, "third")
            claims = [
                vs.describe.claim_about(runs, part, CARRIES, given, size=0.15, n=150),
                vs.describe.claim_about(runs, part, MOVES, given, size=0.05, n=150),
            ]
            family = ledger.register(claims)
            fresh = ledger.open(table, "validation")
            for claim in family.claims:
                ledger.append(vs.validate.check(claim, model=model, data=fresh))
            assert [ledger.verdict(claim).outcome for claim in family.claims] == ["SUPPORTED", wanted]
            assert not family.exploratory and ledger.verify().evidence == 2


def test_the_ledger_refuses_rows_that_were_seen(tmp_path: Path) -> None:
    table = linear_table(60)
    table = replace(table, splits=("discovery",) * 40 + ("validation",) * 20)
    again = vs.Table(
        torch.cat([table.values, table.values[:5]]),
        table.columns,
        torch.cat([table.target, table.target[:5]]),
        table.classes,
        splits=(*table.splits, *("validation",) * 5),
    )
    model = linear([[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
    with vs.Ledger(tmp_path / "ledger.sqlite") as ledger:
        runs = vs.Runs(model, ledger.open(again, "discovery"))
        claim = vs.describe.claim_about(runs, column_part(table, "first"), HELPS, n=20)
        ledger.register([claim])
        evidence = vs.validate.check(claim, model=model, data=ledger.open(again, "validation"))
        with pytest.raises(ProtocolError, match="are in split 'discovery'"):
            ledger.append(evidence)

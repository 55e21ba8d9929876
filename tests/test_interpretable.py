"""Models that are interpretable by design: against other implementations, on planted truth, and through the ledger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from sklearn.linear_model import LogisticRegression

import vesalius as vs
from tables_support import CONCEPTS, linear_table, planted_concepts
from vesalius.describe import claims_of
from vesalius.describe.description import Discovery
from vesalius.errors import InputError, NotFiniteError, UnknownNameError
from vesalius.interpretable.bottleneck import concepts_of
from vesalius.interpretable.fitting import check_table
from vesalius.interpretable.kan import equal_mlp
from vesalius.interpretable.splines import b_splines, uniform_knots
from vesalius.interpretable.symbolic import fit_function
from vesalius.quantities import HELPS, RAISES, column_part

I = vs.interpretable  # noqa: E741


def test_what_cannot_be_fitted_is_refused() -> None:
    table = linear_table(60)
    with pytest.raises(InputError, match="10 rows; a fit takes at least 20"):
        I.fit_linear(table.subset(range(10)))
    with pytest.raises(InputError, match="every row has the same target, yes"):
        I.fit_mlp(replace(table, target=torch.ones(60).long()))
    with pytest.raises(InputError, match="no row is of class 'maybe'"):
        I.fit_gam(replace(table, classes=("no", "yes", "maybe")))
    flat = replace(table, values=table.values * torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(InputError, match="1 columns hold one value only \\(second\\)"):
        I.fit_kan(flat)
    check_table(table)
    found = I.fit_linear(table)
    with pytest.raises(InputError, match="this model takes the columns"):
        found.predict(replace(table, columns=("first", "second", "fourth")))
    with pytest.raises(InputError, match="tells \\['no', 'yes'\\] apart"):
        found.predict(replace(table, classes=("bad", "good")))
    labelled = replace(table, labels={"size": ("large",) * 60})
    with pytest.raises(InputError, match="60 of 60 rows have size 'large'"):
        I.fit_bottleneck(labelled, {"size": "large"})
    with pytest.raises(UnknownNameError, match="way to fit"):
        I.fit_bottleneck(labelled, {"size": "large"}, how="alone")
    with pytest.raises(InputError, match="widths"):
        I.KAN([2])
    with pytest.raises(InputError, match="constant"):
        I.suggest(torch.arange(10.0), torch.ones(10))


def test_splines_are_scipys_and_go_on_flat() -> None:
    knots = uniform_knots(torch.tensor([0.0, -1.0]).double(), torch.tensor([1.0, 3.0]).double(), 5)
    x = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)).double() * 0.99
    found = b_splines(x, knots)
    for column in range(2):
        wanted = BSpline.design_matrix(x[:, column].numpy(), knots[column].numpy(), 3).toarray()
        assert np.abs(found[:, column].numpy() - wanted).max() < 1e-12
    assert torch.allclose(found.sum(-1), torch.ones(50, 2).double())
    beyond = b_splines(torch.tensor([[9.0, 9.0], [1.0, 3.0]]).double(), knots)
    assert torch.allclose(beyond[0], beyond[1])
    with pytest.raises(InputError, match="nothing to bend on"):
        uniform_knots(torch.zeros(1), torch.zeros(1), 3)


def test_a_logistic_model_is_scikit_learns_and_its_terms_add_up() -> None:
    table = linear_table(300)
    found = I.fit_linear(table)
    rows = (table.values - table.values.mean(0)) / table.values.std(0)
    fits = [LogisticRegression(C=c).fit(rows, table.target).predict_proba(rows) for c in (0.01, 0.1, 1.0, 10.0, 100.0)]
    assert min(np.abs(found.predict(table).numpy() - one).max() for one in fits) < 1e-3
    run = found.model.run(table.values, capture=I.TERMS)
    total = run[I.TERMS].sum(1) + found.model.module.intercept
    assert torch.allclose(total, run.logits[:, 1] - run.logits[:, 0], atol=1e-6)
    assert [part.label for part in found.parts] == list(table.columns)
    # A term held at another value moves the log-odds by just that.
    term = vs.Patch(found.parts[0], source=torch.zeros(300))
    held = found.model.run(table.values, interventions=[term]).logits
    assert torch.allclose((run.logits - held)[:, 1], run[I.TERMS][:, 0], atol=1e-5)


def test_curves_find_what_a_line_cannot() -> None:
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    table = vs.Table(x, ("u", "v"), (x[:, 0].abs() > 0.7).long(), ("inside", "outside")).divided()
    fit, fresh = table.split("discovery"), table.split("validation")
    line, curve = I.fit_linear(fit), I.fit_gam(fit)
    assert line.score(fresh).estimate < 0.75 < 0.9 < curve.score(fresh).estimate
    numbers = vs.Table(x, ("u", "v"), x[:, 0] ** 2 + x[:, 1])
    assert I.fit_gam(numbers).score(numbers).estimate > 0.95 > 0.7 > I.fit_linear(numbers).score(numbers).estimate


@pytest.mark.parametrize("how", ["linear", "gam", "mlp"])
def test_what_is_said_of_columns_gets_verdicts(how: str, tmp_path: Path) -> None:
    """What the columns do is planted: the first raises, the second lowers, and nothing is said of the third. A claim
    that the third matters is refuted."""
    table = linear_table(600).divided()
    with vs.Ledger(tmp_path / "ledger.sqlite") as ledger:
        fit = {"linear": I.fit_linear, "gam": I.fit_gam, "mlp": I.fit_mlp}[how]
        fitted = fit(ledger.open(table, "discovery"))
        runs = vs.Runs(fitted.model, table.split("discovery"))
        said = I.describe_columns(runs, fitted, ["first", "second"])
        assert [one.predictions[0].statement.split()[0] for one in said] == ["raises", "lowers"]
        setting = Discovery.of(runs, [one.part for one in said], study="columns", n=300)
        claims = [claim for one in said for claim, _ in claims_of(one, setting)]
        wrong = vs.describe.claim_about(runs, column_part(table, "third"), HELPS, size=0.1, n=300, study="columns")
        family = ledger.register([*claims, wrong])
        fresh = vs.Runs(fitted.model, ledger.open(table, "validation"))
        for claim in family.claims:
            ledger.append(vs.validate.check(claim, runs=fresh))
        found = {claim.id: ledger.verdict(claim).outcome for claim in family.claims}
        assert all(found[claim.id] == "SUPPORTED" for claim in claims if claim.quantity == "raises")
        assert not any(found[claim.id] == "REFUTED" for claim in claims) and found[claims[1].id] == "SUPPORTED"
        assert found[wrong.id] == "REFUTED"


@pytest.mark.slow
def test_concepts_that_are_put_right_help_and_those_that_leak_are_found() -> None:
    """Where the concepts say it all, every one that is put right helps, up to the truth. Where one is missing, a
    network that was fitted jointly smuggles it through the others, and putting them right does harm."""
    fit, fresh = planted_concepts(400, 0), planted_concepts(600, 1)
    found = I.fit_bottleneck(fit, CONCEPTS, steps=300)
    curve = I.intervened(found, fresh, CONCEPTS)
    scores = [one.estimate for one in curve.scores]
    assert scores == sorted(scores) and scores[-1] > 0.95 > scores[0]
    truth = concepts_of(fresh, CONCEPTS)
    assert float(((found.model.run(fresh.values, capture=I.CONCEPTS)[I.CONCEPTS] > 0.5) == truth).float().mean()) > 0.9
    fit, fresh = planted_concepts(400, 0, hidden=True), planted_concepts(600, 1, hidden=True)
    joint = I.leakage(fit, fresh, CONCEPTS, how="joint", steps=300)
    apart = I.leakage(fit, fresh, CONCEPTS, how="independent", steps=300)
    assert joint.leaks and joint.soft.estimate > joint.ceiling.estimate + 0.03
    assert not apart.leaks and apart.soft.estimate <= apart.ceiling.estimate
    with pytest.raises(UnknownNameError, match="concept of this model"):
        I.intervened(found, fresh, CONCEPTS, ["colour"])


def target(x: torch.Tensor) -> torch.Tensor:
    return (torch.sin(torch.pi * x[:, 0]) + x[:, 1] ** 2).exp()


def test_a_kan_finds_the_sine_and_the_square_and_beats_an_mlp_of_its_size() -> None:
    """f(x, y) = exp(sin(pi x) + y^2), of Liu et al. 2024, section 2.1."""
    generator = torch.Generator().manual_seed(0)
    x, fresh = (2 * torch.rand(800, 2, generator=generator) - 1 for _ in range(2))
    net = I.KAN([2, 1, 1], seed=1)
    config = I.KANConfig(grids=(5, 10, 20), steps=60)
    I.fit_kan_to(net, x, lambda found: ((found[:, 0] - target(x)) ** 2).mean(), config)
    error = float(((net(fresh)[:, 0] - target(fresh)) ** 2).mean().sqrt())
    assert error < 0.01
    names = I.name_edges(net, x)
    assert [names[key].name for key in ((0, 0, 0), (0, 0, 1), (1, 0, 0))] == ["sin", "x^2", "exp"]
    assert all(one.fits for one in names.values())
    assert abs(abs(names[0, 0, 0].a) - torch.pi) < 0.05
    table = vs.Table(x, ("x", "y"), target(x))
    mlp = I.fit_mlp(table, hidden=(equal_mlp(table, 3 * 24),), steps=800, decay=0.0)
    plain = float(((mlp.predict(replace(table, values=fresh))[:, 0] - target(fresh)) ** 2).mean().sqrt())
    assert plain > 3 * error
    # A name that is no name: noise is called nothing.
    noise = torch.randn(200, generator=generator)
    assert not I.suggest(x[:200, 0], noise)[0].fits


def test_a_finer_grid_keeps_the_curves_and_idle_edges_are_pruned() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(400, 3, generator=generator) - 1
    net = I.KAN([3, 2, 1], seed=0)
    I.update_grid(net, x, 5)
    before = net(x).detach()
    I.update_grid(net, x, 15)
    assert float((net(x).detach() - before).abs().max()) < 0.02 * float(before.std())
    y = x[:, 0] ** 2 - x[:, 1]
    I.fit_kan_to(net, x, lambda f: ((f[:, 0] - y) ** 2).mean(), I.KANConfig(grids=(3,), steps=60, sparsity=0.01))
    left = I.prune(net, x, 0.05)
    assert left <= 6 and not bool(net.edges[0].kept[:, 2].any())
    assert float(((net(x).detach()[:, 0] - y) ** 2).mean().sqrt()) < 0.1
    table = vs.Table(x, ("u", "v", "w"), y)
    found = I.fit_kan(table, I.KANConfig(hidden=(1,), grids=(3, 5), steps=30, sparsity=0.001, prune=True))
    assert found.score(table).estimate > 0.98 and I.weights_of(found) <= found.complexity
    assert all("w" not in part.label.split() for part in found.parts)
    run = found.model.run(x, capture=found.parts[0].site)
    assert run[found.parts[0].site].shape == (400, 3)


def test_a_fit_that_runs_away_is_an_error() -> None:
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    net = I.KAN([2, 1], seed=0)
    with pytest.raises(NotFiniteError, match="the loss is"):
        I.fit_kan_to(net, x, lambda found: found.sum() * float("nan"), I.KANConfig(grids=(3,), steps=3))


def test_functions_are_found_up_to_scale_and_shift() -> None:
    x = torch.linspace(-1, 1, 150)
    for name, curve in (("exp", (2 * x + 1).exp()), ("sin", 3 * torch.sin(4 * x + 1) - 2), ("x", 2 * x - 1)):
        assert I.suggest(x, curve)[0].name == name
        assert fit_function(x, curve, name).r2 > 0.9999
    with pytest.raises(UnknownNameError, match="function 'bessel'"):
        fit_function(x, x, "bessel")
    assert str(fit_function(x, 2 * x - 1, "x")).startswith("2 (1 x + 0) - 1") or "R²" in str(fit_function(x, x, "x"))


def test_an_ebm_becomes_a_network_with_the_same_numbers() -> None:
    pytest.importorskip("interpret")
    from interpret.glassbox import ExplainableBoostingClassifier

    table = linear_table(300)
    made = ExplainableBoostingClassifier(interactions=1, max_rounds=50, outer_bags=2, random_state=0, n_jobs=1)
    made.fit(table.values.double().numpy(), table.target.numpy())
    found = I.from_ebm(made, table)
    wanted = made.predict_proba(table.values.double().numpy())
    assert np.abs(found.predict(table).numpy() - wanted).max() < 1e-6
    assert len(found.parts) == len(made.term_features_)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "interpret.glassbox", None)
    with pytest.raises(InputError, match="pip install 'vesalius\\[ebm\\]'"):
        I.fit_ebm(linear_table(60))


def test_a_term_is_not_claimed_on_a_model_of_something_else() -> None:
    table = linear_table(60)
    found = I.fit_linear(table)
    other = vs.Runs(I.fit_linear(table).model, table)
    with pytest.raises(InputError, match="of the model"):
        I.describe_columns(other, found)
    with pytest.raises(InputError, match="no class 'maybe'"):
        RAISES.measure(
            vs.Runs(found.model, table), column_part(table, "first"), {"low": 0, "high": 1, "class": "maybe"}
        )

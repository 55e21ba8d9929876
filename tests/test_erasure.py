"""Erasure: the theorems of LEACE with an independent reader, its rivals, and erasers as interventions in a model."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor

import tiny
import vesalius as vs
from vesalius import intervention
from vesalius.concepts import (
    Behaviour,
    GaussianEraser,
    LeaceFitter,
    OracleEraser,
    Rows,
    erasure_effect,
    fit_eraser,
    fit_rows,
    interchange_effect,
    leaks,
    load_eraser,
    partners,
    push_effect,
    random_eraser,
    specificity,
)
from vesalius.concepts.erasure import inlp, leace, mean_projection, moved
from vesalius.concepts.influence import gradients, influence
from vesalius.errors import FileFormatError, InputError, InterventionError, NotFiniteError, UnknownNameError
from vesalius.inputs import Raw
from vesalius.patching.tail import Tail
from vesalius.seeds import generator_for
from vesalius.site import Site


def labelled(n: int = 4000, width: int = 20, share: float = 0.4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated Gaussian rows whose mean depends on a label."""
    g = torch.Generator().manual_seed(seed)
    z = (torch.rand(n, generator=g) < share).long()
    mix = torch.randn(width, width, generator=g, dtype=torch.float64)
    x = torch.randn(n, width, generator=g, dtype=torch.float64) @ mix
    return x + z[:, None] * torch.randn(width, generator=g, dtype=torch.float64) * 1.5, z


def reader(x: Tensor, z: Tensor) -> tuple[float, float]:
    """Accuracy of an independent linear reader on the rows that it was fitted to, and its largest deviation from the
    base rate."""
    fitted = LogisticRegression(C=1e4, max_iter=5000, tol=1e-10).fit(x.numpy(), z.numpy())
    base = z.double().mean().item()
    return fitted.score(x.numpy(), z.numpy()), float(np.abs(fitted.predict_proba(x.numpy())[:, 1] - base).max())


def test_after_leace_no_linear_reader_beats_the_majority_and_nothing_moves_less() -> None:
    x, z = labelled()
    majority = max(z.double().mean().item(), 1 - z.double().mean().item())
    assert reader(x, z)[0] > 0.95
    eraser = leace(x, z)
    after = eraser(x)
    accuracy, away = reader(after, z)
    assert eraser.rank == 1 and accuracy == pytest.approx(majority, abs=1e-12) and away < 1e-6
    assert float((after - after.mean(0)).T.mul(1 / len(x)).matmul((z - z.double().mean()).double()).abs().max()) < 1e-10
    assert torch.allclose(after.mean(0), x.mean(0)) and torch.allclose(eraser(after), after)
    others = [mean_projection(x, z)(x), inlp(x, z)(x)]
    assert all(moved(x, other) > moved(x, after) for other in others)
    # The oracle, which is told the labels, moves even less.
    assert moved(x, OracleEraser.fit(x, z)(x, z)) < moved(x, after)


def test_leace_is_the_least_squares_solution_of_its_own_problem() -> None:
    """Against a numerical minimum over maps whose output is uncorrelated with the label."""
    x, z = labelled(n=300, width=4)
    away, own = x - x.mean(0), (z - z.double().mean()).double()
    direction = (away.T @ own)[:, None]
    # P direction = 0 leaves P = (I - direction q^T) for the rows of P; the best q is found by least squares.
    covariance = away.T @ away
    q = torch.linalg.solve(covariance, direction)
    best = torch.eye(4, dtype=torch.float64) - direction @ q.T / float(q.T @ direction)
    assert torch.allclose(away @ best.T + x.mean(0), leace(x, z)(x), atol=1e-9)


def test_one_round_of_inlp_leaves_the_label_and_many_do_not() -> None:
    x, z = labelled()
    majority = max(z.double().mean().item(), 1 - z.double().mean().item())
    assert reader(inlp(x, z, rounds=1)(x), z)[0] > majority + 0.1
    assert reader(inlp(x, z)(x), z)[0] == pytest.approx(majority, abs=0.01)


def test_batches_and_one_pass_agree_and_so_do_classes_and_numbers() -> None:
    x, z = labelled(n=500)
    x, z = x + 1e4, z + (torch.arange(500) % 5 == 0)  # three classes, far from zero
    fitter = LeaceFitter(20, 3)
    for some in torch.arange(500).split(37):
        fitter.update(x[some], z[some])
    assert torch.allclose(fitter.eraser(x), leace(x, z)(x), atol=1e-7)
    assert leace(x, z).rank == 2
    number = x[:, 0] * 0.3 + torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    after = leace(x, number)(x)
    assert float(torch.corrcoef(torch.stack([after[:, 3], number]))[0, 1].abs()) < 1e-6
    assert x.float().dtype == leace(x, z)(x.float()).dtype


def test_a_weak_concept_is_erased_too() -> None:
    """Whitened correlation of .005, which a looser threshold would leave."""
    g = torch.Generator().manual_seed(0)
    z = torch.arange(200_000) % 2
    x = torch.randn(200_000, 3, generator=g, dtype=torch.float64)
    x[:, 0] += 0.01 * z
    after = leace(x, z)(x)
    assert abs(float(after[z == 1, 0].mean() - after[z == 0, 0].mean())) < 1e-12
    assert leace(x, z, weakest=0.01).rank == 0


def test_what_is_not_linear_survives_leace_and_not_the_gaussian_eraser() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.arange(2000) % 2
    x = torch.randn(2000, 4, generator=g, dtype=torch.float64)
    x[z == 1] *= 3.0
    x[:, 0] += z

    def mlp(rows: Tensor) -> float:
        fitted = MLPClassifier((16,), max_iter=300, solver="lbfgs", random_state=0, alpha=0.1, tol=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fitted.fit(rows[:1000].numpy(), z[:1000]).score(rows[1000:].numpy(), z[1000:])

    assert mlp(leace(x, z)(x)) > 0.8
    gaussian = GaussianEraser.fit(x, z)
    after = gaussian(x, z)
    assert mlp(after) < 0.56
    assert torch.allclose(after[z == 0].T.cov(), after[z == 1].T.cov(), atol=1e-8)
    three = z + (torch.arange(2000) % 3 == 0)
    after = GaussianEraser.fit(x, three)(x, three)
    assert torch.allclose(after[three == 0].T.cov(), after[three == 2].T.cov(), atol=1e-6)


@pytest.mark.parametrize(
    ("x", "z", "error", "words"),
    [
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), InputError, "a label each"),
        (torch.full((4, 3), torch.nan), torch.arange(4) % 2, NotFiniteError, "NaN"),
        (torch.randn(4, 3), torch.tensor([0, 1, 5, -1]), InputError, "numbers of classes"),
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.long), InputError, "nothing to erase"),
        (torch.randn(1, 3), torch.ones(1, dtype=torch.long), InputError, "at least 2 rows"),
    ],
)
def test_what_cannot_be_erased_from_is_refused(x: Tensor, z: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fit_rows(x, z)
    assert random_eraser(leace(*labelled(200)), generator_for("r")).rank == 1


def test_leaks_say_what_a_reader_still_finds() -> None:
    x, z = labelled(n=600, width=6)
    x[z == 1] *= 4.0
    splits = ("train", "test") * 300
    concept = vs.Concept("z", tuple(f"t{n}" for n in range(600)), tuple(map(str, z.tolist())), splits=splits)
    rows = Rows(concept, {Site("embed"): x.float().numpy()}, np.arange(600), "last")
    some = rows.of("discovery")
    linear, network = leaks(fit_rows(x[some].float(), z[some]), rows, "embed")
    assert (
        linear.fitted_before > 0.8
        and linear.fitted_after <= max(z[some].double().mean(), 1)
        and (linear.after.estimate < 0.66)
    )
    assert network.after.estimate > 0.8


# In a model


@pytest.fixture(scope="module")
def model() -> vs.Model:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def concept() -> vs.Concept:
    """Whether the last token is under 30; ids of unequal groups."""
    ids = torch.randint(2, tiny.VOCAB, (120, 5), generator=torch.Generator().manual_seed(0))
    labels = tuple("low" if int(row[-1]) < 30 else "high" for row in ids)
    return vs.Concept("token", ids, labels)


def test_an_eraser_is_an_intervention_in_run_and_generate_and_keeps_in_files(
    model: vs.Model, concept: vs.Concept, tmp_path: Path
) -> None:
    eraser = fit_eraser(model, concept, "layers.1.resid_post", sink=vs.silent)
    (edit,) = eraser.edits()
    ids, site = concept.inputs, "layers.1.resid_post"
    before, after = (model.run(ids, site, edits)[site].detach() for edits in ([], [edit]))
    wanted = eraser[site](before.double())
    assert torch.allclose(after.double(), wanted, atol=1e-5)
    numbers = torch.from_numpy(concept.numbers)
    last = after[:, -1].double()
    gap = last[numbers == 1].mean(0) - last[numbers == 0].mean(0)
    assert (
        float(gap.norm()) < 1e-4 < float((before[numbers == 1, -1].mean(0) - before[numbers == 0, -1].mean(0)).norm())
    )
    eraser.save(tmp_path / "eraser.json")
    again = load_eraser(tmp_path / "eraser.json")
    assert torch.equal(again[site].reads, eraser[site].reads) and again.at == "last"
    intervention.save([edit], tmp_path / "edit.json")
    (loaded,) = intervention.load(tmp_path / "edit.json")
    assert torch.equal(model.run(ids, site, [loaded])[site], after)
    written = model.generate(vs.Tokens(ids[:2]), 4, [edit])
    longer = torch.tensor([[*row.tolist(), *new] for row, new in zip(ids[:2], written.new, strict=True)])
    plain = model.run(longer[:, :-1], interventions=[edit]).logits[:, -4:].argmax(-1)
    assert plain.tolist() == [list(row) for row in written.new]
    with pytest.raises(InputError, match="is of model"):
        again.check(tiny.model("llama", seed=5))
    with pytest.raises(InterventionError, match="another site"):
        model.run(ids, interventions=[vs.Erase("layers.1.mlp_post", reads=edit.reads, writes=edit.writes)])
    with pytest.raises(InputError, match="alike"):
        vs.Erase(site, reads=edit.reads, writes=edit.writes[:, :3])
    (tmp_path / "eraser.json").write_text("[]")
    with pytest.raises(FileFormatError, match="holds no eraser"):
        load_eraser(tmp_path / "eraser.json")


def test_scrubbing_fits_each_site_to_what_the_sites_before_it_left(model: vs.Model, concept: vs.Concept) -> None:
    sites = ["layers.0.resid_post", "layers.1.resid_post", "layers.2.resid_post"]
    scrub = fit_eraser(model, concept, sites, sink=vs.silent)
    run = model.run(concept.inputs, sites, scrub.edits())
    numbers = torch.from_numpy(concept.numbers)
    for site in sites:
        last = run[site][:, -1].detach().double()
        assert float((last[numbers == 1].mean(0) - last[numbers == 0].mean(0)).norm()) < 1e-4


def test_effects_agree_with_plain_runs_and_stand_beside_random_ones(model: vs.Model, concept: vs.Concept) -> None:
    site = "layers.1.resid_post"
    tail = Tail.of(model, vs.Tokens(concept.inputs), site)
    vector = torch.randn(48, generator=torch.Generator().manual_seed(0))
    direction, behaviour = vs.Direction(site, vector), Behaviour(answers=((3,), (7, 8)))
    base = model.run(concept.inputs).logits[:, -1].detach()
    partner = partners([str(label) for label in concept.labels])
    assert all(concept.labels[int(other)] != own for own, other in zip(concept.labels, partner, strict=True))
    exchanged = interchange_effect(tail, direction, partner, behaviour=behaviour, random=4)
    value = model.run(concept.inputs, site)[site].detach()[:, -1] @ direction.vector
    patch = vs.Patch(direction, source=value[partner][:, None].expand(-1, 5), positions="last")
    plain = model.run(concept.inputs, interventions=[patch]).logits[:, -1].detach()
    wanted = behaviour.level(plain) - behaviour.level(base)
    assert np.allclose(exchanged.values, wanted.numpy(), atol=1e-4)
    assert exchanged.random.shape == (4, 120) and 0 < exchanged.p <= 1
    # Of the same exchange, what it does to answers that have nothing to do with it, each beside random directions.
    other = Behaviour(answers=((11,), (12,)))
    found = specificity(tail, direction, partner, behaviour, {"others": other}, random=4)
    assert np.array_equal(found.wanted.values, exchanged.values)
    beside = (other.level(plain) - other.level(base)).numpy()
    assert np.allclose(found.unrelated["others"].values, beside, atol=1e-4)
    gap = np.abs(found.wanted.values) - np.abs(found.unrelated["others"].values)
    assert found.apart("others").estimate == pytest.approx(gap.mean())
    with pytest.raises(UnknownNameError, match="unrelated behaviour"):
        found.apart("weekdays")
    with pytest.raises(InputError, match="specificity compares log-odds"):
        specificity(tail, direction, partner, behaviour, {"everything": Behaviour()})
    pushed = push_effect(tail, direction, 2.0, behaviour=behaviour, random=2)
    patch = vs.Patch(direction, source=torch.full((120, 5), 2.0), positions="last")
    plain = model.run(concept.inputs, interventions=[patch]).logits[:, -1].detach()
    assert np.allclose(pushed.values, (behaviour.level(plain) - behaviour.level(base)).numpy(), atol=1e-4)
    eraser = fit_eraser(model, concept, site, sink=vs.silent)
    erased = erasure_effect(tail, eraser[site], random=3)
    logits = model.run(concept.inputs, interventions=eraser.edits("last")).logits[:, -1].detach()
    kl = (base.log_softmax(-1).exp() * (base.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    assert np.allclose(erased.values, kl.numpy(), atol=1e-4) and erased.measurement.low is not None
    with pytest.raises(InputError, match="recorded at"):
        push_effect(tail, vs.Direction("layers.0.resid_post", vector), 0.0)


def test_derivatives_are_those_of_small_steps_and_a_planted_concept_is_significant() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double().eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(8))
        net[0].bias.zero_()
        net[2].weight.zero_()
        net[2].weight[1, 0] = 2.0
    y = np.arange(200) % 2 == 0
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
    x[torch.from_numpy(y), 0] += 1.0
    model = vs.Model(net)
    raw = Raw(x)
    tail, behaviour = Tail.of(model, raw, "module:0|out", None), Behaviour(answers=((1,), (0,)))
    each = gradients(tail, behaviour)
    step = 1e-5 * torch.eye(8, dtype=torch.float64)[0]
    up, down = (behaviour.level(tail.logits(tail.values + s)) for s in (step, -step))
    assert torch.allclose(each[:, 0], (up - down) / 2e-5, atol=1e-4)
    found = influence(tail, vs.Direction("module:0|out", torch.eye(8)[0]), behaviour, y)
    assert found.tcav.estimate == 1.0 and found.p <= 0.05
    assert found.effect.estimate > 0.5
    with pytest.raises(InputError, match="answers"):
        influence(tail, vs.Direction("module:0|out", torch.eye(8)[0]), Behaviour(), y)

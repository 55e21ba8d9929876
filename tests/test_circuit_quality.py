"""How good a circuit is: closed forms, networks whose circuits are known, and tests that hold their level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import tiny
import vesalius as vs
from vesalius.circuits import (
    Ablation,
    ablation,
    areas,
    coablation,
    completeness,
    curve,
    discover,
    edge_patching,
    equivalence,
    faithfulness,
    independence,
    minimality,
    prompt_clusters,
    random_circuits,
    scrubbing,
    stability,
    sufficiency,
    with_only,
)
from vesalius.circuits.hypotheses import counted, jaccard_null
from vesalius.circuits.quality import SHARES
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import silent
from vesalius.toys import Mechanism, mechanism


@pytest.fixture(scope="module")
def induction() -> tuple[Mechanism, Ablation, torch.Tensor]:
    known = mechanism("induction")
    cut = ablation(known.model, known.pairs, vs.logit_diff)
    found = discover(known.model, known.pairs, sink=silent)
    return known, cut, cut.wired.graph.mask(found.edges)


@pytest.mark.parametrize(
    ("values", "cpr", "cmd"),
    [
        ([1.0] * 10, 0.999, 0.0),
        ([0.0] * 9 + [1.0], 0.25, 0.749),
        (list(SHARES), 0.5, 0.499),
        ([0.0] * 3 + [1.0] * 7, 0.9925, 0.0065),
        ([1.5] * 9 + [1.0], 1.3735, 0.3745),
    ],
)
def test_areas_have_their_closed_forms(values: list[float], cpr: float, cmd: float) -> None:
    found = areas(SHARES, values)
    # The last two cross between sizes; .001 is the slack of the printed values.
    assert found == pytest.approx((cpr, cmd), abs=1.1e-3)


def test_a_true_circuit_is_faithful_under_the_ablation_it_was_found_with(induction: tuple) -> None:
    known, _, _ = induction
    found = discover(known.model, known.pairs, sink=silent)
    grid = faithfulness(known.model, found, known.pairs)
    assert set(grid) == {(level, kind) for level in ("edge", "node") for kind in ("zero", "mean", "resample")}
    assert grid["edge", "resample"].estimate == pytest.approx(1, abs=1e-3)
    assert grid["edge", "zero"].estimate < 0.9  # positions and constants are missing
    assert {"outside", "lowest", "highest"} <= set(grid["edge", "resample"].diagnostics)


def test_faithfulness_is_a_ratio_of_means() -> None:
    model, pairs = tiny.model("llama", layers=1), tiny.pairs()
    cut = ablation(model, pairs, vs.logit_diff)
    mask = torch.rand(len(cut.wired.graph), generator=torch.Generator().manual_seed(0)) < 0.7
    edges = [edge for edge, kept in zip(cut.wired.graph.edges, mask.tolist(), strict=True) if kept]
    circuit = vs.circuits.Circuit((), 0.0, False, dict.fromkeys(edges, 1.0))
    found = faithfulness(model, circuit, pairs, kinds=["resample"], levels=["edge"])["edge", "resample"]
    values, empty = with_only(cut, [mask, torch.zeros_like(mask)])
    expected = (values - empty).mean() / (cut.plain()[0] - empty).mean()
    assert found.estimate == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(UnknownNameError, match="level"):
        faithfulness(model, circuit, pairs, levels=["neuron"])


def test_the_true_circuit_is_complete_and_half_of_it_is_not(induction: tuple) -> None:
    _, cut, mask = induction
    assert float(completeness(cut, mask, draws=5).max()) < 1e-3
    known = mechanism("backup")
    backup = ablation(known.model, known.pairs, vs.logit_diff)
    mover = [vs.Edge(vs.Unit(vs.Site("embed")), vs.Unit(vs.Site("v", 0, 0))),
             vs.Edge(vs.Unit(vs.Site("z", 0, 0)), vs.Unit(vs.Site("logits")))]  # fmt: skip
    # Faithful enough, and blind to what takes over when the mover is gone.
    assert float(completeness(backup, backup.wired.graph.mask(mover), draws=1)[1].mean()) > 0.5


def test_a_curve_is_of_the_ranking_that_was_asked() -> None:
    known = mechanism("negative")
    cut = ablation(known.model, known.pairs, vs.logit_diff)
    scores = edge_patching(known.model, known.pairs, sink=silent)
    sizes = [2 / len(scores.items), 4 / len(scores.items), 1.0]
    absolute, signed = (curve(cut, scores, shares=sizes, ranking=name) for name in ("absolute", "signed"))
    # Without the negative head the circuit overshoots; with it, it is exact.
    assert absolute.faithfulness == pytest.approx((1.5, 1.0, 1.0), abs=0.01)
    assert signed.faithfulness[0] == pytest.approx(1.5, abs=0.01) and signed.faithfulness[1] > 1.4
    assert signed.cmd > absolute.cmd
    with pytest.raises(InputError, match="scores of all"):
        curve(cut, edge_patching(known.model, known.pairs, edges=list(scores.items[:3]), sink=silent))


def test_backups_are_found_by_conditional_coablation_where_single_ablation_misses_them() -> None:
    known = mechanism("backup")
    cut = ablation(known.model, known.pairs, vs.logit_diff)
    graph, mover = cut.wired.graph, vs.Unit(vs.Site("z", 0, 0))
    others, effects = coablation(cut, [mover])
    heads = [n for n, part in enumerate(others) if part.site.kind == "z"]
    truth = [str(others[n]) in known.hidden for n in heads]
    single = with_only(cut, [graph.writer_of != graph.writers.index(others[n]) for n in heads]) - cut.plain()[0]
    assert sum(truth) == 2
    assert roc_auc_score(truth, effects[heads].abs().mean(1).round(decimals=3)) >= 0.9
    assert roc_auc_score(truth, single.abs().mean(1).round(decimals=3)) <= 0.6
    assert effects.abs().mean(1).max() == pytest.approx(0.4, abs=0.01)


def test_a_head_that_cancels_itself_has_no_effect_and_its_edges_do() -> None:
    known = mechanism("cancelling")
    cut = ablation(known.model, known.pairs, vs.logit_diff)
    number = cut.wired.graph.writers.index(vs.Unit(vs.Site("z", 0, 0)))
    node = with_only(cut, [cut.wired.graph.writer_of != number])[0] - cut.plain()[0]
    assert float(node.abs().max()) < 1e-3
    edge = vs.Edge(vs.Unit(vs.Site("z", 0, 0)), vs.Unit(vs.Site("logits")))
    assert float(edge_patching(known.model, known.pairs, edges=[edge], sink=silent).effects.abs().min()) > 0.9


def test_scrubbing_recovers_all_under_the_true_hypothesis_and_nothing_under_the_empty_one(induction: tuple) -> None:
    _, cut, mask = induction
    values, recovered = scrubbing(cut, mask)
    assert recovered == pytest.approx(1, abs=0.01) and values.shape == (5, len(cut.pairs))
    assert scrubbing(cut, torch.zeros_like(mask))[1] == pytest.approx(0, abs=0.02)
    partial = mask.clone()
    partial[mask.nonzero()[0, 0]] = False
    assert scrubbing(cut, partial)[1] < 0.6


# --- tests of hypotheses


@pytest.mark.parametrize(("wins", "n", "p"), [(69, 100, 0.0398), (626, 1000, 0.0495), (60, 100, 0.5433)])
def test_equivalence_has_the_published_p_values(wins: int, n: int, p: float) -> None:
    difference = torch.where(torch.arange(n) < wins, 1.0, -1.0)
    assert counted(difference).p == pytest.approx(p, abs=1e-4)
    # How large the differences are does not matter.
    assert counted(difference * torch.arange(1, n + 1)).p == pytest.approx(p, abs=1e-4)


def test_the_whole_model_ties_with_itself_everywhere(induction: tuple) -> None:
    _, cut, mask = induction
    found = equivalence(cut, torch.ones_like(mask))
    assert (found.ties, found.p) == (len(cut.pairs), 1.0)


def test_the_true_circuit_is_sufficient_and_minimal_and_needs_all_of_its_edges(induction: tuple) -> None:
    _, cut, mask = induction
    found = sufficiency(cut, mask)
    assert found.hits >= 96 and found.p < 0.05
    numbers, knocked, p = minimality(cut, mask)
    assert len(numbers) == 5 and float(knocked.min()) > 0.5 and float(p.min()) > 0.05
    # An edge that does nothing is told apart: nothing beats it, so it is no larger than 90 % of random ones.
    idle = mask.clone()
    idle[cut.wired.graph.number(vs.Edge(vs.Unit(vs.Site("embed")), vs.Unit(vs.Site("q", 0, 2))))] = True
    numbers, knocked, p = minimality(cut, idle)
    at = int(knocked.argmin())
    assert float(knocked[at]) < 1e-4 and float(p[at]) < 0.05


def test_the_rest_of_a_part_of_the_model_depends_on_it() -> None:
    model, pairs = tiny.model("llama", layers=1), tiny.pairs(n=24)
    cut = ablation(model, pairs, vs.logit_diff)
    tiny_circuit = torch.zeros(len(cut.wired.graph), dtype=torch.bool)
    tiny_circuit[0] = True
    assert independence(cut, tiny_circuit, draws=199).p < 0.05


def test_random_circuits_are_connected_and_of_the_size_asked() -> None:
    graph = ablation(tiny.model("llama"), tiny.pairs(), vs.logit_diff).wired.graph
    found = random_circuits(graph, 30, 20)
    assert all(int(mask.sum()) == 30 and torch.equal(graph.connected(mask), mask) for mask in found)
    assert len({tuple(mask.nonzero()[:, 0].tolist()) for mask in found}) > 10
    with pytest.raises(InputError, match="random circuit has"):
        random_circuits(graph, 0, 1)


def test_stability_of_noise_is_that_of_random_circuits() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 200, generator=generator)
    overlap, null = stability(noise, 200, draws=10)
    assert null == pytest.approx(jaccard_null(0.1)) == pytest.approx(0.1 / 1.9)
    # Bootstraps of the same examples share them, so that noise is above the null, and far below a signal.
    signal = noise + torch.arange(2000)[:, None].lt(200) * 3.0
    assert null < overlap < 0.6 and stability(signal, 200, draws=10)[0] > 0.95
    masks = torch.rand(60, 20_000, generator=generator) < 0.1
    found = [(one & two).sum() / (one | two).sum() for one, two in zip(masks[::2], masks[1::2], strict=True)]
    assert np.mean(found) == pytest.approx(jaccard_null(0.1), abs=0.003)


def test_prompts_with_circuits_of_their_own_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(300, 2, generator=generator)
    effects = kinds[:, torch.arange(12) % 2] + 0.3 * torch.randn(300, 12, generator=generator)
    labels, apart = prompt_clusters(effects, 2)
    assert len({labels[row] for row in range(0, 12, 2)}) == 1 and labels[0] != labels[1] and apart > 0.5
    assert prompt_clusters(torch.randn(300, 12, generator=generator), 2)[1] < 0.2

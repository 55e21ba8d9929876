"""Exact effects with honest statistics, a search that finds what is there, figures that mean what they say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

import handmade
import patching
import tiny
import vesalius as vs
from vesalius.circuits import (
    Circuit,
    Condition,
    Effects,
    circuit,
    component_effects,
    find_circuit,
    find_edges,
    share,
)
from vesalius.circuits.edges import feeds
from vesalius.circuits.effects import summarise
from vesalius.describe import Discovery, claims_of, describe_circuit
from vesalius.errors import InputError, UnknownNameError
from vesalius.quantities import Runs, heads_and_mlps
from vesalius.quantities.circuit import ABLATIONS, metric_with_only, metric_without, random_sets
from vesalius.quantities.contrast import EMBED
from vesalius.quantities.direct_effect import frozen
from vesalius.stats import measure
from vesalius.toys import PLANTED, planted_induction, planted_pairs
from vesalius.validate import check

FAMILIES = sorted(tiny.FAMILIES)
PLANTED_PARTS = {EMBED, *(vs.Unit(site) for sites in PLANTED.values() for site in sites)}


def mlp(layer: int) -> vs.Unit:
    return vs.Unit(vs.Site("mlp_out", layer))


@pytest.fixture(params=FAMILIES)
def runs(request: pytest.FixtureRequest) -> Runs:
    return Runs(tiny.model(request.param, layers=2), {"corrupted": tiny.pairs(n=8)})


@pytest.fixture(scope="module")
def planted() -> Runs:
    discovery = {name: pairs.split("discovery") for name, pairs in planted_pairs(24).items()}
    return Runs(planted_induction(0), discovery)


@pytest.fixture(scope="module")
def planted_effects(planted: Runs) -> Effects:
    return component_effects(planted)


# --- decompose


def test_without_groups_the_statistics_are_scipy_s(runs: Runs) -> None:
    found = component_effects(runs)
    assert found.components == heads_and_mlps(runs.model)
    for condition in found.conditions:
        effects = runs.effects(found.components, condition.corruption, condition.direction).double().numpy()
        shares = effects / found.total["corrupted"]
        expected = scipy_stats.ttest_1samp(shares, 0.0, axis=1)
        interval = expected.confidence_interval(0.95)
        np.testing.assert_allclose(condition.values, shares)
        np.testing.assert_allclose(condition.mean, shares.mean(1))
        np.testing.assert_allclose(condition.p, expected.pvalue, rtol=1e-6)
        written = condition.to_json()
        np.testing.assert_allclose(written["sd"], shares.std(1, ddof=1))
        np.testing.assert_allclose(written["low"], interval.low, rtol=1e-6)
        np.testing.assert_allclose(written["high"], interval.high, rtol=1e-6)
        np.testing.assert_allclose(condition.q, scipy_stats.false_discovery_control(condition.p), rtol=1e-9)


def test_every_corruption_is_measured_in_both_directions(planted_effects: Effects) -> None:
    found = [(c.corruption, c.direction) for c in planted_effects.conditions]
    assert found == [(c, d) for c in ("swap", "shuffle") for d in ("noising", "denoising")]
    with pytest.raises(UnknownNameError, match="unknown condition 'abc, noising'; known: shuffle, denoising"):
        planted_effects.condition("abc", "noising")


def test_the_embeddings_effect_is_the_whole_effect(planted_effects: Effects) -> None:
    for condition in planted_effects.conditions:
        assert condition.mean[0] == pytest.approx(1.0, abs=1e-4)


def test_only_planted_parts_matter_and_suppressors_rank_with_helpers(planted_effects: Effects) -> None:
    ranked = [planted_effects.components[number] for number in planted_effects.ranked()]
    assert set(ranked[: len(PLANTED_PARTS)]) == PLANTED_PARTS
    significant = {
        part for part, hit in zip(planted_effects.components, planted_effects.significant, strict=True) if hit
    }
    assert significant >= PLANTED_PARTS
    (negative,) = map(vs.Unit, PLANTED["negative mover"])
    number = planted_effects.components.index(negative)
    assert planted_effects.condition("swap", "noising").mean[number] < -0.2
    assert planted_effects.ranked().index(number) < len(PLANTED_PARTS)


def condition(shares: Sequence[Sequence[float]], q: Sequence[float], direction: str = "noising") -> Condition:
    effects = tuple(measure("planted", row, unit="share") for row in shares)
    ones = np.ones(len(effects))
    return Condition("swap", direction, effects, ones, np.array(q), ones)


def test_sign_flips_count_prompts_that_clearly_go_the_other_way(runs: Runs) -> None:
    total = float(runs.total("corrupted").mean())
    shares = np.array([[1.0, 1, 1, 1, 1, 1, -1, -0.001], [-1.0, -1, -1, -1, -1, 0.5, 0.5, 0.0]])
    found = summarise(two_of(runs), "corrupted", "noising", shares * total)
    np.testing.assert_allclose(found.sign_flips, [1 / 8, 2 / 8])


def two_of(runs: Runs, **groups: tuple[str, ...]) -> Runs:
    """Runs with two components, on the same prompts."""
    pairs = replace(runs.pairs, groups=groups)
    return Runs(runs.model, {"corrupted": pairs}, components=["layers.0.z[0]", "layers.1.mlp_out"])


def test_a_conflict_needs_significance_on_both_sides() -> None:
    first = condition([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [0.01, 0.01, 0.01])
    other = condition([[-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]], [0.01, 0.2, 0.01], "denoising")
    parts = (vs.head(0, 0), vs.head(0, 1), mlp(0))
    found = Effects(parts, (first, other), {"swap": 1.0})
    assert found.sign_conflicts.tolist() == [True, False, False]
    assert found.significant.tolist() == [True, True, True]
    assert found.to_json()["sign_conflicts"] == ["layers.0.z[0]"]


def test_components_rank_by_their_mean_strength_under_the_main_corruption() -> None:
    noising = condition([[0.1, 0.1], [0.6, 0.4], [-0.3, -0.3]], [0.9, 0.9, 0.01])
    denoising = condition([[0.9, 0.9], [0.0, 0.0], [-0.5, -0.5]], [0.9, 0.9, 0.9], "denoising")
    other = replace(condition([[9.0, 9.0], [0.0, 0.0], [0.0, 0.0]], [0.01] * 3), corruption="abc")
    found = Effects(tuple(vs.head(0, h) for h in range(3)), (noising, denoising, other), {"swap": 1.0, "abc": 1.0})
    np.testing.assert_allclose(found.strength, [0.5, 0.25, 0.4])
    assert found.ranked() == [0, 2, 1]


def test_effects_show_in_a_notebook_as_a_table(planted_effects: Effects) -> None:
    shown = planted_effects._repr_html_()
    assert shown.startswith("<table>")
    assert shown.count("<tr>") == 16
    assert "<th>swap, denoising</th>" in shown
    odd = Effects(planted_effects.components, (replace(planted_effects.conditions[0], corruption="<b>"),), {"<b>": 1.0})
    assert "&lt;b&gt;" in odd._repr_html_()
    assert "<b>" not in odd._repr_html_()


def test_intervals_respect_templates_and_names_else_the_first_other_groups() -> None:
    pairs, model = tiny.pairs(n=4), tiny.model("llama", layers=1)

    def of(**groups: str) -> tuple[tuple[str, ...], ...]:
        runs = Runs(model, replace(pairs, groups={kind: tuple(labels) for kind, labels in groups.items()}))
        return tuple(runs.groups[kind] for kind in runs.clusters)

    assert of(zebra="aabb", template="abcd", names="xxyy") == (tuple("abcd"), tuple("xxyy"))
    assert of(zebra="aabb", apple="abab", mango="abcd") == (tuple("abab"), tuple("abcd"))
    assert of(template="aaaa", names="xxyy") == (tuple("xxyy"),)
    assert of() == ()


def test_one_template_only_can_still_be_decomposed() -> None:
    pairs = replace(tiny.pairs(n=6), groups={"template": ("only",) * 6})
    found = component_effects(Runs(tiny.model("llama", layers=1), {"corrupted": pairs}))
    assert all(effect.low is not None for effect in found.conditions[0].effects)


def test_clustered_intervals_are_wider_when_prompts_of_a_template_agree(runs: Runs) -> None:
    values = np.repeat(np.array([[1.0, 2.0, 3.0, 4.0]] * 2), 2, axis=1)
    alone, grouped = (
        summarise(some, "corrupted", "noising", values).effects[0]
        for some in (two_of(runs), two_of(runs, template=tuple("aabbccdd")))
    )
    assert alone.low is not None and alone.high is not None and grouped.low is not None and grouped.high is not None
    assert abs(grouped.high - grouped.low) > 1.2 * abs(alone.high - alone.low)


def test_a_corruption_without_effect_is_refused(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runs, "total", lambda self, corruption: torch.zeros(self.n))
    with pytest.raises(InputError, match="corruption 'corrupted' does not change the mean metric of these 8"):
        component_effects(runs)


# --- what sets of components do


def sets_of(runs: Runs) -> list[tuple[vs.Part, ...]]:
    everything = heads_and_mlps(runs.model)
    return [tuple(everything[::2]), (EMBED, everything[1], everything[-1]), (everything[3],)]


def by_hand(runs: Runs, ablated: Sequence[vs.Part], ablation: str) -> Tensor:
    pairs = runs.pairs
    edits = {part.writes[0]: ablated_value(runs, part, ablation) for part in ablated}
    return patching.difference(patching.forward(runs.model, pairs.tokens("clean"), edits), pairs)


def ablated_value(runs: Runs, part: vs.Part, ablation: str) -> Tensor:
    value = patching.values(runs.model, runs.pairs.tokens("corrupted"))[part.writes[0]]
    if ablation == "zero":
        return torch.zeros_like(value)
    if ablation == "resample":
        return value
    later = runs.pairs.real.clone()
    later[:, 0] = False
    mean = value[later].mean(0).expand_as(value).clone()
    mean[:, 0] = value[:, 0].mean(0)
    return mean


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_keeping_and_removing_are_plain_runs_with_one_hook_per_component(runs: Runs, ablation: str) -> None:
    everything, sets = heads_and_mlps(runs.model), sets_of(runs)
    rest = [[part for part in everything if part not in members] for members in sets]
    for found, ablated in (
        (metric_with_only(runs, sets, ablation), rest),
        (metric_without(runs, sets, ablation), sets),
    ):
        expected = np.stack([by_hand(runs, parts, ablation).double().numpy() for parts in ablated])
        np.testing.assert_allclose(found, expected, atol=3e-4)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_keeping_a_set_is_removing_all_others(runs: Runs, ablation: str) -> None:
    everything, sets = heads_and_mlps(runs.model), sets_of(runs)
    rest = [tuple(part for part in everything if part not in members) for members in sets]
    np.testing.assert_allclose(metric_with_only(runs, sets, ablation), metric_without(runs, rest, ablation), atol=1e-6)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_keeping_everything_is_the_clean_run(runs: Runs, ablation: str) -> None:
    everything, one = tuple(heads_and_mlps(runs.model)), (vs.head(0, 0),)
    found = metric_with_only(runs, [everything, one], ablation)
    np.testing.assert_allclose(found[0], runs.metric("clean").numpy(), atol=1e-5)
    assert not np.allclose(found[1], found[0], atol=1e-3)
    np.testing.assert_allclose(metric_without(runs, [()], ablation), found[:1])


def test_keeping_nothing_is_the_donor_s_run_under_resample(runs: Runs) -> None:
    found = metric_with_only(runs, [()], "resample")[0]
    np.testing.assert_allclose(found, runs.metric("corrupted").numpy(), atol=1e-4)


def test_shares_are_ratios_of_means_from_nothing_to_all(runs: Runs) -> None:
    full, empty = runs.metric("clean").double().numpy(), metric_with_only(runs, [()], "resample")[0]
    assert share(runs, full, empty, "resample").estimate == pytest.approx(1.0)
    assert share(runs, empty, empty, "resample").estimate == 0.0
    half = share(runs, (full + empty) / 2, empty, "resample")
    assert half.estimate == pytest.approx(0.5)
    assert half.low < 0.5 < half.high
    assert (half.name, half.unit, half.n) == ("resample", "share", runs.n)
    with pytest.raises(InputError, match="resample: ablating every component does not change the metric"):
        share(runs, empty, full, "resample")


def test_an_unknown_ablation_or_component_is_named(runs: Runs) -> None:
    with pytest.raises(UnknownNameError, match="unknown ablation 'noise'; known: mean, resample, zero"):
        metric_with_only(runs, [()], "noise")
    with pytest.raises(InputError, match=r"layers\.7\.mlp_out is no component"):
        metric_with_only(runs, [(mlp(7),)], "zero")


# --- random sets


def composition(members: Sequence[vs.Part]) -> list[str]:
    return sorted(part.writes[0].kind for part in members)


def test_random_sets_have_the_circuit_s_composition(runs: Runs) -> None:
    members = (EMBED, vs.head(0, 1), vs.head(1, 2), mlp(1))
    for chosen in random_sets(runs, members, 20, seed=0):
        assert composition(chosen) == composition(members)
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= set(heads_and_mlps(runs.model))


def test_random_sets_hold_the_embeddings_only_when_the_circuit_does(runs: Runs) -> None:
    members = (vs.head(0, 1), mlp(1))
    assert all(EMBED not in chosen for chosen in random_sets(runs, members, 20, seed=0))


def test_random_sets_differ_among_themselves_and_repeat_with_the_seed(runs: Runs) -> None:
    members = (vs.head(0, 1), vs.head(1, 1))
    first = random_sets(runs, members, 12, seed=3)
    assert first == random_sets(runs, members, 12, seed=3)
    assert first != random_sets(runs, members, 12, seed=4)
    assert first[:5] == random_sets(runs, members, 5, seed=3)
    assert len({frozenset(chosen) for chosen in first}) > 6


# --- the search


def test_the_search_finds_exactly_the_planted_parts(planted: Runs, planted_effects: Effects) -> None:
    found = find_circuit(planted, planted_effects)
    assert set(found.members) == PLANTED_PARTS
    assert found.reached
    assert found.kept == pytest.approx(1.0, abs=0.05)
    assert found.members[0] == EMBED
    assert list(found.members[1:]) == sorted(found.members[1:], key=lambda part: part.writes[0].order)


def test_the_search_finds_the_parts_of_the_handmade_network_that_its_rule_needs() -> None:
    runs = handmade.runs(handmade.network())
    found = find_circuit(runs, component_effects(runs))
    assert {EMBED, handmade.PARTS["inhibition"], handmade.PARTS["mover"]} <= set(found.members)
    assert set(found.members) <= {EMBED, *handmade.MEMBERS}


class Additive:
    """Runs in which every component keeps its own share and shares add up."""

    def __init__(self, shares: dict[vs.Part, float]) -> None:
        self.shares = shares
        self.sets: list[Sequence[vs.Part]] = []

    def metric(self, which: str) -> Tensor:
        return torch.tensor([10.0, 12.0])

    def stored(self, key: str, compute: Any) -> Any:
        return compute()

    def kept(self, sets: Sequence[Sequence[vs.Part]]) -> Any:
        self.sets += sets
        return np.array([[1.0 + 10 * sum(self.shares[part] for part in members)] * 2 for members in sets])


def search(shares: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> tuple[Circuit, Additive]:
    """The search on heads that keep these shares, ranked in this order."""
    parts = [vs.head(number // 10, number % 10) for number in range(len(shares))]
    runs = Additive(dict(zip(parts, shares, strict=True)))
    strength = np.linspace(1.0, 0.1, len(shares))
    only = condition(np.stack([strength, strength], 1).tolist(), [0.01] * len(shares))
    effects = Effects(tuple(parts), (only,), {"swap": 1.0})
    monkeypatch.setattr(circuit, "metric_with_only", lambda _runs, sets, _ablation: runs.kept(sets))
    return find_circuit(runs, effects), runs  # type: ignore[arg-type]


def test_the_shortest_prefix_that_keeps_enough_is_taken_and_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [0.5, 0.0, 0.3, 0.0, 0.0, 0.0, 0.12, 0.0, 0.0, 0.0, 0.08, *[0.0] * 9]
    found, _ = search(shares, monkeypatch)
    # Ten keep .92; dropping .12 would still leave .8.
    assert found.history[0] == (10, pytest.approx(0.92))
    assert [str(part) for part in found.members] == ["layers.0.z[0]", "layers.0.z[2]"]
    assert found.kept == pytest.approx(0.8)
    assert [size for size, _ in found.history] == sorted((size for size, _ in found.history), reverse=True)


def test_thinning_stops_before_too_little_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = search([0.4, 0.3, 0.25, 0.02, 0.03], monkeypatch)
    assert found.kept >= circuit.KEEP
    assert len(found) == 3


def test_a_search_that_never_keeps_enough_says_so_and_gives_the_best_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = search([0.2, 0.2, 0.1, 0.1, 0.1, -0.5, *[0.0] * 4], monkeypatch)
    assert not found.reached
    assert len(found) == 5
    assert found.kept == pytest.approx(0.7)


def test_prefixes_are_tried_one_by_one_until_one_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    _, few = search([0.5, 0.5, *[0.0] * 28], monkeypatch)
    # One set of nothing, the first prefix, and what thinning asks; no longer prefix.
    assert max(map(len, few.sets)) == 5


def test_a_network_that_needs_everything_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = search([0.1] * 10, monkeypatch)
    assert found.history[0] == (10, pytest.approx(1.0))
    assert len(found) == 8


def test_a_search_on_a_random_network_ends_with_a_set_that_keeps_enough() -> None:
    runs = Runs(tiny.model("llama", layers=1), {"corrupted": tiny.pairs(n=8)})
    found = find_circuit(runs, component_effects(runs))
    assert found.reached
    assert found.kept >= circuit.KEEP
    full, empty = runs.metric("clean").double().mean(), metric_with_only(runs, [()], "resample").mean()
    again = (metric_with_only(runs, [found.members], "resample").mean() - empty) / (full - empty)
    assert found.kept == pytest.approx(float(again), abs=1e-5)


def test_a_circuit_survives_json(planted: Runs, planted_effects: Effects) -> None:
    found = find_circuit(planted, planted_effects)
    edges = {vs.Edge(EMBED, vs.head(0, 1)): 1.0, vs.Edge(vs.head(2, 0), circuit.LOGITS): -0.25}
    found = replace(found, edges=edges)
    assert Circuit.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_circuit_shows_in_a_notebook() -> None:
    shown = Circuit((EMBED, vs.head(3, 1)), 0.834, True)._repr_html_()
    assert "Circuit of 2 components" in shown
    assert "83%" in shown
    assert "layers.3.z[1]" in shown


# --- edges


def test_an_edge_is_what_a_hooked_run_of_its_own_shows(runs: Runs) -> None:
    members = (EMBED, vs.head(0, 1), mlp(0), vs.head(1, 2), mlp(1))
    edges = find_edges(runs, members)
    assert len(edges) > 5
    for edge, weight in edges.items():
        if edge.source != EMBED:
            assert weight == pytest.approx(edge_by_hand(runs, edge), abs=2e-4), edge


def edge_by_hand(runs: Runs, edge: vs.Edge) -> float:
    pairs, source = runs.pairs, edge.source.writes[0]
    clean, corrupted = (patching.values(runs.model, pairs.tokens(which)) for which in ("clean", "corrupted"))
    if edge.target == circuit.LOGITS:
        change = clean[source] - corrupted[source]
        change = change[torch.arange(len(pairs)), pairs.at]
        if source.kind == "z":
            assert source.layer is not None and source.index is not None
            change = change @ runs.model.W_O(source.layer)[source.index]
        return float(frozen(runs, "clean").of(change).mean() / runs.total("corrupted").mean())
    seen: patching.Values = {}
    patching.forward(runs.model, pairs.tokens("clean"), {source: corrupted[source]}, seen)
    target = edge.target.reads[0]
    dots = norms = 0.0
    for row in range(len(pairs)):
        end = int(pairs.at[row]) + 1
        full, moved = ((clean[target] - other[target])[row, :end].flatten() for other in (corrupted, seen))
        dots, norms = dots + float(full @ moved), norms + float(full @ full)
    return dots / norms


def test_edges_only_run_forward(runs: Runs) -> None:
    head, after, later = vs.head(0, 1), mlp(0), vs.head(1, 0)
    assert feeds(head, after) and feeds(head, later) and feeds(after, later)
    assert not feeds(after, head) and not feeds(later, head) and not feeds(head, vs.head(0, 2))
    neuron = vs.neuron(0, 3)
    assert feeds(head, neuron) and feeds(neuron, after) and feeds(neuron, later)
    assert not feeds(neuron, head) and not feeds(neuron, vs.neuron(0, 4)) and not feeds(after, neuron)
    members = (later, after, head)
    forward = {vs.Edge(one, two) for one in members for two in members if feeds(one, two)}
    assert set(find_edges(runs, members)) <= forward | {vs.Edge(part, circuit.LOGITS) for part in members}


def test_the_edges_of_the_planted_network_are_its_wiring(planted: Runs) -> None:
    before = planted.cost
    edges = find_edges(planted, sorted(PLANTED_PARTS, key=lambda part: part.writes[0].order))
    (previous,), movers, (negative,) = (
        tuple(map(vs.Unit, PLANTED[role])) for role in ("previous-token", "name mover", "negative mover")
    )
    for mover in (*movers, negative):
        assert edges[vs.Edge(previous, mover)] > 0.3
        assert np.sign(edges[vs.Edge(mover, circuit.LOGITS)]) == (-1 if mover == negative else 1)
    assert vs.Edge(movers[0], movers[1]) not in edges
    assert edges[vs.Edge(EMBED, previous)] == 1.0
    assert (planted.cost - before).spent > 0


# --- logic of noising and denoising


A, B, OUT, ON = vs.head(0, 0), vs.head(0, 1), mlp(1), (handmade.FLAG, 60)


def gate_network(logic: str) -> vs.Model:
    """Two heads carry one bit each to the end; the MLP after them computes AND or OR of the bits, onto the answer."""
    build = handmade.Builder()
    for head, position, flag in ((A, 1, ON[0]), (B, 2, ON[1])):
        build.set(head.site, "q", {(handmade.IS_END, 0): 60.0})
        build.set(head.site, "k", {(handmade.POSITION + position, 0): 1.0})
        build.set(head.site, "v", {(handmade.IS_A, 0): 1.0})
        build.set(head.site, "o", {(flag, 0): 1.0})
    layer = build.net.transformer.h[1].mlp
    layer.act = torch.nn.ReLU()
    with torch.no_grad():
        for unit in (0, 1):
            layer.c_fc.weight[list(ON), unit] = 1.0
        # LayerNorm is nearly the identity here, so a bit reads as 1.
        layer.c_fc.bias[1] = -1.0
        sign = {"and": (0.0, 1.0), "or": (1.0, -1.0)}[logic]
        for unit in (0, 1):
            layer.c_proj.weight[unit, ANSWER] = 3 * sign[unit]
    return vs.Model(build.net)


ANSWER, DISTRACTOR = 30, 31


def gate_pairs() -> vs.Pairs:
    on, off = list(handmade.CLASS_A), list(handmade.CLASS_B)
    clean = torch.tensor([[handmade.BOS, on[i], on[i + 1], handmade.END] for i in range(6)])
    corrupted = torch.tensor([[handmade.BOS, off[i], off[i + 1], handmade.END] for i in range(6)])
    answer, distractor = torch.full((6,), ANSWER), torch.full((6,), DISTRACTOR)
    return vs.Pairs(clean=clean, corrupted=corrupted, answer=answer, distractor=distractor)


@pytest.mark.parametrize(("logic", "noising", "denoising"), [("and", 1.0, 0.0), ("or", 0.0, 1.0)])
def test_noising_finds_and_denoising_finds_or(logic: str, noising: float, denoising: float) -> None:
    runs = Runs(gate_network(logic), {"corrupted": gate_pairs()})
    total = runs.total("corrupted")
    assert float(total.min()) > 1.0
    for direction, expected in (("noising", noising), ("denoising", denoising)):
        shares = runs.effects([A, B, OUT], "corrupted", direction) / total
        assert torch.allclose(shares[:2], torch.full_like(shares[:2], expected), atol=0.15), (direction, shares)
        assert torch.allclose(shares[2], torch.ones_like(shares[2]), atol=0.05)


# --- a circuit as a description


def claimed(members: Sequence[vs.Part], runs: Runs) -> dict[str, vs.Claim]:
    discovery = Discovery.of(runs, members)
    return {claim.quantity: claim for claim, _ in claims_of(describe_circuit(discovery, members, 12), discovery)}


def test_a_circuit_with_too_few_components_outside_it_has_completeness_without_a_control() -> None:
    runs = handmade.runs(handmade.network())
    few, many = [EMBED, *handmade.MEMBERS], [EMBED, *handmade.MEMBERS, handmade.PARTS["idle"]]
    assert len(random_sets(runs, few, 3, 0, outside=True)) == 3
    assert random_sets(runs, many, 3, 0, outside=True) == []
    fresh = handmade.runs(handmade.network(), "validation")
    for members, compared in ((few, True), (many, False)):
        claims = claimed(members, runs)
        lost, alone = claims["completeness"], claims["faithfulness"]
        assert ("too few components lie outside it" in lost.statement) is not compared
        assert lost.control.get("draws", 0) == (4 if compared else 0)
        assert (check(lost, runs=fresh).control is not None) is compared
        assert check(alone, runs=fresh).control is not None
        evidence = {claim.id: check(claim, runs=fresh) for claim in (lost, alone)}
        verdicts = vs.decide([lost, alone], evidence)
        assert [verdict.outcome for verdict in verdicts] == ["SUPPORTED", "SUPPORTED"]
        assert ("control" in {leg["name"] for leg in verdicts[0].legs}) is compared


def test_what_a_circuit_claims_is_what_plain_sets_show() -> None:
    runs = handmade.runs(handmade.network())
    members = (EMBED, *handmade.MEMBERS)
    claims = claimed(members, runs)
    full, empty = runs.metric("clean").double().numpy(), metric_with_only(runs, [()], "resample")[0]
    alone, lost = (np.array(check(claims[name], runs=runs).effects) for name in ("faithfulness", "completeness"))
    np.testing.assert_allclose(alone, metric_with_only(runs, [members], "resample")[0] - empty, atol=1e-5)
    np.testing.assert_allclose(lost, full - metric_without(runs, [handmade.MEMBERS], "resample")[0], atol=1e-5)
    outside = [part for part in runs.components if part.writes[0].kind == "z" and part not in members]
    sets = random_sets(runs, members, 4, runs.seed, outside=True)
    assert all(set(chosen) == {EMBED, *outside} for chosen in sets)
    control = np.array(check(claims["completeness"], runs=runs).control)
    np.testing.assert_allclose(control, full - metric_without(runs, [outside], "resample")[0], atol=1e-5)


# --- circuits of other components


def test_a_circuit_of_neurons_is_searched_among_neurons() -> None:
    neurons = [f"layers.1.mlp_post[{index}]" for index in range(8)]
    runs = Runs(gate_network("and"), {"corrupted": gate_pairs()}, components=neurons)
    assert runs.components == tuple(vs.neuron(1, index) for index in range(8))
    effects = component_effects(runs)
    assert effects.components == runs.components
    found = find_circuit(runs, effects)
    assert found.members == (vs.neuron(1, 1),)
    assert found.kept == pytest.approx(1.0, abs=1e-3)
    for direction in ("noising", "denoising"):
        shares = runs.effects(runs.components, "corrupted", direction) / runs.total("corrupted")
        expected = torch.tensor([[0.0], [1.0], *[[0.0]] * 6]).expand_as(shares)
        torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
    assert all(part in runs.components for chosen in random_sets(runs, found.members, 5, 0) for part in chosen)
    with pytest.raises(InputError, match=r"layers.0.z\[0\] is no component; components are 8 of mlp_post: Runs"):
        metric_with_only(runs, [(vs.head(0, 0),)], "zero")


def test_patched_neurons_are_plain_patched_runs(runs: Runs) -> None:
    some = Runs(runs.model, runs.contrast, components=[vs.neuron(0, 3), vs.Site("mlp_post", 1, 7), "layers.1.z[2]"])
    assert some.components == (vs.neuron(0, 3), vs.neuron(1, 7), vs.head(1, 2))
    corrupted = runs.model.run(runs.pairs.tokens("corrupted"), capture=["layers.*.mlp_post", "layers.*.z"])
    clean = runs.model.run(runs.pairs.tokens("clean")).logits
    for row, part in enumerate(some.components):
        patch = vs.Patch(part, source=corrupted.activations)
        edited = runs.model.run(runs.pairs.tokens("clean"), interventions=[patch]).logits
        expected = patching.difference(clean, runs.pairs) - patching.difference(edited, runs.pairs)
        found = some.effects(some.components, "corrupted", "noising")[row]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)

"""Faithfulness with the best constants and at an edge's own tokens, and stability over wordings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
import vesalius as vs
from vesalius.circuits import (
    ablation,
    discover,
    faithfulness,
    optimal_ablation,
    paraphrase_stability,
    token_roles,
    wiring,
    with_only,
    with_tokens,
)
from vesalius.circuits.cells import _places
from vesalius.circuits.hypotheses import jaccard_null
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import silent
from vesalius.toys import mechanism


def test_places_cover_every_position_once() -> None:
    pairs = tiny.pairs()
    covered = torch.stack(list(_places(pairs).values())).long().sum(0)
    assert torch.equal(covered, pairs.real.long())


def test_an_edge_at_all_places_is_the_edge() -> None:
    model, pairs = tiny.model("llama"), tiny.pairs()
    cut = ablation(model, pairs, vs.logit_diff)
    mask = torch.zeros(len(cut.wired.graph), dtype=torch.bool)
    mask[::7] = True
    edges = [cut.wired.graph.edges[n] for n in mask.nonzero()[:, 0].tolist()]
    everywhere = with_tokens(cut, {edge: tuple(_places(pairs)) for edge in edges})
    torch.testing.assert_close(everywhere, with_only(cut, [mask])[0], rtol=1e-4, atol=1e-4)
    nowhere = with_tokens(cut, dict.fromkeys(edges, ()))
    torch.testing.assert_close(nowhere, cut.plain()[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(UnknownNameError, match="unknown place"):
        with_tokens(cut, {edges[0]: ("nowhere",)})


def test_an_induction_circuit_acts_at_its_own_places() -> None:
    known = mechanism("induction")
    wired = wiring(known.model)
    circuit = discover(wired, known.pairs, sink=silent)
    roles = token_roles(wired, circuit, known.pairs)
    last = next(edge for edge in roles if str(edge.target) == "logits")
    assert roles[last] == ("end",)
    grid = faithfulness(wired, circuit, known.pairs, kinds=("resample",), roles=roles)
    assert grid["token", "resample"].estimate == pytest.approx(1.0, abs=0.02)
    elsewhere = faithfulness(
        wired, circuit, known.pairs, kinds=("resample",), roles={edge: ("rest",) for edge in circuit.edges}
    )
    assert elsewhere["token", "resample"].estimate < 0.1


def test_the_best_constants_are_no_worse_than_means() -> None:
    """Of a random model, half of whose edges are kept; on the prompts that they were fitted on."""
    model, pairs = tiny.model("llama"), tiny.pairs()
    wired = wiring(model)
    mask = torch.rand(len(wired.graph), generator=torch.Generator().manual_seed(0)) < 0.5
    fitted = optimal_ablation(wired, mask, pairs, steps=15)
    assert fitted.kind == "optimal"
    far = {}
    for cut in (ablation(wired, pairs, vs.kl_divergence, "mean"), replace(fitted, metric=vs.kl_divergence)):
        far[cut.kind] = float(with_only(cut, [mask])[0].mean())
    assert far["optimal"] < 0.8 * far["mean"]
    whole = optimal_ablation(wired, torch.ones_like(mask), pairs, steps=3)
    torch.testing.assert_close(with_only(whole, [torch.ones_like(mask)])[0], whole.plain()[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="steps"):
        optimal_ablation(wired, mask, pairs, steps=0)


def test_the_grid_has_a_cell_for_the_best_constants() -> None:
    known = mechanism("induction", n=4)
    circuit = discover(known.model, known.pairs, "eap", size=5, drawn=5, sink=silent)
    grid = faithfulness(known.model, circuit, known.pairs, kinds=("mean",), levels=("edge",), fitted_on=known.pairs)
    assert set(grid) == {("edge", "mean"), ("edge", "optimal")}
    assert grid["edge", "optimal"].estimate == pytest.approx(1.0, abs=0.05)


def test_wordings_that_use_other_edges_overlap_as_random_ones_do() -> None:
    generator = torch.Generator().manual_seed(0)
    same, other = torch.rand(200, 1, generator=generator), torch.rand(200, 12, generator=generator)
    wordings = [f"w{n % 4}" for n in range(12)]
    mean, lowest, null = paraphrase_stability(same.expand(200, 12), wordings, 40)
    assert (mean, lowest) == (1.0, 1.0)
    assert null == pytest.approx(jaccard_null(0.2)) == pytest.approx(0.2 / 1.8)
    assert paraphrase_stability(other, wordings, 40)[0] == pytest.approx(null, abs=0.06)
    with pytest.raises(InputError, match="wording of each"):
        paraphrase_stability(other, ["one"] * 12, 40)

"""Latents, error nodes and neurons as nodes of circuits: every estimate against an intervention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from vesalius.circuits import (
    Circuit,
    Nodes,
    discover_latents,
    latent_attribution,
    latent_edges,
    node_patching,
    nodes_of,
    with_nodes,
)
from vesalius.circuits.apart import taken_apart
from vesalius.dictionaries import Dictionary, Unexplained
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import silent

D, M = 48, 20
KINDS = ("resample", "mean", "zero")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dictionary(read: str, write: str = "", seed: int = 0, activation: str = "relu", **extra: object) -> Dictionary:
    """An SAE of a site, or a transcoder."""
    reads, writes = vs.Site.parse(read), vs.Site.parse(write or read)
    return Dictionary(
        activation, (reads,), (writes,),
        encoders=(normal(D, M, seed=seed) / 4,), decoders=(normal(M, D, seed=seed + 1) / 5,),
        b_enc=torch.full((M,), -0.1), b_dec=(normal(D, seed=seed + 2) / 9,), **extra,
    )  # fmt: skip


def three() -> list[Dictionary]:
    """An SAE, a transcoder and an SAE, in the order of the pass."""
    return [
        dictionary("layers.0.resid_post", seed=1),
        dictionary("layers.1.mlp_in", "layers.1.mlp_out", seed=5),
        dictionary("layers.2.resid_post", seed=9, activation="topk", k=6),
    ]


def setting(family: str = "llama", kind: str = "resample", what: object = None) -> Nodes:
    return nodes_of(tiny.model(family), tiny.pairs(), what or three(), vs.logit_diff, kind)


def members(scores: vs.Scores) -> list[vs.Part]:
    return [item for item in scores.items if isinstance(item, vs.Part)]


# --- nodes


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_takes_a_tensor_apart_exactly(kind: str) -> None:
    nodes = setting(kind=kind)
    for number, one in enumerate(nodes.apart):
        assert one.coder is not None
        units, left = one.units(nodes.base), one.left(nodes.base)
        made = one.pushed(units, torch.arange(M)) + one.coder.b_dec[0] + left
        torch.testing.assert_close(made, nodes.base[one.site], rtol=1e-5, atol=1e-5)
        assert not nodes.changes(number)[0][~nodes.tokens.real].any()


def test_what_is_left_over_is_a_part() -> None:
    coder, model, tokens = three()[1], tiny.model("llama"), tiny.pairs().tokens("clean")
    part = coder.unexplained
    assert isinstance(part, Unexplained)
    assert vs.resolve(part.ref, coder) == part
    assert vs.resolve(part.ref) == part  # the dictionary is alive
    run = model.run(tokens, capture=[*part.reads])
    edited = model.run(tokens, capture=[*part.reads], interventions=[vs.Ablate(part)])
    torch.testing.assert_close(
        edited["layers.1.mlp_out"], coder.reconstruct(run["layers.1.mlp_in"]), rtol=1e-4, atol=1e-4
    )
    assert part.value(run).shape == (6, 9, D)
    assert part.value(edited).abs().max() < 1e-4


def test_what_is_left_over_of_several_sites_is_refused() -> None:
    sites = tuple(vs.Site("resid_post", layer) for layer in range(2))
    both = Dictionary(
        "relu",
        sites,
        sites,
        (normal(D, M, seed=0),) * 2,
        (normal(M, D, seed=1),) * 2,
        torch.zeros(M),
        (torch.zeros(D),) * 2,
    )
    with pytest.raises(InputError, match="writes at 2"):
        _ = both.unexplained
    with pytest.raises(InputError, match="several sites"):
        taken_apart(tiny.model("llama"), both)


@pytest.mark.parametrize("what", ["layers.0.z", 3, [], "layers.1.mlp_out"])
def test_what_cannot_be_taken_apart_is_refused(what: object) -> None:
    with pytest.raises((InputError, TypeError)):
        taken_apart(tiny.model("llama"), what)


# --- effects


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("kind", KINDS)
def test_small_ablations_have_the_effects_that_gradients_say(family: str, kind: str) -> None:
    """Of a model whose last layer's MLP is read out directly: there effects are linear but for the final norm."""
    nodes = setting(family, kind, [dictionary("layers.2.mlp_in", "layers.2.mlp_out", seed=3)])
    estimated = latent_attribution(nodes, steps=40)
    measured = node_patching(nodes, parts=members(estimated), sink=silent)
    assert estimated.against(measured).pearson > 0.98
    torch.testing.assert_close(measured.base, estimated.base)


def test_integrated_effects_of_all_nodes_add_up_to_ablating_them() -> None:
    """Completeness of integrated gradients (Sundararajan et al. 2017, proposition 1)."""
    nodes = setting(what=[three()[0]], kind="mean")
    estimated = latent_attribution(nodes, steps=100)
    gone = with_nodes(nodes, [[]])[0]
    torch.testing.assert_close(estimated.effects.sum(0), gone - estimated.base, rtol=0.03, atol=0.03)


def test_effects_by_position_add_up_to_those_of_nodes() -> None:
    nodes = setting()
    whole, each = latent_attribution(nodes, steps=3), latent_attribution(nodes, steps=3, each="position")
    torch.testing.assert_close(each.effects.sum(1), whole.effects, rtol=1e-4, atol=1e-5)
    assert not each.mask[:, -1].all()  # padding
    few = latent_attribution(nodes, steps=3, budget=20)
    torch.testing.assert_close(few.effects, whole.effects, rtol=1e-4, atol=1e-5)


def test_nodes_agree_with_attribution_patching_of_latents() -> None:
    """An independent implementation, part by part."""
    nodes, coder = setting(what=three()[:1]), three()[0]
    found = latent_attribution(nodes, steps=1)
    other = vs.attribution_patching(nodes.model, nodes.pairs, sites=members(found)[:8], base="clean")
    assert members(found)[0].dictionary.content_hash == coder.content_hash  # type: ignore[attr-defined]
    torch.testing.assert_close(found.effects[:8], other.effects, rtol=1e-4, atol=1e-5)


def test_neurons_are_nodes() -> None:
    nodes = setting(what="layers.1.mlp_post")
    found = latent_attribution(nodes, steps=1)
    expected = vs.attribution_patching(nodes.model, nodes.pairs, sites="layers.1.mlp_post", each="neuron", base="clean")
    torch.testing.assert_close(found.effects, expected.per_item, rtol=1e-4, atol=1e-5)
    exact = node_patching(nodes, parts=members(found)[:5], sink=silent)
    swept = vs.sweep(nodes.model, nodes.pairs, sites=members(found)[:5], base="clean", sink=silent)
    torch.testing.assert_close(exact.values, swept.values, rtol=1e-4, atol=1e-4)
    assert len(members(found)) == 80


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_nodes_the_model_is_itself_and_with_none_it_is_ablated(kind: str) -> None:
    nodes = setting(kind=kind)
    everything = members(latent_attribution(nodes, steps=1))
    whole, none, errors = *with_nodes(nodes, [everything, []]), with_nodes(nodes, [[]], errors=True)[0]
    base, source = nodes.plain()
    torch.testing.assert_close(whole, base, rtol=1e-4, atol=1e-4)
    if kind == "resample":  # the last tensor carries all: everything of it is the other run's
        torch.testing.assert_close(none, source, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(none, errors)


def test_one_node_left_out_is_one_node_ablated() -> None:
    nodes = setting(kind="mean", what=three()[:1])
    everything = members(latent_attribution(nodes, steps=1))
    exact = node_patching(nodes, parts=everything[:3], sink=silent)
    without = with_nodes(nodes, [[one for one in everything if one != gone] for gone in everything[:3]])
    torch.testing.assert_close(exact.values, without, rtol=1e-4, atol=1e-4)


# --- edges


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_edges_add_up_to_first_order_effects(family: str) -> None:
    """By the chain rule: what a node does, it does through later nodes or past all of them."""
    nodes = setting(family)
    first = latent_attribution(nodes, steps=1)
    parts = members(first)
    edges = latent_edges(nodes, parts)
    summed = {str(part): torch.zeros(6) for part in parts}
    for edge, effect in zip(edges.items, edges.effects, strict=True):
        summed[str(edge.source)] += effect  # type: ignore[union-attr]
    for part, effect in zip(parts, first.effects, strict=True):
        torch.testing.assert_close(summed[str(part)], effect, rtol=1e-3, atol=1e-5)


def test_an_edge_is_what_a_small_change_does_to_the_later_node() -> None:
    nodes = setting(what=[three()[0], three()[1]])
    early, late = nodes.apart
    where = {
        str(edge): number
        for number, edge in enumerate(latent_edges(nodes, members(latent_attribution(nodes, steps=1))).items)
    }
    scores = latent_edges(nodes, members(latent_attribution(nodes, steps=1)))
    slope = late.pulled(_gradient(nodes, late.site), torch.arange(M))
    change, size = nodes.changes(0)[0], 1e-2
    source = int(change.abs().sum((0, 1)).argmax())
    steered = [
        nodes.model.run(
            nodes.tokens,
            capture=[late.read],
            interventions=[
                vs.Patch(
                    early.part(source), source=early.units(nodes.base)[..., source] + sign * size * change[..., source]
                )
            ],
        )
        for sign in (1, -1)
    ]
    up, down = (late.units({late.read: run[late.read]}) for run in steered)
    measured = ((up - down) / (2 * size) * slope * nodes.tokens.real[..., None]).sum(1)
    target = int(measured.abs().sum(0).argmax())
    found = scores.effects[where[f"{early.part(source)} -> {late.part(target)}"]]
    torch.testing.assert_close(found, measured[:, target], rtol=0.02, atol=1e-4)


def _gradient(nodes: Nodes, site: vs.Site) -> Tensor:
    run = nodes.model.run(nodes.tokens, capture=[site], grad=True)
    return torch.autograd.grad(vs.logit_diff(run.logits, nodes.pairs).sum(), run[site])[0]


# --- circuits


def test_a_circuit_of_latents_says_how_good_its_estimates_are() -> None:
    model, pairs, coders = tiny.model("llama"), tiny.pairs(), three()
    circuit = discover_latents(model, pairs, coders, kind="mean", size=12, drawn=6, sink=silent)
    assert len(circuit) == 12
    assert circuit.check is not None and circuit.check.sampled == 6
    assert "random nodes ablated exactly" in circuit.check.describe()
    assert circuit.scores is not None and circuit.edges
    back = Circuit.from_json(circuit.to_json(), *coders)
    assert back.members == circuit.members
    assert {str(edge): weight for edge, weight in back.edges.items()} == {
        str(edge): weight for edge, weight in circuit.edges.items()
    }
    everything = discover_latents(model, pairs, coders, smallest=1e-9, drawn=2, edges=False, sink=silent)
    assert everything.kept == pytest.approx(1.0, abs=1e-3)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown ablation"):
        setting(kind="noise")
    with pytest.raises(UnknownNameError, match="unknown each"):
        latent_attribution(setting(), each="head")
    with pytest.raises(InputError, match="no node of"):
        node_patching(setting(), parts=[vs.Unit(vs.Site("z", 0, 1))], sink=silent)
    with pytest.raises(InputError, match="steps"):
        latent_attribution(setting(), steps=0)

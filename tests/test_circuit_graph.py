"""The graph of edges, runs with any of them cut, and estimates of what cutting does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import families
import tiny
import vesalius as vs
from vesalius.circuits import Ablation, ablation, edge_attribution, relevance, wiring, with_cut, with_only
from vesalius.circuits.attribution import METHODS as ESTIMATES
from vesalius.circuits.gradients import differentiated
from vesalius.circuits.masked import masked
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.jobs import silent
from vesalius.site import Site

# Serial and parallel blocks, norms of all kinds and none, grouped heads, fused projections, scales, experts.
GRAPHED = ["llama", "gemma2", "qwen3", "phi", "gpt_neox", "olmo2", "opt", "bloom", "cohere", "granite", "mixtral"]


def setting(model: vs.Model, kind: str = "resample", prompts: str = "clean") -> Ablation:
    return ablation(model, tiny.pairs(), vs.logit_diff, kind, prompts)


def edge(cut: Ablation, source: str, target: str) -> int:
    return cut.wired.graph.number(vs.Edge(vs.Unit(Site.parse(source)), vs.Unit(Site.parse(target))))


def one_cut(cut: Ablation, *numbers: int) -> Tensor:
    found = torch.zeros(1, len(cut.wired.graph), dtype=torch.bool)
    found[0, list(numbers)] = True
    return found


# --- topology


@pytest.mark.demo_model
def test_smollm2_has_a_third_of_the_attention_edges_that_ungrouped_counts_have(demo: vs.Model) -> None:
    graph = wiring(demo).graph
    assert (len(graph.writers), len(graph.readers)) == (301, 481)
    assert graph.ungrouped == 123_211  # as Hanna et al.'s code counts
    # Edges into keys and values of three heads each are one edge here.
    into_keys = sum(int(graph.counts[n]) for n, reader in enumerate(graph.readers) if reader.site.kind in "kv")
    assert len(graph) == graph.ungrouped - 2 * into_keys == 70_651


def test_edges_are_numbered_reader_by_reader() -> None:
    graph = wiring(tiny.model("llama")).graph
    assert len(graph.edges) == len(graph) == len(set(graph.edges))
    assert all(graph.number(one) == number for number, one in enumerate(graph.edges))
    for number in (0, 57, len(graph) - 1):
        one = graph.edges[number]
        assert graph.writers[int(graph.writer_of[number])] == one.source
        assert graph.readers[int(graph.reader_of[number])] == one.target
        assert one.source.site.order < one.target.site.order
    assert [name for group in graph.groups for name in group] == list(range(len(graph.writers)))


def test_an_edge_backwards_or_between_strangers_is_refused() -> None:
    graph = wiring(tiny.model("llama")).graph
    late, early = vs.Unit(Site("mlp_out", 2)), vs.Unit(Site("q", 0, 1))
    with pytest.raises(InputError, match="does not come before"):
        graph.number(vs.Edge(late, early))
    with pytest.raises(UnknownNameError, match="unknown reader"):
        graph.number(vs.Edge(late, vs.Unit(Site("z", 0, 1))))


def test_connected_edges_lead_from_the_embeddings_to_the_logits() -> None:
    graph = wiring(tiny.model("llama")).graph
    names = [("embed", "layers.0.v[1]"), ("layers.0.z[4]", "layers.1.mlp_in"), ("layers.1.mlp_out", "logits")]
    parts = [vs.Edge(vs.Unit(Site.parse(one)), vs.Unit(Site.parse(two))) for one, two in names]
    chain = graph.mask(parts)
    assert torch.equal(graph.connected(chain), chain)  # head 4 reads key-value head 1
    for missing in parts:
        assert not graph.connected(chain & ~graph.mask([missing])).any()
    # Under zero ablation a writer that nothing leads to still says its biases.
    assert int(graph.connected(chain & ~graph.mask(parts[:1]), from_inputs=False).sum()) == 2


@pytest.mark.parametrize("name", ["bert", "deepseek_v3"])
def test_models_without_one_stream_or_without_keys_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="has no graph of edges"):
        wiring(families.model(name))


# --- runs with edges cut


@pytest.mark.parametrize("name", GRAPHED)
def test_cutting_nothing_and_everything_gives_the_two_runs(name: str) -> None:
    cut = setting(families.model(name))
    everything = torch.ones(1, len(cut.wired.graph), dtype=torch.bool)
    nothing = with_cut(cut, ~everything)[0]
    base, source = cut.plain()
    torch.testing.assert_close(nothing, base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(with_cut(cut, everything)[0], source, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_cut_edges_are_path_patches(family: str) -> None:
    """Of a head's edges into one reader, by an independent implementation."""
    model, pairs = tiny.model(family), tiny.pairs()
    cut = setting(model)
    for sender, receiver in (("layers.0.z[1]", "layers.2.q[2]"), ("layers.0.mlp_out", "layers.1.v[1]")):
        expected = vs.path_patching(model, pairs, senders=sender, receivers=receiver, sink=silent)
        found = with_cut(cut, one_cut(cut, edge(cut, sender, receiver)))
        torch.testing.assert_close(found, expected.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_cutting_all_edges_of_a_writer_patches_it(family: str) -> None:
    model, pairs = tiny.model(family), tiny.pairs()
    cut = setting(model, prompts="clean")
    graph = cut.wired.graph
    for name in ("layers.1.z[1]", "layers.1.mlp_out", "layers.0.z[3]"):
        number = graph.writers.index(vs.Unit(Site.parse(name)))
        expected = vs.sweep(model, pairs, sites=[name], base="clean", sink=silent).values
        torch.testing.assert_close(with_cut(cut, (graph.writer_of == number)[None]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_a_mean_or_nothing_in_place_of_a_head(kind: str) -> None:
    model, pairs = tiny.model("llama"), tiny.pairs()
    cut, site = setting(model, kind), "layers.1.z[2]"
    number = cut.wired.graph.writers.index(vs.Unit(Site.parse(site)))
    z = model.run(pairs.tokens("corrupted"), capture="layers.1.z")["layers.1.z"][:, :, 2]
    real = pairs.real[..., None]
    mean = (z * real).sum(0) / real.sum(0)
    value = torch.zeros_like(z) if kind == "zero" else mean.expand_as(z)
    logits = model.run(pairs.tokens("clean"), interventions=vs.Patch(site, source=value)).logits
    found = with_cut(cut, (cut.wired.graph.writer_of == number)[None])[0]
    torch.testing.assert_close(found, vs.logit_diff(logits, pairs), rtol=1e-4, atol=1e-4)


def test_many_variants_at_once_are_each_alone_and_small_circuits_take_the_short_way() -> None:
    cut = setting(tiny.model("llama"))
    masks = torch.rand(5, len(cut.wired.graph), generator=torch.Generator().manual_seed(0)) < torch.tensor(
        [0.02, 0.1, 0.5, 0.9, 0.99]
    ).unsqueeze(1)
    together = with_only(cut, masks)
    for number, mask in enumerate(masks):
        torch.testing.assert_close(with_only(cut, mask[None])[0], together[number], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.cat([masked(part, (~mask)[None].float())[0] for _, part in cut.batches(20)]),
            together[number], rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_an_edge_can_be_cut_at_one_position() -> None:
    cut = setting(tiny.model("gpt2"))
    number, shape = edge(cut, "embed", "layers.0.v[0]"), (9, 6)
    cuts = torch.zeros(1, len(cut.wired.graph), *shape)
    cuts[0, number] = 1
    torch.testing.assert_close(masked(cut, cuts), with_cut(cut, one_cut(cut, number)), rtol=1e-4, atol=1e-4)
    cuts[0, number, 2:] = 0
    # Nothing differs before position 2.
    torch.testing.assert_close(masked(cut, cuts)[0], cut.plain()[0], rtol=1e-4, atol=1e-4)


# --- estimates


@pytest.mark.parametrize("name", GRAPHED)
@pytest.mark.parametrize("kind", ["resample", "zero"])
def test_the_estimate_is_the_slope_at_cutting_nothing(name: str, kind: str) -> None:
    """By the gradient of the mask, which goes through the other implementation."""
    cut = setting(families.model(name), kind)
    cuts = torch.zeros(1, len(cut.wired.graph), requires_grad=True)
    slope = torch.autograd.grad(masked(cut, cuts, grad=True).sum(), cuts)[0][0]
    found = edge_attribution(cut.wired, cut.pairs, kind=kind, sink=silent)
    assert found.values.shape == (len(cut.wired.graph), 6)
    torch.testing.assert_close(found.effects.sum(1), slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [name for name in ESTIMATES if name != "atp_star"])
def test_positions_add_up_and_examples_do_not_touch_each_other(method: str) -> None:
    model, pairs = tiny.model("llama"), tiny.pairs()
    whole = edge_attribution(model, pairs, method=method, steps=2, sink=silent)
    apart = edge_attribution(model, pairs, method=method, steps=2, each="position", sink=silent)
    torch.testing.assert_close(apart.effects.sum(1), whole.effects, rtol=1e-3, atol=1e-4)
    assert not apart.mask[:, -1].all()  # unequal lengths
    alone = edge_attribution(model, pairs.subset([3]), method=method, steps=2, sink=silent)
    torch.testing.assert_close(alone.effects[:, 0], whole.effects[:, 3], rtol=1e-3, atol=1e-4)


def test_integrated_gradients_of_the_mask_add_up_to_the_whole() -> None:
    """Completeness (Sundararajan et al. 2017, proposition 1)."""
    found = edge_attribution(tiny.model("gpt2"), tiny.pairs(), method="mask_ig", steps=40, sink=silent)
    torch.testing.assert_close(found.effects.sum(0), found.source - found.base, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_through_the_softmax_the_last_layers_queries_and_keys_are_exact(family: str) -> None:
    """With an MLP that says nothing and a linear final norm, only the softmax is not linear after them."""
    model, pairs = tiny.model(family, layers=2), tiny.pairs()
    with torch.no_grad():
        if family == "gpt2":
            model.module.transformer.h[1].mlp.c_proj.weight.zero_()
            model.module.transformer.ln_f = torch.nn.Identity()
        else:
            model.module.model.layers[1].mlp.down_proj.weight.zero_()
            model.module.model.norm = torch.nn.Identity()
    cut = setting(model)
    last = [(one.target.site.layer, one.target.site.kind) for one in cut.wired.graph.edges]
    asked = torch.tensor([layer == 1 and kind in ("q", "k") for layer, kind in last])
    exact = with_cut(cut, torch.eye(len(asked), dtype=torch.bool)[asked]) - cut.plain()[0]
    sites = [Site(kind, layer) for layer in range(2) for kind in ("scores", "pattern")]
    run = differentiated(cut, cut.tokens, also=sites)
    change = cut.cut - run.seen.writes
    found = relevance._effects(run, change, [relevance._pattern_changes(run, layer, change) for layer in range(2)])
    torch.testing.assert_close(found[asked], exact, rtol=1e-3, atol=1e-4)
    plain = edge_attribution(model, pairs, sink=silent).effects[asked]
    assert float((plain - exact).abs().max()) > 0.01


def test_rules_of_relevance_leave_the_run_as_it_is() -> None:
    for family in tiny.FAMILIES:
        model, pairs = tiny.model(family), tiny.pairs()
        found = edge_attribution(model, pairs, method="relp", sink=silent)
        torch.testing.assert_close(found.base, vs.logit_diff(model.run(pairs.tokens("clean")).logits, pairs))
        silent_ = torch.tensor([edge.target.site.kind in ("q", "k") for edge in found.items])
        assert not found.effects[silent_].any() and found.effects[~silent_].any()


def test_named_positions_align_prompts_of_different_lengths() -> None:
    pairs = tiny.pairs()
    pairs = replace(pairs, named_positions={"changed": torch.tensor([2 + row % 2 for row in range(6)])})
    found = edge_attribution(tiny.model("llama"), pairs, each="position", sink=silent).at("changed")
    assert found.values.shape[1] == 6 and found.mean.shape[0] == len(found.items)


def test_what_cannot_be_asked_is_refused() -> None:
    model, pairs = tiny.model("llama"), tiny.pairs()
    with pytest.raises(UnknownNameError, match="eap_ig_inputs"):
        edge_attribution(model, pairs, method="magic", sink=silent)
    with pytest.raises(UnknownNameError, match="ablation"):
        edge_attribution(model, pairs, kind="noise", sink=silent)
    with pytest.raises(InputError, match="steps"):
        edge_attribution(model, pairs, method="mask_ig", steps=0, sink=silent)
    with pytest.raises(InputError, match="no sum over positions"):
        edge_attribution(model, pairs, method="atp_star", each="position", sink=silent)
    with pytest.raises(InputError, match="reads other positions"):
        edge_attribution(model, pairs, metric=vs.next_token_loss, sink=silent)
    with pytest.raises(InputError, match="edges of this graph"):
        with_cut(setting(model), torch.zeros(1, 3, dtype=torch.bool))


def test_padding_changes_nothing() -> None:
    model, pairs = tiny.model("llama"), tiny.pairs()
    row = int(pairs.size.argmin())
    short = pairs.subset([row])
    trimmed = vs.Pairs(
        clean=short.clean[:, : int(short.size)], corrupted=short.corrupted[:, : int(short.size)],
        answer=short.answer, distractor=short.distractor,
    )  # fmt: skip
    one, other = (edge_attribution(model, some, sink=silent).effects for some in (short, trimmed))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert Tokens(trimmed.clean).ids.shape[1] < pairs.clean.shape[1]

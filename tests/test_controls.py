"""Controls: matched components, and a model with the same statistics but no mechanism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import families
import handmade
import tiny
import vesalius as vs
from vesalius.describe import Discovery, claim_about
from vesalius.dictionaries import Dictionary
from vesalius.quantities import heads_and_mlps, matched_controls
from vesalius.validate import check, reinitialised


class Deep(handmade.Planted):
    """Ten layers of four heads whose attention the test chooses; nothing is ever run."""

    def __init__(self) -> None:
        super().__init__(4)
        self.model = vs.Model(tiny.gpt2(layers=10))

    def focus(self, part: vs.Part, mass: float) -> None:
        self.attend(part, self.named_positions["end"], self.named_positions["answer"], mass)


def mlp(layer: int) -> vs.Unit:
    return vs.Unit(vs.Site("mlp_out", layer))


@pytest.fixture
def deep() -> Deep:
    return Deep()


def test_controls_are_the_nearest_in_entropy_within_four_layers_and_not_members(deep: Deep) -> None:
    part, member = vs.head(5, 0), vs.head(4, 1)
    near = [vs.head(1, 2), vs.head(3, 3), vs.head(9, 0), vs.head(5, 2), vs.head(6, 1)]
    deep.focus(part, 0.9)
    deep.focus(member, 0.9)
    deep.focus(vs.head(0, 0), 0.9)  # just as focused, but five layers away
    for number, other in enumerate(near):
        deep.focus(other, 0.9 - 0.01 * number)
    chosen = matched_controls(deep, part, [part, member])
    assert len(chosen.parts) == 8
    assert set(near) <= set(chosen.parts)
    assert not {part, member, vs.head(0, 0)} & set(chosen.parts)
    assert chosen.rule == "8 heads nearest in attention entropy at the end outside the circuit, within 4 layers"
    assert list(chosen.parts) == sorted(chosen.parts, key=lambda chosen: chosen.writes[0].order)


def test_the_same_runs_give_the_same_controls(deep: Deep) -> None:
    part = vs.head(5, 0)
    assert matched_controls(deep, part, [part]) == matched_controls(Deep(), part, [part])


def test_controls_of_an_mlp_are_the_nearest_mlps(deep: Deep) -> None:
    found = matched_controls(deep, mlp(5), [mlp(4)])
    assert [chosen.writes[0].layer for chosen in found.parts] == [1, 2, 3, 6, 7, 8, 9]
    assert {chosen.writes[0].kind for chosen in found.parts} == {"mlp_out"}
    assert found.rule == "7 MLPs outside the circuit, within 4 layers"


def test_the_window_is_widened_when_too_few_are_left_and_the_rule_says_so(deep: Deep) -> None:
    first = vs.head(0, 0)
    free = [vs.head(2, 1), vs.head(7, 2), vs.head(9, 3)]
    members = [part for part in heads_and_mlps(deep.model) if part.writes[0].kind == "z" and part not in free]
    chosen = matched_controls(deep, first, members)
    assert chosen.parts == tuple(free[:2])
    assert "within 7 layers (widened from 4: fewer than 2 were left)" in chosen.rule
    alone = matched_controls(deep, first, heads_and_mlps(deep.model))
    assert alone.parts == ()


def test_controls_can_be_asked_to_precede_a_layer(deep: Deep) -> None:
    chosen = matched_controls(deep, vs.head(4, 0), [], before=6)
    assert {other.writes[0].layer for other in chosen.parts} <= set(range(6))
    assert chosen.rule.endswith("before layer 6")


@pytest.mark.parametrize("name", sorted(name for name, family in families.FAMILIES.items() if not family.replayed))
def test_where_attention_is_not_recorded_heads_are_matched_by_layer_and_no_role_is_tried(name: str) -> None:
    runs = vs.Runs(families.model(name), tiny.pairs())
    members = (vs.head(0, 1), mlp(0))
    chosen = matched_controls(runs, members[0], members)
    assert "heads outside the circuit, within 4 layers" in chosen.rule
    assert all(part.writes[0].kind == "z" and part not in members for part in chosen.parts)
    assert not any(handmade.described(Discovery.of(runs, members)).scores.values())
    claim = claim_about(runs, members[0], "total_effect", members=members)
    expected = runs.effects(chosen.parts, "corrupted", "noising").mean(0)
    assert check(claim, runs=runs).control == pytest.approx(expected.tolist())


@pytest.mark.parametrize("name", ["embed", "layers.2.attn_out"])
def test_parts_of_which_there_is_one_a_layer_or_less_have_no_matched_controls(deep: Deep, name: str) -> None:
    chosen = matched_controls(deep, vs.Unit(vs.Site.parse(name)), [])
    assert (chosen.parts, chosen.rule) == ((), "there are no parts like it to compare with")


# --- neurons, latents and directions


def activity(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean size [unit] of values [example, pos, unit] at the positions that count."""
    return values[counted].abs().mean(0)


def nearest(sizes: torch.Tensor, own: int, taken: set[int]) -> list[int]:
    apart = (sizes - sizes[own]).abs().tolist()
    return sorted(set(range(len(sizes))) - {own} - taken, key=apart.__getitem__)[:8]


def upto_end(pairs: vs.Pairs) -> torch.Tensor:
    return torch.arange(pairs.clean.shape[1])[None] <= pairs.at[:, None]


def past_first(tokens: vs.Tokens) -> torch.Tensor:
    """Of texts, the first token does not count: in language models it is an outlier."""
    return tokens.real & (torch.arange(tokens.ids.shape[1]) > 0)


@pytest.mark.parametrize("on", ["prompts", "texts"])
def test_controls_of_a_neuron_are_the_neurons_of_its_layer_nearest_in_activity(on: str) -> None:
    model, pairs = vs.Model(tiny.llama(intermediate_size=40)), tiny.pairs(8)
    tokens = pairs.tokens("clean")
    run = model.run(tokens, capture=["layers.1.mlp_post"])
    sizes = activity(run["layers.1.mlp_post"], upto_end(pairs) if on == "prompts" else past_first(tokens))
    runs = vs.Runs(model, pairs if on == "prompts" else vs.Corpus(tokens))
    chosen = matched_controls(runs, vs.neuron(1, 5), [vs.neuron(1, 7), vs.neuron(2, 3)])
    assert chosen.parts == tuple(vs.neuron(1, index) for index in nearest(sizes, 5, {7}))
    assert chosen.rule == "8 neurons of the same layer, of 38 drawn those nearest in mean activity"


@pytest.mark.parametrize("own", [5, 70])
def test_of_many_neurons_some_are_drawn_and_always_the_same(own: int) -> None:
    runs = vs.Runs(tiny.model("llama"), tiny.pairs(4))
    part, members = vs.neuron(1, own), [vs.neuron(1, index) for index in range(4)]
    chosen = matched_controls(runs, part, members)
    assert chosen == matched_controls(vs.Runs(tiny.model("llama"), tiny.pairs(4)), part, members)
    assert len(set(chosen.parts)) == 8
    assert not {part, *members} & set(chosen.parts)
    assert "of 64 drawn" in chosen.rule


@pytest.mark.parametrize("on", ["prompts", "texts"])
def test_controls_of_a_latent_are_latents_of_its_dictionary_nearest_in_activity(on: str) -> None:
    model, pairs, width, count = tiny.model("gpt2"), tiny.pairs(8), 48, 20
    drawn = torch.Generator().manual_seed(0)
    site = vs.Site("resid_post", 1)
    dictionary = Dictionary(
        "relu", (site,), (site,), encoders=(torch.randn(width, count, generator=drawn) / 3,),
        decoders=(torch.randn(count, width, generator=drawn),), b_enc=torch.linspace(-1.0, 1.0, count),
        b_dec=(torch.zeros(width),),
    )  # fmt: skip
    tokens = pairs.tokens("clean")
    read = model.run(tokens, capture=[str(site)])[str(site)]
    latents = (read @ dictionary.encoders[0] + dictionary.b_enc).relu()
    sizes = activity(latents, upto_end(pairs) if on == "prompts" else past_first(tokens))
    runs = vs.Runs(model, pairs if on == "prompts" else vs.Corpus(tokens))
    chosen = matched_controls(runs, vs.latent(dictionary, 4), [vs.latent(dictionary, 9)])
    assert [str(part) for part in chosen.parts] == [
        str(vs.latent(dictionary, index)) for index in nearest(sizes, 4, {9})
    ]
    assert chosen.rule == "8 latents of the same dictionary, of 18 drawn those nearest in mean activity"


def test_controls_of_a_direction_are_random_ones_at_its_site_that_a_claim_makes_again() -> None:
    runs = vs.Runs(tiny.model("gpt2"), tiny.pairs(8))
    site = vs.Site("resid_post", 0)
    part = vs.Direction(site, torch.randn(48, generator=torch.Generator().manual_seed(4)), "mine")
    chosen = matched_controls(runs, part, [])
    assert chosen.rule == "8 random directions at layers.0.resid_post"
    assert [other.writes for other in chosen.parts] == [(site,)] * 8
    vectors = torch.stack([other.vector for other in chosen.parts if isinstance(other, vs.Direction)])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(8))
    cosines = (torch.cat([vectors, part.vector[None]]) @ vectors.T)[~torch.eye(9, 8, dtype=torch.bool)]
    assert float(cosines.abs().max()) < 0.6

    claim = claim_about(runs, part, "total_effect", size=0.5)
    assert claim.control == {"rule": chosen.rule, "random directions": 8}
    control = check(claim, runs=runs, parts=[part]).control
    expected = runs.effects(chosen.parts, "corrupted", "noising").mean(0)
    assert control == pytest.approx(expected.tolist(), abs=1e-6)


# --- a model with random weights


def family(name: str) -> vs.Model:
    net: Any = tiny.FAMILIES[name](0)
    with torch.no_grad():  # norms and biases that are not all alike
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return vs.Model(net)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_random_weights_keep_every_tensors_mean_and_spread(name: str) -> None:
    model = family(name)
    other = reinitialised(model, 3)
    before = dict(model.module.named_parameters())
    for key, parameter in other.module.named_parameters():
        assert not torch.equal(parameter, before[key]), key
        torch.testing.assert_close(parameter.mean(), before[key].mean(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(parameter.std(), before[key].std(), atol=1e-5, rtol=1e-4)
        if parameter.ndim == 1 and not key.endswith("bias"):
            torch.testing.assert_close(parameter.sort().values, before[key].sort().values)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_random_weights_forget_what_the_model_does_and_leave_it_untouched(name: str) -> None:
    model, tokens = family(name), tiny.pairs().tokens("clean")
    before, digest = model.run(tokens).logits, vs.Model(model.module).content_hash
    other = reinitialised(model, 3)
    logits = other.run(tokens).logits
    assert vs.Model(model.module).content_hash == digest
    assert torch.equal(model.run(tokens).logits, before)
    together = torch.stack([logits.flatten(), before.flatten()])
    assert abs(float(torch.corrcoef(together)[0, 1])) < 0.3
    assert not other.module.training


def test_one_seed_gives_one_model() -> None:
    model = family("gpt2")
    assert reinitialised(model, 3).content_hash == reinitialised(model, 3).content_hash
    assert reinitialised(model, 3).content_hash != reinitialised(model, 4).content_hash
    assert reinitialised(model, 3).name.endswith("with random weights (seed 3)")


def test_tied_weights_stay_tied_and_buffers_stay() -> None:
    model = family("gpt2")
    module: Any = reinitialised(model, 0).module
    assert module.lm_head.weight is module.transformer.wte.weight
    llama = family("llama")
    buffers = dict(reinitialised(llama, 0).module.named_buffers())
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in llama.module.named_buffers())


def test_random_weights_do_not_hold_the_mechanism_of_the_known_network() -> None:
    model = handmade.network()
    trained = handmade.runs(model)
    control = vs.Runs(reinitialised(model, 1), trained.contrast)
    labels = [
        [fit.label for fit in handmade.described(Discovery.of(runs, handmade.MEMBERS)).fits.values() if fit]
        for runs in (trained, control)
    ]
    assert sorted(labels[0]) == ["S-inhibition", "copy suppression", "name mover", "negative mover"]
    assert not {"S-inhibition", "copy suppression", "name mover"} & set(labels[1])

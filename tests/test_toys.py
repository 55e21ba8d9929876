"""The planted network does its task through the planted heads and through nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vesalius as vs
from vesalius.data.positions import named_positions
from vesalius.errors import InputError
from vesalius.model.direct import direct_effects
from vesalius.quantities import heads_and_mlps
from vesalius.site import Site
from vesalius.toys import PLANTED, VOCAB, planted_induction, planted_pairs, random_model
from vesalius.toys.planted import LAYERS, POSITIONS, _codes, _places, _subspaces

SEEDS = (0, 1)
PREVIOUS = PLANTED["previous-token"][0]
MAIN, SECOND = PLANTED["name mover"]
NEGATIVE = PLANTED["negative mover"][0]
HEADS = {head for heads in PLANTED.values() for head in heads}
COMPONENTS = [part.writes[0] for part in heads_and_mlps(planted_induction(0))]
NOISE = [part for part in COMPONENTS if part.kind != "embed" and part not in HEADS]


def at_end(model: vs.Model, pairs: vs.Pairs, which: str = "clean", without: Site | None = None) -> Tensor:
    """Logits [example, vocab] where the metric reads, perhaps with one part set to zero."""
    edits = [] if without is None else [vs.Ablate(str(without), mode="zero")]
    return model.run(pairs.tokens(which), interventions=edits).logits[torch.arange(len(pairs)), pairs.at]


def accuracy(logits: Tensor, right: Tensor) -> float:
    """Share of prompts whose largest logit of the whole vocabulary is the right token's."""
    return float((logits.argmax(-1) == right).float().mean())


def difference(logits: Tensor, pairs: vs.Pairs) -> float:
    rows = torch.arange(len(pairs))
    return float((logits[rows, pairs.answer] - logits[rows, pairs.distractor]).mean())


@pytest.fixture(scope="module", params=SEEDS)
def planted(request: pytest.FixtureRequest) -> tuple[vs.Model, dict[str, vs.Pairs]]:
    return planted_induction(request.param), planted_pairs(100, seed=1000 + request.param)


def test_the_planted_network_does_its_task(planted: tuple[vs.Model, dict[str, vs.Pairs]]) -> None:
    model, pairs = planted
    assert accuracy(at_end(model, pairs["swap"]), pairs["swap"].answer) >= 0.99


def test_a_random_network_does_not_do_it() -> None:
    pairs = planted_pairs(200)["swap"]
    assert max(accuracy(at_end(random_model(seed), pairs), pairs.answer) for seed in SEEDS) < 0.1


def test_swapping_makes_the_distractor_right_and_shuffling_leaves_nothing(
    planted: tuple[vs.Model, dict[str, vs.Pairs]],
) -> None:
    model, pairs = planted
    swapped = at_end(model, pairs["swap"], "corrupted")
    assert accuracy(swapped, pairs["swap"].distractor) >= 0.99
    clean = difference(at_end(model, pairs["swap"]), pairs["swap"])
    assert abs(difference(at_end(model, pairs["shuffle"], "corrupted"), pairs["shuffle"])) < 0.1 * clean


@pytest.mark.parametrize("head", [PREVIOUS, MAIN], ids=str)
def test_without_a_planted_head_that_matters_most_the_task_is_lost(
    planted: tuple[vs.Model, dict[str, vs.Pairs]], head: Site
) -> None:
    model, pairs = planted
    assert accuracy(at_end(model, pairs["swap"], without=head), pairs["swap"].answer) < 0.1


def test_the_second_mover_helps_and_the_negative_mover_hinders(
    planted: tuple[vs.Model, dict[str, vs.Pairs]],
) -> None:
    model, pairs = planted
    whole, weaker, stronger = (
        difference(at_end(model, pairs["swap"], without=part), pairs["swap"]) for part in (None, SECOND, NEGATIVE)
    )
    assert weaker < 0.8 * whole
    assert stronger > 1.2 * whole


def test_without_any_other_part_the_task_is_kept(planted: tuple[vs.Model, dict[str, vs.Pairs]]) -> None:
    model, pairs = planted
    assert len(NOISE) == LAYERS * 5 - len(HEADS)
    whole = at_end(model, pairs["swap"])
    for part in NOISE:
        ablated = at_end(model, pairs["swap"], without=part)
        assert accuracy(ablated, pairs["swap"].answer) >= 0.99
        assert not torch.equal(ablated, whole)  # noise is there, and does something
        assert difference(ablated, pairs["swap"]) == pytest.approx(difference(whole, pairs["swap"]), rel=0.05)


def test_planted_heads_look_where_they_should_and_noise_heads_do_not(
    planted: tuple[vs.Model, dict[str, vs.Pairs]],
) -> None:
    model, pairs = planted
    run = model.run(pairs["swap"].tokens("clean"), capture=["layers.*.pattern"])
    rows, marks = torch.arange(len(pairs["swap"])), named_positions(pairs["swap"])
    for part in (p for p in COMPONENTS if p.kind == "z"):
        seen = run[f"layers.{part.layer}.pattern"][:, part.index]
        before = seen[rows, marks["answer"], marks["answer"] - 1].mean()
        answer = seen[rows, marks["end"], marks["answer"]].mean()
        assert (before > 0.97) == (part == PREVIOUS)
        assert (answer > 0.97) == (part in HEADS - {PREVIOUS})
        assert part in HEADS or max(before, answer) < 0.5


def test_the_logit_difference_comes_from_the_movers_in_their_proportions(
    planted: tuple[vs.Model, dict[str, vs.Pairs]],
) -> None:
    model, pairs = planted
    found = direct_effects(model, pairs["swap"], pairs["swap"].tokens("clean"))
    main, second, negative = (float(found[part].mean()) for part in (MAIN, SECOND, NEGATIVE))
    assert second / main == pytest.approx(0.3, abs=0.05)
    assert negative / main == pytest.approx(-0.4, abs=0.05)
    assert abs(float(found[PREVIOUS].mean())) < 0.05 * main


def test_the_subspaces_are_orthogonal_and_untouched_by_centring() -> None:
    rows = torch.cat(_subspaces(torch.Generator().manual_seed(3)))
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)
    assert rows.sum(1).abs().max() < 1e-5


def test_no_two_tokens_have_codes_closer_than_a_quarter() -> None:
    codes = _codes(torch.Generator().manual_seed(0))
    cosines = codes @ codes.T - torch.eye(VOCAB)
    assert cosines.max() <= 0.25 + 1e-6
    assert torch.allclose(codes.norm(dim=1), torch.ones(VOCAB))


def test_a_step_takes_every_position_to_the_one_before() -> None:
    places, step = _places()
    assert torch.equal(places[1:] @ step.T, places[:-1])
    assert len(places) == POSITIONS


def test_splits_share_no_template_name_answer_or_prompt() -> None:
    pairs = planted_pairs(24, seed=5)["swap"]
    first, second = (pairs.split(name) for name in ("discovery", "validation"))
    for kind in ("template", "names"):
        assert len(set(first.groups[kind])) == len(set(second.groups[kind])) == 12
        assert not set(first.groups[kind]) & set(second.groups[kind])
    assert not set(first.answer.tolist() + first.distractor.tolist()) & set(second.answer.tolist())
    assert not set(first.example_hashes) & set(second.example_hashes)
    assert len(set(pairs.example_hashes)) == 48


def test_every_prompt_reads_a_b_d_c_a_and_nothing_in_it_gives_the_answer_away() -> None:
    corruptions = planted_pairs(60, seed=2)
    pairs, marks = corruptions["swap"], named_positions(corruptions["swap"])
    order = marks["answer"] < marks["distractor_first"]
    assert 0.4 < order.float().mean() < 0.6
    for row in range(len(pairs)):
        clean = pairs.clean[row, : int(pairs.size[row])].tolist()
        swapped = pairs.corrupted[row, : int(pairs.size[row])].tolist()
        a, answer, distractor = clean[-1], int(pairs.answer[row]), int(pairs.distractor[row])
        assert clean[clean.index(a) + 1] == answer and swapped[swapped.index(a) + 1] == distractor
        assert [clean.count(token) for token in (a, answer, distractor)] == [2, 1, 1]
        assert sorted(clean) == sorted(swapped)
        shuffled = corruptions["shuffle"].corrupted[row, : len(clean)].tolist()
        assert not {answer, distractor} & set(shuffled) and shuffled.count(a) == 1


def test_corruptions_share_their_clean_prompts_row_by_row() -> None:
    swap, shuffle = planted_pairs(30).values()
    assert swap.example_hashes == shuffle.example_hashes
    assert (swap.corruption, shuffle.corruption) == ("swap", "shuffle")


def test_a_seed_gives_one_network_and_one_task_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    for make in (planted_induction, random_model):
        assert make(4).content_hash == make(4).content_hash != make(5).content_hash
    assert planted_pairs(8, 1)["swap"].content_hash == planted_pairs(8, 1)["swap"].content_hash
    assert planted_pairs(8, 1)["swap"].content_hash != planted_pairs(8, 2)["swap"].content_hash
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_random_network_is_of_the_same_architecture_and_not_degenerate() -> None:
    model = random_model(0)
    assert model.layout == planted_induction(0).layout
    run = model.run(planted_pairs(24)["swap"].tokens("clean"), capture=["layers.*.pattern"])
    assert 0.5 < float(run.logits.std()) < 2
    last = run["layers.2.pattern"][:, :, 9, :10]
    entropy = torch.special.entr(last).sum(-1).mean()
    assert 0.5 * torch.log(torch.tensor(10.0)) < entropy < 0.99 * torch.log(torch.tensor(10.0))


def test_one_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="n is 1; give at least 2"):
        planted_pairs(1)

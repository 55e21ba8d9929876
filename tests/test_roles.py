"""Roles: found where they are planted, not found when one ingredient is missing, and never by looks alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import handmade
import tiny
import vesalius as vs
from handmade import PARTS, Planted, described
from vesalius.describe import FITS, ROLES, Description, Descriptions, Discovery, best_of, claims_of
from vesalius.describe.predictions import above, within
from vesalius.errors import InputError, PairsError, UnknownNameError
from vesalius.quantities import ATTENDS, COPIES, DIRECT_EFFECT, MOVES_ATTENTION, QUANTITIES, Runs, quantity
from vesalius.quantities.contrast import EMBED
from vesalius.quantities.moves_attention import lean
from vesalius.quantities.places import in_words, positions, present

NAMES = ("S-inhibition", "copy suppression", "attention sink", "attribute mover", "duplicate-token", "induction",
         "MLP writes toward the answer", "MLP writes toward the distractor", "name mover", "negative mover",
         "previous-token", "subject reader")  # fmt: skip
PART, MOVER, MLP = vs.head(0, 1), vs.head(2, 3), vs.Unit(vs.Site("mlp_out", 1))
BIG, DELTA = 1.0, 0.5


def discovery(runs: Runs, *members: vs.Part, movers: tuple[vs.Part, ...] = ()) -> Discovery:
    found = tuple(Description(mover, "name mover", ()) for mover in movers)
    return replace(Discovery.of(runs, members), total=10.0, delta=DELTA, found=found)


def role_of(found: Descriptions, component: vs.Part) -> str | None:
    fit = found[component]
    return None if fit is None else fit.label


# --- Every role planted by its ingredients, and each ingredient taken away -----------------------------------------


def attending(query: str, key: str, mass: float = 0.8) -> Callable[[Planted], None]:
    def plant(runs: Planted) -> None:
        runs.attend(PART, positions(runs, query), positions(runs, key), mass)

    return plant


def previous(runs: Planted) -> None:
    for at in range(1, handmade.WIDTH):
        where = torch.full((runs.n,), at)
        runs.attend(PART, where, where - 1, 0.8)


def direct(value: float, part: vs.Unit = PART) -> Callable[[Planted], None]:
    return lambda runs: runs.write(part, value)


def total(value: float, part: vs.Part = PART) -> Callable[[Planted], None]:
    return lambda runs: runs.totals.update({part: value})


def copying(key: str, amount: float) -> Callable[[Planted], None]:
    return lambda runs: runs.copy(PART, key, amount)


def turning(amount: float) -> Callable[[Planted], None]:
    return lambda runs: runs.turned.update({PART: amount})


RECIPES: dict[str, list[Callable[[Planted], None]]] = {
    "previous-token": [previous, total(BIG)],
    "duplicate-token": [attending("distractor_last", "distractor_first"), total(-BIG)],
    "induction": [attending("distractor_last", "distractor_first+1"), total(BIG)],
    "S-inhibition": [attending("end", "distractor_last"), total(BIG), turning(0.2)],
    "name mover": [attending("end", "answer"), copying("answer", BIG), direct(BIG)],
    "copy suppression": [attending("end", "distractor_last"), copying("distractor_last", -BIG), direct(BIG)],
    "negative mover": [direct(-BIG), total(-BIG)],
    "attention sink": [attending("end", "first"), total(BIG)],
}


def planted(recipe: list[Callable[[Planted], None]]) -> Descriptions:
    runs = Planted()
    for plant in recipe:
        plant(runs)
    return described(discovery(runs, PART, movers=(MOVER,)))


def test_the_library_has_the_stated_roles() -> None:
    assert sorted(role.name for role in ROLES) == sorted(NAMES)


@pytest.mark.parametrize("role", RECIPES)
def test_a_planted_role_is_found(role: str) -> None:
    fit = planted(RECIPES[role])[PART]
    assert fit is not None
    assert fit.label == role
    assert FITS <= fit.score <= 1
    assert 1 <= len(claims_of(fit, discovery(Planted(), PART))) <= 3


@pytest.mark.parametrize(
    ("role", "missing"), [(role, number) for role, recipe in RECIPES.items() for number in range(len(recipe))]
)
def test_a_role_is_not_found_without_one_of_its_ingredients(role: str, missing: int) -> None:
    rest = [plant for number, plant in enumerate(RECIPES[role]) if number != missing]
    found = planted(rest)
    assert role_of(found, PART) != role
    assert found.scores[str(PART)].get(role, 0.0) < FITS


@pytest.mark.parametrize(
    ("role", "wrong"),
    [("name mover", copying("answer", -BIG)), ("name mover", direct(-BIG)),
     ("name mover", attending("end", "distractor_first")), ("copy suppression", copying("distractor_last", BIG)),
     ("copy suppression", direct(-BIG)), ("S-inhibition", turning(-0.2)), ("attention sink", direct(BIG)),
     ("attention sink", direct(-BIG)), ("negative mover", total(BIG)), ("S-inhibition", total(-BIG))],
)  # fmt: skip
def test_a_role_is_not_found_when_an_ingredient_has_the_wrong_sign(role: str, wrong: Any) -> None:
    assert role_of(planted([*RECIPES[role], wrong]), PART) != role


@pytest.mark.parametrize("place", ["answer", "distractor_first", "distractor_last", "first"])
def test_a_negative_mover_is_found_by_its_sign_wherever_it_looks(place: str) -> None:
    found = planted([*RECIPES["negative mover"], attending("end", place)])
    fit = found[PART]
    assert fit is not None
    assert fit.label == "negative mover"
    assert f"looks most at {in_words(place)} (0.80)" in fit.sentence
    assert [one.sign for one in fit.predictions] == [-1, -1]


def test_a_negative_mover_that_looks_like_an_induction_head_is_named_by_its_sign() -> None:
    looks = attending("distractor_last", "distractor_first+1", 0.95)
    found = planted([looks, direct(-1.1 * DELTA), total(-1.1 * DELTA * 3)])
    scores = found.scores[str(PART)]
    assert scores["negative mover"] >= FITS > scores["induction"]
    assert role_of(found, PART) == "negative mover"


def test_s_inhibition_needs_a_mover_in_a_later_layer() -> None:
    runs = Planted()
    for plant in RECIPES["S-inhibition"]:
        plant(runs)
    assert role_of(described(discovery(runs, PART)), PART) is None
    assert role_of(described(discovery(runs, PART, movers=(vs.head(0, 2),))), PART) is None
    assert role_of(described(discovery(runs, PART, movers=(MOVER,))), PART) == "S-inhibition"


def test_mlps_are_described_by_the_sign_of_what_they_write() -> None:
    runs = Planted()
    others = vs.Unit(vs.Site("mlp_out", 0)), vs.Unit(vs.Site("mlp_out", 2))
    for part, amount in ((MLP, BIG), (others[0], -BIG), (others[1], 0.4 * DELTA)):
        runs.write(part, amount)
    found = described(discovery(runs, MLP, *others))
    assert role_of(found, MLP) == "MLP writes toward the answer"
    assert role_of(found, others[0]) == "MLP writes toward the distractor"
    assert role_of(found, others[1]) is None


def test_no_role_fits_is_an_outcome_and_its_scores_are_shown() -> None:
    found = planted([total(BIG)])
    assert found[PART] is None
    assert max(found.scores[str(PART)].values()) < FITS


def test_the_embeddings_have_no_role() -> None:
    found = described(discovery(Planted(), EMBED, PART))
    assert found["embed"] is None
    assert found.scores["embed"] == {}


def test_the_best_scoring_role_is_kept() -> None:
    found = planted([attending("end", "distractor_last"), total(BIG), turning(0.9), copying("distractor_last", -0.6),
                     direct(0.6)])  # fmt: skip
    scores = found.scores[str(PART)]
    assert scores["S-inhibition"] > scores["copy suppression"] >= FITS
    assert role_of(found, PART) == "S-inhibition"
    assert best_of(()) is None


def test_strengths_are_half_at_the_threshold_and_grow() -> None:
    assert above(0.3, 0.3) == pytest.approx(FITS)
    assert above(0.31, 0.3) > FITS > above(0.29, 0.3)
    assert above(-1, 0.3) == 0
    assert within(0.3, 0.3) == pytest.approx(FITS)
    assert within(-0.2, 0.3) > FITS > within(-0.4, 0.3)


# --- A network whose mechanism is known ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> Runs:
    return handmade.runs(handmade.network())


def test_the_network_does_its_task(known: Runs) -> None:
    assert bool((known.metric("clean") > 2).all())
    assert bool((known.metric("swap") < -2).all())


def test_the_mechanism_of_a_known_network_is_found(known: Runs) -> None:
    setting = Discovery.of(known, tuple(PARTS.values()))
    found = described(setting)
    roles = {name: role_of(found, part) for name, part in PARTS.items()}
    assert roles == {
        "previous": None,  # attends to the position before, but nothing follows from it
        "inhibition": "S-inhibition", "mover": "name mover", "suppressor": "copy suppression",
        "negative": "negative mover", "idle": None,
    }  # fmt: skip
    assert len(handmade.claims(setting)) == 3 + 3 + 3 + 2


@pytest.mark.parametrize(
    ("change", "part", "role"),
    [({"mover": -3.0}, "mover", "negative mover"), ({"mover": 0.0}, "mover", None),
     # Looking everywhere alike, it copies the repeated name twice: by the sign of its effect, a negative mover.
     ({"looks": False}, "mover", "negative mover"), ({"suppressor": 2.0}, "suppressor", "negative mover"),
     ({"negative": 1.0}, "negative", "name mover"), ({"flag": 0.0}, "inhibition", None)],
)  # fmt: skip
def test_changing_one_weight_of_the_mechanism_changes_the_description(change: Any, part: str, role: str | None) -> None:
    runs = handmade.runs(handmade.network(**change), n=12)
    assert role_of(described(Discovery.of(runs, handmade.MEMBERS)), PARTS[part]) == role


def test_a_previous_token_head_attends_to_the_position_before(known: Runs) -> None:
    def mass(part: vs.Part, key: str) -> float:
        return float(ATTENDS.measure(known, part, {"query": "every", "key": key}).mean())

    assert mass(PARTS["previous"], "previous") > 0.95
    assert mass(PARTS["previous"], "two back") < 0.05
    assert mass(PARTS["idle"], "previous") < 0.3


def test_descriptions_say_what_was_measured_in_plain_words(known: Runs) -> None:
    fit = described(Discovery.of(known, handmade.MEMBERS))[PARTS["mover"]]
    assert fit is not None
    assert fit.sentence.startswith("head 1.0 as name mover: attends from the last position to the answer (0.99 of")
    means = {one.quantity: one.mean for one in fit.predictions}
    assert means["direct_effect"] == pytest.approx(float(DIRECT_EFFECT.measure(known, PARTS["mover"], {}).mean()))


def test_claims_name_their_terms(known: Runs) -> None:
    made = Discovery.of(known, handmade.MEMBERS, study="toy", n=20)
    claims = {(c.subject["site"], c.quantity): c for c in handmade.claims(made)}
    shift = claims[str(PARTS["inhibition"]), "moves_attention"]
    looks, direct_claim = (claims[str(PARTS["mover"]), name] for name in ("attends", "direct_effect"))
    assert made.total == pytest.approx(float(known.total("swap").mean()))
    assert direct_claim.delta == pytest.approx(0.05 * made.total)
    assert direct_claim.nulls == (("shuffled labels", direct_claim.delta / 2),)
    assert (looks.kind, looks.unit, looks.scale) == ("predictive", "attention", None)
    assert looks.nulls == (("elsewhere", looks.delta / 2),)
    assert 1.5 < (shift.scale or 0) < 2.01
    for claim in claims.values():
        assert (claim.n, claim.study) == (20, "toy")
        assert claim.parents == (known.pairs.content_hash,)
        assert claim.subject["model_hash"] == known.model.content_hash
        assert not set(claim.control["parts"]) & set(map(str, handmade.MEMBERS))
        assert vs.Claim.from_json(claim.to_json()) == claim


# --- The figures against independent implementations ----------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def random_runs(request: pytest.FixtureRequest) -> Runs:
    return Runs(tiny.model(request.param), {"swap": handmade.pairs(8).split("discovery")})


def test_attention_is_what_a_plain_run_shows(random_runs: Runs) -> None:
    run = random_runs.model.run(random_runs.pairs.tokens("clean"), capture=["layers.1.pattern"])
    pattern, marks = run["layers.1.pattern"][:, 2], random_runs.named_positions
    for query, key in (("end", "answer"), ("distractor_last", "distractor_first+1"), ("end", "first")):
        found = ATTENDS.measure(random_runs, vs.head(1, 2), {"query": query, "key": key})
        at, to = marks[query], positions(random_runs, key)
        expected = torch.stack([pattern[row, at[row], to[row]] for row in range(random_runs.n)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    others = ATTENDS.measure(random_runs, vs.head(1, 2), {"query": "end", "key": "others"})
    torch.testing.assert_close(others, pattern[:, -1, 1:].mean(1), atol=1e-5, rtol=1e-4)
    back = ATTENDS.measure(random_runs, vs.head(1, 2), {"query": "every", "key": "two back"})
    loop = torch.stack([pattern[:, at, at - 2] for at in range(3, handmade.WIDTH)]).mean(0)
    torch.testing.assert_close(back, loop, atol=1e-5, rtol=1e-4)


def test_copying_is_what_writing_the_value_into_frozen_logits_does(random_runs: Runs) -> None:
    model, pairs = random_runs.model, random_runs.pairs
    head = 4 if _six(model) else 3
    found = COPIES.measure(random_runs, vs.head(1, head), {"key": "answer"})
    run = model.run(pairs.tokens("clean"), capture=["layers.1.v", "layers.2.resid_post"])
    for row in range(random_runs.n):
        value = run["layers.1.v"][row, int(random_runs.named_positions["answer"][row])]
        write = value[head // (model.architecture[1].n_heads // len(value))] @ model.W_O(1)[head]
        logits = _frozen_logits(model, run["layers.2.resid_post"][row, -1], write)
        own = {int(pairs.answer[row]), int(pairs.distractor[row])}
        others = sorted({*pairs.answer.tolist(), *pairs.distractor.tolist()} - own)
        expected = logits[int(pairs.answer[row])] - logits[others].mean()
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-3)


def _six(model: vs.Model) -> bool:
    return model.architecture[1].n_heads == 6


def _frozen_logits(model: vs.Model, final: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
    """All logits of one write, through the final norm with the scale it has at `final`."""
    norm = model.module.model.norm if _six(model) else model.module.transformer.ln_f
    if _six(model):
        scale = (final.pow(2).mean() + norm.variance_epsilon).rsqrt()
        return (write * scale * norm.weight) @ model.W_U.T
    scale = (final.var(unbiased=False) + norm.eps).rsqrt()
    return ((write - write.mean()) * scale * norm.weight) @ model.W_U.T


def test_a_shift_of_attention_is_what_a_patched_run_shows(random_runs: Runs) -> None:
    model, pairs, rows = random_runs.model, random_runs.pairs, torch.arange(random_runs.n)
    parameters = {"movers": ["layers.1.z[0]", "layers.2.z[3]"]}
    found = MOVES_ATTENTION.measure(random_runs, vs.head(0, 1), parameters)
    corrupted = model.run(pairs.tokens("corrupted"), capture=["layers.0.z"])
    patch = vs.Patch("layers.0.z[1]", source=corrupted["layers.0.z"][:, :, 1])
    marks, leans = random_runs.named_positions, []
    for edits in ([], [patch]):
        run = model.run(pairs.tokens("clean"), capture=["layers.*.pattern"], interventions=edits)
        for layer, head in ((1, 0), (2, 3)):
            seen = run[f"layers.{layer}.pattern"][:, head, -1]
            leans.append(
                seen[rows, marks["answer"]]
                - seen[rows, marks["distractor_first"]]
                - seen[rows, marks["distractor_last"]]
            )
    expected = (leans[0] - leans[2] + leans[1] - leans[3]) / 2
    assert float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_shifts_of_many_parts_take_one_sweep(random_runs: Runs) -> None:
    runs = Runs(random_runs.model, random_runs.contrast)
    named = {"movers": ["layers.2.z[2]"], "direction": "denoising"}
    wanted = [(part, named) for part in (vs.head(0, 0), vs.head(1, 1))]
    MOVES_ATTENTION.prepare(runs, wanted)
    spent = runs.cost
    assert spent.spent > 0
    for part, parameters in wanted:
        assert torch.isfinite(MOVES_ATTENTION.measure(runs, part, parameters)).all()
    assert runs.cost == spent


def test_the_one_inhibition_head_turns_the_mover_as_far_as_the_whole_corruption_does(known: Runs) -> None:
    def shift(direction: str) -> torch.Tensor:
        named = {"movers": [str(PARTS["mover"])], "direction": direction}
        return MOVES_ATTENTION.measure(known, PARTS["inhibition"], named).mean()

    whole = (lean(known, PARTS["mover"]) - lean(known, PARTS["mover"], "swap")).mean()
    assert float(whole) > 1.9
    torch.testing.assert_close(shift("noising"), whole, atol=0.02, rtol=0.01)
    # In the corrupted prompt S2 is the answer's token, so half the restored attention goes there.
    torch.testing.assert_close(shift("denoising"), whole / 2, atol=0.02, rtol=0.01)


# --- Prompts that lack named positions, and wrong input ----------------------------------------------------


def test_tasks_without_named_positions_are_described_by_the_roles_that_need_none() -> None:
    model = tiny.model("llama")
    pairs = tiny.pairs(6)
    pairs = replace(pairs, answer=torch.full((6,), 59), distractor=torch.full((6,), 60))
    runs = Runs(model, {"corrupted": pairs})
    heads = list(PARTS.values())
    found = described(Discovery.of(runs, [*heads, MLP]))
    assert set(found.scores[str(heads[0])]) == {"negative mover", "previous-token", "attention sink"}
    assert set(found.scores[str(MLP)]) == {"MLP writes toward the answer", "MLP writes toward the distractor"}


def test_an_induction_head_is_found_at_a_last_token_that_occurred_before() -> None:
    usual = Planted().pairs
    clean = usual.clean.clone()
    clean[:, 2] = handmade.END
    corrupted = clean.where(usual.clean == usual.corrupted, usual.corrupted)
    runs = Planted(data=replace(usual, clean=clean, corrupted=corrupted))
    assert positions(runs, "earlier_end").tolist() == [2] * runs.n
    runs.attend(PART, positions(runs, "end"), positions(runs, "earlier_end+1"), 0.8)
    runs.totals[PART] = BIG
    assert role_of(described(discovery(runs, PART)), PART) == "induction"


def test_a_place_that_a_prompt_lacks_is_refused_and_named() -> None:
    usual = Planted().pairs
    answer = usual.answer.clone()
    answer[3] = 39
    runs = Planted(data=replace(usual, answer=answer))
    assert not present(runs, "answer")
    with pytest.raises(PairsError, match=r"1 of 12 prompts have no 'answer' \(the answer\), the first is prompt 3"):
        positions(runs, "answer")


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    runs = Planted()
    with pytest.raises(UnknownNameError, match=r"unknown place 'subject'; known: answer, changed, changed_last, dist"):
        positions(runs, "subject")
    with pytest.raises(UnknownNameError, match=r"unknown relative place 'next'; known: previous, two back"):
        ATTENDS.measure(runs, PART, {"query": "every", "key": "next"})
    with pytest.raises(UnknownNameError, match=r"unknown quantity 'looks'; known: " + ", ".join(sorted(QUANTITIES))):
        quantity("looks")
    with pytest.raises(InputError, match=r"layers.1.mlp_out is not an attention head"):
        ATTENDS.measure(runs, MLP, {"query": "end", "key": "answer"})
    with pytest.raises(InputError, match=r"layers.2.z\[3\] cannot move the attention of layers.0.z\[1\]"):
        MOVES_ATTENTION.measure(runs, MOVER, {"movers": [str(PART)]})


def test_copying_needs_other_prompts_tokens() -> None:
    alone = Runs(handmade.random_model(), Planted().pairs.subset([0, 0]))
    with pytest.raises(PairsError, match="other prompts' answers and distractors, but there are none"):
        COPIES.measure(alone, PART, {"key": "answer"})

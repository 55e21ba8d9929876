"""Descriptions: recall roles on a network that recalls, claims without a role, and the way to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import handmade
import vesalius as vs
from handmade import PARTS, Planted, described
from vesalius.describe import (
    FITS,
    Description,
    Descriptions,
    Discovery,
    Prediction,
    causal,
    claims_of,
    describe_circuit,
)
from vesalius.errors import InputError, UnknownNameError
from vesalius.protocol import Claim
from vesalius.quantities import DIRECT_EFFECT, Runs
from vesalius.quantities.contrast import EMBED
from vesalius.quantities.places import positions
from vesalius.validate import check

# --- a network that recalls: what the prompts ask for stands in none of them

SUBJECTS, FACTS, FILLERS = range(2, 14), range(28, 40), (26, 27)
ABOUT = 60
"""First residual dimension of what is known about a subject before it is read out."""
READER, MOVER, WRITER = vs.head(0, 1), vs.head(1, 1), vs.head(1, 0)


@cache
def recalling(*, mover: float = 3.0, reader: float = 1.0) -> vs.Model:
    """Heads at the end: READER moves the subject to a place of its own, WRITER turns that into the fact; MOVER reads
    the subject and writes the fact at once."""
    build = handmade.Builder()
    for head in (READER, MOVER):
        build.look_at_s2(head.site)
        build.set(head.site, "v", {(subject, inner): 1.0 for inner, subject in enumerate(SUBJECTS)})
    build.set(READER.site, "o", {(ABOUT + inner, inner): reader for inner in range(12)})
    build.set(MOVER.site, "o", {(fact, inner): mover for inner, fact in enumerate(FACTS)})
    build.set(WRITER.site, "q", {(handmade.IS_END, 0): 60.0})
    build.set(WRITER.site, "k", {(handmade.IS_END, 0): 1.0})
    build.set(WRITER.site, "v", {(ABOUT + inner, inner): 1.0 for inner in range(12)})
    build.set(WRITER.site, "o", {(fact, inner): 3.0 for inner, fact in enumerate(FACTS)})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in build.net.transformer.h:
            for weight in (block.attn.c_attn.weight, block.attn.c_proj.weight):
                weight += 0.002 * torch.randn(weight.shape, generator=generator)
    return vs.Model(build.net)


def facts() -> vs.Pairs:
    """24 prompts in each split: other subjects, other templates."""
    rows: list[dict[str, Any]] = []
    for half, split in enumerate(("discovery", "validation")):
        for row in range(24):
            one, other = (6 * half + (row + step * (1 + row // 6)) % 6 for step in (0, 1))
            dots = [FILLERS[(row // (6 * 2**bit) + bit + half) % 2] for bit in range(5)]
            prompts = [[handmade.BOS, *dots[:5], 2 + subject, dots[0], handmade.END] for subject in (one, other)]
            rows.append({"clean": prompts[0], "corrupted": prompts[1], "answer": 28 + one, "distractor": 28 + other,
                         "template": f"{split} {row}", "split": split})  # fmt: skip
    columns = {key: torch.tensor([row[key] for row in rows]) for key in ("clean", "corrupted", "answer", "distractor")}
    groups = {"template": tuple(row["template"] for row in rows)}
    return vs.Pairs(**columns, groups=groups, splits=tuple(row["split"] for row in rows), corruption="subject")


@pytest.fixture(scope="module")
def known() -> Discovery:
    return Discovery.of(Runs(recalling(), facts().split("discovery")), (READER, WRITER, MOVER, vs.head(1, 3)))


def label_of(found: Descriptions, part: vs.Part) -> str | None:
    fit = found[part]
    return None if fit is None else fit.label


def test_the_network_recalls(known: Discovery) -> None:
    assert bool((known.runs.metric("clean") > 2).all())
    assert bool((known.runs.metric("subject") < -2).all())
    assert bool((known.runs.named_positions["answer"] < 0).all())


def test_recall_roles_are_found_where_they_are_built(known: Discovery) -> None:
    found = described(known)
    assert label_of(found, READER) == "subject reader"
    assert label_of(found, MOVER) == "attribute mover"
    # It looks at the end: what it writes matters, but no role says so.
    assert label_of(found, WRITER) is None
    assert label_of(found, vs.head(1, 3)) is None
    fit = found[MOVER]
    assert fit is not None
    assert fit.sentence.startswith("head 1.1 as attribute mover: attends from the last position to the subject's last")


def test_without_what_it_does_a_head_that_looks_at_the_subject_has_no_recall_role() -> None:
    data = facts().split("discovery")
    for changes, part in (({"mover": 0.0}, MOVER), ({"reader": 0.0}, READER), ({"mover": -3.0}, MOVER)):
        found = described(Discovery.of(Runs(recalling(**changes), data), (READER, WRITER, MOVER)))
        assert label_of(found, part) not in ("attribute mover", "subject reader"), changes


def test_recall_claims_hold_on_fresh_subjects(known: Discovery) -> None:
    claims = handmade.claims(known)
    assert sorted({claim.role for claim in claims if claim.role}) == ["attribute mover", "subject reader"]
    fresh = Runs(recalling(), facts().split("validation"))
    verdicts = vs.decide(claims, {claim.id: check(claim, runs=fresh) for claim in claims})
    assert [verdict.outcome for verdict in verdicts] == ["SUPPORTED"] * len(claims)


# --- the same roles planted by their ingredients

PART, BIG, DELTA = vs.head(0, 1), 1.0, 0.5
RECIPES: dict[str, list[Callable[[Planted], None]]] = {
    "attribute mover": [
        lambda runs: runs.attend(PART, positions(runs, "end"), positions(runs, "changed_last"), 0.8),
        lambda runs: runs.write(PART, BIG),
    ],
    "subject reader": [
        lambda runs: runs.attend(PART, positions(runs, "end"), positions(runs, "changed_last"), 0.8),
        lambda runs: runs.totals.update({PART: BIG}),
    ],
}


def recipe(plants: list[Callable[[Planted], None]], recalled: bool = True) -> Descriptions:
    pairs = handmade.pairs(12).split("discovery")
    if recalled:
        pairs = replace(pairs, answer=torch.full_like(pairs.answer, 38), distractor=torch.full_like(pairs.answer, 39))
    runs = Planted(data=pairs)
    for plant in plants:
        plant(runs)
    return described(replace(Discovery.of(runs, (PART,)), total=10.0, delta=DELTA))


@pytest.mark.parametrize("role", RECIPES)
def test_a_planted_recall_role_is_found_and_needs_each_ingredient(role: str) -> None:
    assert label_of(recipe(RECIPES[role]), PART) == role
    for missing in range(len(RECIPES[role])):
        rest = [plant for number, plant in enumerate(RECIPES[role]) if number != missing]
        found = recipe(rest)
        assert label_of(found, PART) != role
        assert found.scores[str(PART)][role] < FITS


@pytest.mark.parametrize(
    ("role", "wrong"),
    [("attribute mover", lambda runs: runs.write(PART, -BIG)), ("subject reader", lambda runs: runs.write(PART, BIG)),
     ("subject reader", lambda runs: runs.totals.update({PART: -BIG}))],
)  # fmt: skip
def test_a_recall_role_is_not_found_when_an_ingredient_is_wrong(role: str, wrong: Any) -> None:
    assert label_of(recipe([*RECIPES[role], wrong]), PART) != role


def test_recall_roles_are_not_tried_where_a_prompt_holds_the_answer() -> None:
    for plants in RECIPES.values():
        assert not set(RECIPES) & set(recipe(plants, recalled=False).scores[str(PART)])


# --- a claim without a role


def test_a_part_that_matters_is_described_without_a_role(known: Discovery) -> None:
    found = causal(known, WRITER)
    assert found is not None
    assert (found.label, len(found.predictions)) == ("", 1)
    assert found.sentence.startswith("head 1.0: giving it its corrupted value lowers the logit difference by ")
    ((claim, mean),) = claims_of(found, known)
    assert (claim.quantity, claim.role, claim.sign) == ("total_effect", None, 1)
    assert mean == pytest.approx(float(known.runs.effects([WRITER], "subject", "noising").mean()))
    assert claim.nulls == (("shuffled labels", claim.delta / 2),)
    assert claim.statement.startswith("head 1.0 is needed: giving it its corrupted value lowers the logit difference")


def test_without_a_role_a_part_may_work_against_the_answer_but_must_do_something() -> None:
    setting = Discovery.of(handmade.runs(handmade.network()), handmade.MEMBERS)
    against = causal(setting, PARTS["negative"])
    assert against is not None
    assert against.predictions[0].sign == -1
    assert "works against the answer" in against.predictions[0].statement
    assert causal(setting, PARTS["idle"]) is None
    # That the prompt is needed is no finding.
    assert causal(setting, EMBED) is None


def test_parts_are_called_what_people_call_them() -> None:
    subspace = vs.Subspace("layers.0.resid_post", torch.eye(3, 8), "plane")
    called = {vs.head(1, 2): "head 1.2", vs.neuron(3, 4): "neuron 3.4", vs.Unit(vs.Site("mlp_out", 5)): "MLP 5",
              EMBED: "embed", subspace: "layers.0.resid_post subspace plane"}  # fmt: skip
    assert {part: Description(part, "", ()).called for part in called} == called


# --- JSON


def round_trip(data: dict[str, Any]) -> Any:
    """As artefacts of a study are kept: text with sorted keys."""
    return json.loads(json.dumps(data, sort_keys=True))


def test_a_description_survives_json(known: Discovery) -> None:
    circuit = describe_circuit(known, known.members, 6)
    plain = causal(known, WRITER)
    assert plain is not None
    fits = [fit for fit in described(known).fits.values() if fit is not None]
    for made in (circuit, plain, *fits, Description(MOVER, "mine", (), "; a note", "the head")):
        back = Description.from_json(round_trip(made.to_json()))
        assert back == made
        assert (back.sentence, back.score, back.part) == (made.sentence, made.score, made.part)
        assert claims_of(back, known) == claims_of(made, known)


def test_a_description_of_a_direction_is_read_back_with_the_direction_or_its_numbers() -> None:
    prediction = Prediction("total_effect", {}, 1.0, 0.9, "does", "is said to do", 1, 0.5, 10.0, (("null", 0.1),))
    vector = torch.randn(8, generator=torch.Generator().manual_seed(0))
    made = Description(vs.Direction("layers.0.resid_post", vector, "mine"), "axis", (prediction,))
    kept = round_trip(made.to_json())
    assert Description.from_json(kept, vs.Direction("layers.0.resid_post", vector, "mine")) == made
    assert prediction == Description.from_json(kept, made.part).predictions[0]
    kept["part"]["sha256"] = "0" * 64
    with pytest.raises(InputError, match="give the direction, or its numbers as a tensor"):
        Description.from_json(kept)


def test_descriptions_survive_json_with_their_order(known: Discovery) -> None:
    found = described(known)
    claims = handmade.claims(known)
    made = replace(found, claims=claims, estimates={claim.id: 0.1 * n for n, claim in enumerate(claims)})
    back = Descriptions.from_json(round_trip(made.to_json()))
    assert back == made
    assert list(back.fits) == list(made.fits) == [str(member) for member in known.members]
    assert [list(scores) for scores in back.scores.values()] == [list(scores) for scores in made.scores.values()]
    assert all(isinstance(claim, Claim) for claim in back.claims)
    assert [claim.id for claim in back.claims] == [claim.id for claim in claims]
    assert back[WRITER] is None
    with pytest.raises(UnknownNameError, match=r"unknown member 'layers.7.z\[0\]'; known: layers.0.z\[1\], "):
        _ = back[vs.head(7, 0)]


def test_a_description_shows_in_a_notebook_with_its_sentence() -> None:
    made = Description(MOVER, "<b>", (), " & more")
    assert made._repr_html_() == "<p>head 1.1 as &lt;b&gt;:  &amp; more.</p>"
    assert not made.fits


def test_a_planted_direct_effect_is_what_the_quantity_measures() -> None:
    """What roles are planted with is itself planted rightly."""
    runs = Planted()
    assert float(DIRECT_EFFECT.measure(runs, PART, {}).abs().max()) == 0.0
    runs.write(PART, -0.7)
    torch.testing.assert_close(DIRECT_EFFECT.measure(runs, PART, {}), torch.full((12,), -0.7), atol=1e-4, rtol=0)
    assert float(DIRECT_EFFECT.measure(runs, vs.head(0, 2), {}).abs().max()) == 0.0

"""Quantities on contrasts and on texts: activations against plain runs, other metrics, and a quantity of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import handmade
import patching
import tiny
import vesalius as vs
from handmade import PARTS
from vesalius.circuits import component_effects, find_circuit
from vesalius.describe import (
    ROLES,
    WHERE_IT_ACTS,
    Discovery,
    causal,
    claim_about,
    claims_of,
    describe,
    describe_circuit,
)
from vesalius.errors import InputError, PairsError, UnknownNameError
from vesalius.quantities import (
    ACTIVATION,
    DIRECT_EFFECT,
    EFFECT_AT,
    QUANTITIES,
    TOTAL_EFFECT,
    Contrast,
    Parameters,
    PerExample,
    Quantity,
    Runs,
)
from vesalius.quantities.base import PROBABILITY
from vesalius.quantities.contrast import EMBED
from vesalius.quantities.places import positions
from vesalius.studies.answer import _named
from vesalius.validate import check, prepare

FAMILIES = sorted(tiny.FAMILIES)
NEURON = vs.neuron(1, 5)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def corpus() -> vs.Corpus:
    """More texts than run together, of unequal lengths."""
    documents = tuple(f"d{row // 2}" for row in range(40))
    splits = ("discovery",) * 20 + ("validation",) * 20
    return vs.Corpus(tiny.pairs(40).tokens("clean"), groups={"document": documents}, splits=splits, name="texts")


# --- activations


def neuron_of(model: vs.Model, tokens: vs.Tokens) -> Tensor:
    return model.run(tokens, capture=["layers.1.mlp_post"])["layers.1.mlp_post"][..., 5]


def pooled(values: Tensor, real: Tensor, at: str) -> Tensor:
    each = [row[mask] for row, mask in zip(values, real, strict=True)]
    return torch.stack([row.max() if at == "max" else row.mean() for row in each])


@pytest.mark.parametrize("at", ["max", "mean"])
def test_the_activation_on_texts_is_that_of_plain_runs(model: vs.Model, corpus: vs.Corpus, at: str) -> None:
    runs = Runs(model, corpus)
    found = ACTIVATION.measure(runs, NEURON, {"at": at})
    tokens = corpus.tokens
    # The first token of a text is an outlier in language models, and does not count.
    counts = tokens.real & (torch.arange(tokens.ids.shape[1]) > 0)
    torch.testing.assert_close(found, pooled(neuron_of(model, tokens), counts, at), atol=1e-5, rtol=1e-4)
    assert ACTIVATION.scale_of(runs, NEURON, {"at": at}) == pytest.approx(float(found.std()))
    direction = vs.Direction("layers.0.resid_post", torch.randn(48, generator=torch.Generator().manual_seed(1)))
    stream = model.run(tokens, capture=["layers.0.resid_post"])["layers.0.resid_post"]
    expected = pooled(stream @ direction.vector, counts, at)
    torch.testing.assert_close(ACTIVATION.measure(runs, direction, {"at": at}), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("at", ["end", "changed", "max", "mean"])
def test_the_activation_on_a_contrast_is_that_of_its_clean_prompts(model: vs.Model, at: str) -> None:
    pairs = tiny.pairs(20)
    values, rows = neuron_of(model, pairs.tokens("clean")), torch.arange(20)
    where = {"end": pairs.at, "changed": pairs.differs.int().argmax(1)}
    expected = values[rows, where[at]] if at in where else pooled(values, pairs.real, at)
    torch.testing.assert_close(ACTIVATION.measure(Runs(model, pairs), NEURON, {"at": at}), expected)


def test_activations_of_many_parts_take_one_pass(model: vs.Model, corpus: vs.Corpus) -> None:
    runs, parts = Runs(model, corpus), [vs.neuron(1, index) for index in range(6)]
    wanted: list[tuple[vs.Part, Parameters]] = [(part, {"at": "mean"}) for part in parts]
    wanted.append((vs.neuron(0, 0), {"at": "mean", "control": {"parts": ["layers.2.mlp_post[1]"]}}))
    calls = []
    # Before it, because a pass ends at the last site that is read.
    hook = model.module.register_forward_pre_hook(lambda *_: calls.append(1))
    ACTIVATION.prepare(runs, wanted)
    assert len(calls) == 3  # 40 texts, 16 at a time
    for part in (*parts, vs.neuron(0, 0), vs.neuron(2, 1)):
        assert torch.isfinite(ACTIVATION.measure(runs, part, {"at": "mean"})).all()
    assert len(calls) == 3
    hook.remove()


def test_what_has_no_one_activation_is_refused(model: vs.Model, corpus: vs.Corpus) -> None:
    with pytest.raises(InputError, match=r"layers.0.mlp_out has many numbers at each position, and no one activation"):
        ACTIVATION.measure(Runs(model, corpus), vs.Unit(vs.Site("mlp_out", 0)), {})
    with pytest.raises(UnknownNameError, match="unknown place to read an activation at 'end'; known: max, mean"):
        ACTIVATION.measure(Runs(model, corpus), NEURON, {"at": "end"})
    with pytest.raises(PairsError, match="prompts have no 'distractor_last'"):
        ACTIVATION.measure(Runs(model, tiny.pairs()), NEURON, {"at": "distractor_last"})
    with pytest.raises(InputError, match=r"measured on pairs of prompts, clean and corrupted; got Corpus\(texts, 40"):
        TOTAL_EFFECT.measure(Runs(model, corpus), NEURON, {})


def test_a_claim_about_an_activation_is_made_and_checked_on_texts(
    model: vs.Model, corpus: vs.Corpus, tmp_path: Path
) -> None:
    with vs.Ledger(tmp_path / "ledger.sqlite") as ledger:
        runs = Runs(model, ledger.open(corpus, "discovery"))
        claim = claim_about(runs, NEURON, "activation", {"at": "max"}, members=[vs.neuron(1, 6)])
        found = ACTIVATION.measure(runs, NEURON, {"at": "max"})
        assert (claim.kind, claim.unit, claim.scale_name) == ("predictive", "activation", "standard deviation")
        assert claim.scale == pytest.approx(float(found.std()))
        assert claim.delta == pytest.approx(abs(float(found.mean())) / 2)
        assert (claim.condition, claim.parents, claim.n) == ({}, (corpus.split("discovery").content_hash,), 20)
        assert len(claim.control["parts"]) == 8
        assert not {str(NEURON), "layers.1.mlp_post[6]"} & set(claim.control["parts"])
        family = ledger.register([claim])
        fresh = ledger.open(corpus, "validation")
        evidence = check(claim, model=model, data=fresh)
        # A text's first token, an outlier in most models, does not count.
        later = fresh.tokens.real & (torch.arange(fresh.tokens.real.shape[1]) > 0)
        expected = pooled(neuron_of(model, fresh.tokens), later, "max")
        assert evidence.effects == pytest.approx(expected.tolist(), abs=1e-5)
        assert evidence.groups == {"document": fresh.groups["document"]}
        assert (evidence.example_hashes, evidence.data_hash) == (fresh.example_hashes, fresh.content_hash)
        controls = Runs(model, fresh)
        each = [ACTIVATION.measure(controls, vs.Unit(vs.Site.parse(name)), {}) for name in claim.control["parts"]]
        assert evidence.control == pytest.approx(torch.stack(each).mean(0).tolist(), abs=1e-5)
        ledger.append(evidence)
        assert ledger.verdicts(family)[0].n == 20


# --- another metric


answer_logit = vs.Metric("answer_logit", "logits", vs.Needs(tokens="answer"), lambda logits, _, __: logits[:, 0])


def plainly(metric: vs.Metric, logits: Tensor, pairs: vs.Pairs) -> Tensor:
    last = logits[torch.arange(len(pairs)), pairs.at]
    scored = last if metric.name == "answer_logit" else last.log_softmax(-1)
    return scored[torch.arange(len(pairs)), pairs.answer]


@pytest.mark.parametrize("metric", [vs.answer_logprob, answer_logit], ids=lambda metric: metric.name)
def test_effects_are_on_the_metric_of_the_contrast(model: vs.Model, metric: vs.Metric) -> None:
    pairs = tiny.pairs()
    runs = Runs(model, Contrast.of(pairs, metric))
    clean, corrupted = (model.run(pairs.tokens(which)) for which in ("clean", "corrupted"))
    scores = [plainly(metric, run.logits, pairs) for run in (clean, corrupted)]
    torch.testing.assert_close(runs.metric("clean"), scores[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(runs.total("corrupted"), scores[0] - scores[1], atol=1e-4, rtol=1e-4)
    part = vs.head(0, 2)
    values = patching.values(model, pairs.tokens("corrupted"))
    logits = patching.forward(model, pairs.tokens("clean"), {part.site: values[part.site]})
    expected = scores[0] - plainly(metric, logits, pairs)
    torch.testing.assert_close(TOTAL_EFFECT.measure(runs, part, {}), expected, atol=1e-4, rtol=1e-4)
    assert TOTAL_EFFECT.unit(runs) == metric.unit
    torch.testing.assert_close(
        runs.effects([EMBED], "corrupted", "noising")[0], runs.total("corrupted"), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("place", ["end", "changed_last", "first"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_effect_at_a_place_is_that_of_plain_runs_with_one_edit(model: vs.Model, place: str, direction: str) -> None:
    """Prompts of unequal lengths, whose places lie at different positions."""
    runs = Runs(model, Contrast.of(tiny.pairs(8), vs.answer_logprob), seed=1)
    at, pairs = positions(runs, place), runs.pairs
    sides = [pairs.tokens("clean"), pairs.tokens("corrupted")]
    base, other = sides if direction == "noising" else sides[::-1]
    for part in (vs.head(0, 1), vs.Unit(vs.Site("mlp_out", 1))):
        given = model.run(other, capture=[part.writes[0].whole])
        edit = vs.Patch(part, source=given.activations, positions=at)
        metric = [plainly(vs.answer_logprob, model.run(base, interventions=e).logits, pairs) for e in ([], [edit])]
        expected = (metric[0] - metric[1]) * (1 if direction == "noising" else -1)
        parameters = {"place": place, "direction": direction}
        found = EFFECT_AT.measure(runs, part, parameters)
        assert torch.allclose(found.double(), expected.double(), atol=1e-5)
        whole = TOTAL_EFFECT.measure(runs, part, {"direction": direction})
        assert torch.allclose(EFFECT_AT.nulls(runs, part, parameters)["elsewhere"], whole - found, atol=1e-6)


def test_members_without_a_role_are_said_to_act_where_they_act() -> None:
    runs = handmade.runs(handmade.network())
    members = (PARTS["previous"], PARTS["inhibition"], PARTS["mover"])
    discovery = Discovery.of(runs, members)
    bare = describe(discovery, [], otherwise=WHERE_IT_ACTS)
    assert bare[PARTS["mover"]] is not None and bare[PARTS["mover"]].label == "acts at the last position"
    role = describe(discovery, ROLES, otherwise=WHERE_IT_ACTS)[PARTS["mover"]]
    assert role is not None and role.label == "name mover"  # a role that fits goes before
    (both,) = claims_of(bare[PARTS["mover"]], discovery)
    fresh = handmade.runs(handmade.network(), "validation")
    evidence = check(both[0], runs=fresh)
    assert vs.decide([both[0]], {both[0].id: evidence})[0].outcome == "SUPPORTED"


def test_a_circuit_is_found_described_and_checked_on_another_metric() -> None:
    data = handmade.pairs()
    runs, fresh = (
        Runs(handmade.network(), Contrast.of(data.split(split), vs.answer_logprob))
        for split in ("discovery", "validation")
    )
    circuit = find_circuit(runs, component_effects(runs))
    assert {EMBED, PARTS["inhibition"], PARTS["mover"]} <= set(circuit.members) <= {EMBED, *handmade.MEMBERS}
    discovery = Discovery.of(runs, circuit.members)
    assert discovery.total == pytest.approx(float(runs.total("swap").mean()))
    claims = [
        claim
        for description in (
            describe_circuit(discovery, circuit.members, 10), *(causal(discovery, part) for part in circuit.members)
        )
        if description is not None
        for claim, _ in claims_of(description, discovery)
    ]  # fmt: skip
    assert len(claims) == 2 + len(circuit.members) - 1
    assert {claim.unit for claim in claims} == {"nats"}
    assert "the metric (answer_logprob)" in claims[-1].statement
    prepare(claims, fresh)
    verdicts = vs.decide(claims, {claim.id: check(claim, runs=fresh) for claim in claims})
    assert {verdict.outcome for verdict in verdicts} == {"SUPPORTED"}


def test_a_direct_effect_is_on_the_logit_difference_alone_and_roles_that_need_one_are_not_tried() -> None:
    runs = Runs(handmade.network(), Contrast.of(handmade.pairs().split("discovery"), vs.answer_logprob))
    why = "a direct effect is on the logit difference, not on answer_logprob"
    assert DIRECT_EFFECT.refuses(runs, PARTS["mover"]) == why
    with pytest.raises(InputError, match=f"direct_effect of .* cannot be measured: {why}"):
        claim_about(runs, PARTS["mover"], DIRECT_EFFECT)
    found = handmade.described(Discovery.of(runs, tuple(PARTS.values())))
    tried = {label for scores in found.scores.values() for label in scores}
    assert tried == {"duplicate-token", "previous-token", "induction"}


def test_of_answers_of_several_tokens_only_roles_that_can_be_measured_are_tried() -> None:
    pairs = handmade.pairs().split("discovery")
    answer, distractor = (torch.stack([label, label.flip(0)], 1) for label in (pairs.answer, pairs.distractor))
    runs = Runs(handmade.network(), replace(pairs, clean=pairs.clean[:, :8], corrupted=pairs.corrupted[:, :8],
                lengths=None, read=None, answer=answer, distractor=distractor))  # fmt: skip
    members = (PARTS["mover"], PARTS["previous"])
    found = handmade.described(Discovery.of(runs, members))
    tried = {label for scores in found.scores.values() for label in scores}
    assert "previous-token" in tried
    assert not {"name mover", "copy suppression", "negative mover"} & tried


# --- a quantity of one's own


class EndNorm(Quantity):
    """Size of a head's values at the last position."""

    name = "end_norm"
    kind = "predictive"
    scale = PROBABILITY

    def unit(self, runs: Runs) -> str:
        return "size"

    def refuses(self, runs: Runs, part: vs.Part) -> str:
        return "" if part.writes[0].kind == "z" else f"{part} is no head"

    def measure(self, runs: Runs, part: vs.Part, parameters: Parameters) -> PerExample:
        values = part.value(runs.run("clean", [part]))[torch.arange(runs.n), runs.pairs.at]
        return values.norm(dim=-1) ** float(parameters.get("power", 1))

    def nulls(self, runs: Runs, part: vs.Part, parameters: Parameters) -> dict[str, PerExample]:
        return {"nothing": torch.zeros(runs.n)}


def test_a_quantity_of_ones_own_is_claimed_and_checked_by_its_entry_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, mover, network = handmade.pairs(), PARTS["mover"], handmade.network()
    with pytest.raises(UnknownNameError, match="unknown quantity 'end_norm'; known: activation, attends"):
        claim_about(Runs(network, pairs.split("discovery")), mover, "end_norm")
    monkeypatch.setitem(QUANTITIES, "end_norm", EndNorm())
    with vs.Ledger(tmp_path / "ledger.sqlite") as ledger:
        runs = Runs(network, ledger.open(pairs, "discovery"))
        claim = claim_about(runs, mover, "end_norm", {"power": 2}, study="mine", n=36)
        assert claim == claim_about(runs, str(mover), EndNorm(), {"power": 2}, study="mine", n=36)
        assert (claim.quantity, claim.unit, claim.parameters) == ("end_norm", "size", {"power": 2})
        assert claim.nulls == (("nothing", claim.delta / 2),)
        assert claim.condition == {"corruption": "swap"}
        family = ledger.register([claim], study="mine")
        fresh = Runs(network, ledger.open(pairs, "validation"))
        prepare(family.claims, fresh)
        evidence = check(claim, runs=fresh)
        ledger.append(evidence)
        outcome: Any = ledger.verdicts(family)[0]
    run = network.run(fresh.pairs.tokens("clean"), capture=["layers.1.z"])
    norms = run["layers.1.z"][torch.arange(36), fresh.pairs.at].norm(dim=-1) ** 2
    assert evidence.effects == pytest.approx(norms[:, 0].tolist(), rel=1e-4)
    assert evidence.control is not None and len(claim.control["parts"]) == 7
    assert evidence.nulls == {"nothing": (0.0,) * 36}
    assert (outcome.outcome, outcome.n) == ("SUPPORTED", 36)
    with pytest.raises(InputError, match=r"end_norm of layers.0.mlp_out cannot be measured: .* is no head"):
        claim_about(runs, "layers.0.mlp_out", "end_norm")
    with pytest.raises(InputError, match=r"end_norm of layers.0.mlp_out cannot be measured: .* is no head"):
        check(replace(claim, subject=vs.Unit(vs.Site("mlp_out", 0)).ref), runs=fresh)


@pytest.mark.parametrize(
    ("role", "members", "expected"),
    [
        ("name mover", ["layers.17.z[3]"], "1 name mover (17.3)"),
        ("MLP writes toward the answer", ["layers.2.mlp_out"] * 2, "2 MLPs writing toward the answer (2, 2)"),
        ("acts at the last position", ["layers.2.z[1]"], "1 part acting at the last position (2.1)"),
    ],
)
def test_roles_are_counted_in_plain_english(role: str, members: list[str], expected: str) -> None:
    assert _named(role, members) == expected

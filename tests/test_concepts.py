"""Concepts: closed forms of SAEBench's metrics, loops that do the same, toy data in which the answer was planted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vesalius as vs
from planted_features import draw, unit
from vesalius.concepts import (
    Readings,
    absorption,
    read_concept,
    sparse_probing,
    spurious_removal,
    targeted_perturbation,
)
from vesalius.concepts.ablation import ablated, perturbation_score, removal_score
from vesalius.concepts.absorption import AlongDirection, absorbed_fraction
from vesalius.concepts.scores import line_of_texts
from vesalius.concepts.sparse import balanced, one_vs_rest, ranked
from vesalius.data import Labelled
from vesalius.dictionaries import Dictionary, TrainConfig, train
from vesalius.errors import InputError, UnknownNameError
from vesalius.site import Site

SITE = Site("module", module="tensor0")


def coder(decoder: Tensor, encoder: Tensor | None = None, b_enc: Tensor | None = None, **changes: Any) -> Dictionary:
    n, width = decoder.shape
    fields: dict[str, Any] = {
        "activation": "relu", "in_sites": (SITE,), "out_sites": (SITE,),
        "encoders": ((decoder if encoder is None else encoder).T.contiguous(),), "decoders": (decoder,),
        "b_enc": torch.zeros(n) if b_enc is None else b_enc, "b_dec": (torch.zeros(width),),
    }  # fmt: skip
    return Dictionary(**{**fields, **changes})


def concept(labels: Sequence[Any], name: str = "set", **more: Any) -> Labelled:
    return Labelled(name, tuple(f"text {number}" for number in range(len(labels))), tuple(labels), **more)


# Closed forms


@pytest.mark.parametrize(
    ("projection", "main", "absorbing", "wanted"),
    [(1, 0.3, 0.5, 0.625), (1, 0, 0.5, 1.0), (1, 0.3, 0.39, 0.0), (1, 1.0, 0.5, 0.0), (1, 0.8, 0.5, 0.2),
     (-1, -2, 0.5, 0.0), (0, -0.1, 1, 0.0), (2, -0.5, 0.8, 1.0)],
)  # fmt: skip
def test_the_closed_forms_of_absorption(projection: float, main: float, absorbing: float, wanted: float) -> None:
    assert absorbed_fraction(projection, main, absorbing) == pytest.approx(wanted, abs=1e-12)


def test_the_closed_forms_of_removal_and_perturbation() -> None:
    assert removal_score(0.75, base=0.6, oracle=0.9) == pytest.approx(0.5)
    assert removal_score(0.95, base=0.6, oracle=0.9) > 1
    assert removal_score(0.5, base=0.6, oracle=0.9) < 0
    assert removal_score(0.75, base=0.9, oracle=0.9005) == 0.0
    clean = dict.fromkeys("abc", 0.9)
    found = perturbation_score(clean, {"a": {"a": 0.6, "b": 0.88, "c": 0.88}})
    assert found == pytest.approx({"a": 0.28})


def one_text(values: Any, decoder: Any, x: Any, d: Any, own: Sequence[int]) -> tuple[float, bool]:
    """Fraction and full absorption of one text, latent after latent."""
    length = lambda row: sum(v * v for v in row) ** 0.5  # noqa: E731
    dot = lambda a, b: sum(p * q for p, q in zip(a, b, strict=True))  # noqa: E731
    projection = dot(x, d)
    cosines = [dot(row, d) / length(row) for row in decoder]
    carried = [value * length(row) * cosine for value, row, cosine in zip(values, decoder, cosines, strict=True)]
    main = sum(carried[latent] for latent in own)
    others = sorted(
        (carried[n] for n in range(len(values)) if n not in own and cosines[n] >= 0.1 and carried[n] > 0), reverse=True
    )
    absorbing = sum(others[:3])
    if projection <= 0 or main >= projection or absorbing / projection < 0.4:
        fraction = 0.0
    elif main <= 0:
        fraction = 1.0
    else:
        m = min(absorbing, projection - main)
        fraction = m / (m + main)
    top = max(range(len(values)), key=carried.__getitem__)
    silent = all(abs(values[latent]) < 1e-8 for latent in own)
    return fraction, silent and cosines[top] >= 0.025 and projection > 0 and carried[top] / projection >= 0.4


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_absorption_of_many_texts_is_that_of_each_alone(seed: int, n_own: int) -> None:
    rng = np.random.default_rng(seed)
    decoder, d = rng.normal(size=(9, 4)), rng.normal(size=4)
    d /= np.linalg.norm(d)
    values = rng.random((6, 9)) * (rng.random((6, 9)) < 0.4)
    x = values @ decoder + 0.1 * rng.normal(size=(6, 4))
    along = decoder @ d
    own = rng.permutation(9)[:n_own]
    found = AlongDirection(values, values * along, along / np.linalg.norm(decoder, axis=1), x @ d, own)
    wanted = [one_text(*row, d, own.tolist()) for row in zip(values, [decoder] * 6, x, strict=True)]
    assert found.fractions().tolist() == pytest.approx([fraction for fraction, _ in wanted])
    assert found.full().tolist() == [full for _, full in wanted]


# Absorption on toy data (Chanin et al. 2024, section 3): four orthogonal features in 50 dimensions


BASIS = torch.linalg.qr(torch.randn(50, 50, generator=draw(0))).Q
TOY = TrainConfig(kind="relu", n_latents=4, sparsity=1.0, batch_size=256, steps=900, lr=3e-3, dead="none")


def toy(n: int, hierarchical: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Which of four features are there, and rows. hierarchical: the second only where the first is."""
    generator = draw(seed)
    there = torch.rand(n, 4, generator=generator) < torch.tensor([0.25, 0.2, 0.2, 0.2])
    if hierarchical:
        there[:, 1] = there[:, 0] & (torch.rand(n, generator=generator) < 0.4)
    return there, there.float() @ BASIS[:4]


@pytest.fixture(scope="module")
def toys() -> dict[bool, Dictionary]:
    return {way: train(toy(20_000, way, 1)[1], TOY) for way in (False, True)}  # type: ignore[misc]


@pytest.mark.slow
def test_independent_features_are_found_one_by_one(toys: dict[bool, Dictionary]) -> None:
    cosines = torch.nn.functional.normalize(toys[False].W_dec, dim=1) @ BASIS[:4].T
    order = cosines.argmax(0)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert torch.allclose(cosines[order], torch.eye(4), atol=0.05)


def along_parent(dictionary: Dictionary, hierarchical: bool) -> tuple[AlongDirection, np.ndarray]:
    """Texts with the first feature, along it; and which of them have the second. Its own latent is the nearest one."""
    there, rows = toy(3000, hierarchical, 2)
    rows, child = rows[there[:, 0]], there[there[:, 0], 1].numpy()
    decoder = dictionary.W_dec.double().numpy()
    d = BASIS[0].double().numpy()
    along = decoder @ d
    cosine = along / np.linalg.norm(decoder, axis=1)
    values = dictionary.encode(rows).double().numpy()
    return AlongDirection(values, values * along, cosine, rows.double().numpy() @ d, np.array([cosine.argmax()])), child


@pytest.mark.slow
def test_a_feature_inside_another_absorbs_it_and_an_independent_one_does_not(toys: dict[bool, Dictionary]) -> None:
    found, child = along_parent(toys[True], True)
    assert not found.firing()[child].any()
    assert found.firing()[~child].all()
    assert found.fractions()[child].mean() > 0.95
    assert found.fractions()[~child].mean() < 0.05
    assert found.full()[child].mean() > 0.95
    merged = torch.nn.functional.normalize(toys[True].W_dec, dim=1) @ BASIS[:2].T
    both = merged[merged.min(1).values.argmax()]
    assert both.tolist() == pytest.approx([0.707, 0.707], abs=0.05)
    independent, _ = along_parent(toys[False], False)
    assert independent.firing().all()
    assert independent.fractions().max() < 0.05
    assert not independent.full().any()


def family(n: int = 1200, children: int = 5, share: float = 0.04) -> tuple[Labelled, Tensor, Tensor]:
    """A parent in half of the texts, five children each in 4 % of those; concept, rows, number of the child or -1."""
    generator = draw(3)
    parent = torch.arange(n) % 2 == 0
    lot = torch.rand(n, generator=generator)
    child = torch.where(parent & (lot < children * share), (lot / share).long(), -1)
    rows = parent[:, None] * BASIS[0]
    for number in range(children):
        rows = rows + (child == number)[:, None] * BASIS[1 + number]
    rows = rows + 0.3 * (torch.rand(n, 3, generator=generator) < 0.3).float() @ BASIS[10:13]
    return concept(["parent" if flag else "none" for flag in parent]), rows, child


def family_coder(absorbing: bool) -> Dictionary:
    """A latent for the parent and one per child. absorbing: the parent's is silent with a child, which writes both."""
    parent, children = BASIS[0], BASIS[1:6]
    if not absorbing:
        return coder(torch.cat([parent[None], children]))
    decoder = torch.cat([parent[None], children + parent])
    encoder = torch.cat([(parent - 2 * children.sum(0))[None], children])
    return coder(decoder, encoder)


def test_absorption_is_measured_end_to_end_with_decoder_rows_of_any_norm() -> None:
    labelled, rows, child = family()
    readings = Readings.of([family_coder(True), family_coder(False)], labelled, rows, test=0.4)
    found = absorption(readings)
    tested = [number for number in readings.halves[1] if labelled.labels[number] == "parent"]
    share = float((child[tested] >= 0).double().mean())
    assert 0.1 < share < 0.3
    assert found["fraction"].values == pytest.approx((share, 0.0), abs=1e-6)
    assert found["full"].values == pytest.approx((share, 0.0), abs=1e-6)
    assert found["own latents fire"].values == pytest.approx((1 - share, 1.0))
    assert found["own latents"].values == (1.0, 1.0)
    assert found["probe"].value == 1.0
    assert found["fraction"].spread == pytest.approx(share / 2**0.5)
    assert found.n_test == len(tested)


def test_a_dictionary_without_a_latent_for_the_concept_absorbs_nothing_and_that_is_seen() -> None:
    labelled, rows, _ = family()
    found = absorption(Readings.of([coder(BASIS[10:16], b_enc=torch.full((6,), -0.1))], labelled, rows))
    assert found["fraction"].value == 0.0
    assert found["own latents fire"].value < 0.9
    assert "without a latent for the concept there is nothing to absorb" in found.note


# Sparse probing


def two_concepts(n: int = 240) -> tuple[Labelled, Tensor]:
    """Texts of a class, of which one direction tells; many others vary more."""
    generator = draw(1)
    inside = torch.arange(n) % 3 == 0
    noise = 3 * torch.randn(n, 20, generator=generator) @ BASIS[:20, :]
    noise = noise - (noise @ BASIS[30])[:, None] * BASIS[30]
    rows = noise + inside[:, None] * BASIS[30] * 2
    return concept(["yes" if flag else "no" for flag in inside]), rows


def test_a_latent_that_is_the_concept_tells_it_alone_and_random_ones_do_not() -> None:
    labelled, rows = two_concepts()
    good = coder(torch.cat([BASIS[30:31], unit(30, 50, 3)]), b_enc=torch.full((31,), -0.5))
    found = sparse_probing(Readings.of([good, coder(unit(31, 50, 4))], labelled, rows))
    assert found["latents", 1].values[0] == 1.0
    assert found["latents", 1].values[1] < 0.75
    assert found["latents", 1].spread == pytest.approx((1.0 - found["latents", 1].values[1]) / 2**0.5)
    assert found["activations"].value > 0.9
    assert found["coordinates", 1].value < 0.8
    assert [line.k for line in found.lines] == [1, 2, 5, 1, 2, 5, None, None]
    low, high = found["latents", 5].low, found["latents", 5].high
    assert low is not None and high is not None and low <= found["latents", 5].value <= high


def test_latents_are_chosen_by_training_texts_alone() -> None:
    labelled, rows = two_concepts()
    readings = Readings.of([coder(unit(40, 50, 4))], labelled, rows)
    (task,) = one_vs_rest(readings)
    values = readings.latents[0]
    inside = task.inside[task.train]
    apart = [
        abs(float(values[task.train][inside, j].mean() - values[task.train][~inside, j].mean())) for j in range(40)
    ]
    assert ranked(values, task)[:5].tolist() == sorted(range(40), key=lambda j: -apart[j])[:5]
    changed = values.copy()
    changed[task.test] = 1e6 * np.random.default_rng(0).random((len(task.test), 40))
    assert ranked(changed, task).tolist() == ranked(values, task).tolist()


def test_classes_are_balanced_so_that_guessing_is_right_half_the_time() -> None:
    inside = np.arange(100) < 13
    kept = balanced(np.arange(100), inside, 0)
    assert inside[kept].sum() == 13 and len(kept) == 26
    labelled, rows = two_concepts()
    noise = sparse_probing(Readings.of([coder(unit(8, 50))], labelled, torch.randn(rows.shape, generator=draw(9))))
    assert abs(noise["activations"].value - 0.5) < 0.15


def test_of_several_labels_each_is_told_from_the_others() -> None:
    labels = [f"c{number % 3}" for number in range(180)]
    rows = torch.eye(50)[[number % 3 for number in range(180)]] + 0.05 * torch.randn(180, 50, generator=draw(0))
    found = sparse_probing(Readings.of([coder(torch.eye(50))], concept(labels), rows), ks=(1,))
    assert found["latents", 1].parts == {"c0": 1.0, "c1": 1.0, "c2": 1.0}


def test_texts_of_a_group_are_on_one_side_and_intervals_know_them() -> None:
    labelled, rows = two_concepts()
    grouped = Labelled("set", labelled.texts, labelled.labels, tuple(str(number // 6) for number in range(240)))
    readings = Readings.of([coder(unit(31, 50, 4))], grouped, rows)
    training, testing = readings.halves
    assert {grouped.groups[n] for n in training} & {grouped.groups[n] for n in testing} == set()
    alone = line_of_texts("m", "", [np.array([1.0, 0.0] * 20)], [str(n) for n in range(40)])
    together = line_of_texts("m", "", [np.array([1.0, 0.0] * 20)], ["a", "b"] * 20)
    assert alone.high is not None and together.high is not None
    assert together.high - together.value > alone.high - alone.value
    assert line_of_texts("m", "", [np.ones(40)], ["a", "b"] * 20).low == pytest.approx(0.912, abs=0.001)  # never 1 +- 0


class Own:
    """A coder of somebody else's: it only encodes, and says what its latents add."""

    in_sites = out_sites = (SITE,)
    content_hash = ""

    def __init__(self, dictionary: Dictionary) -> None:
        self.n_latents, self._dictionary = dictionary.n_latents, dictionary

    def encode(self, x: Tensor, latents: Sequence[int] | None = None) -> Tensor:
        return self._dictionary.encode(x, latents)

    def decoder_rows(self, site: Site | str | None = None) -> Tensor:
        return self._dictionary.W_dec

    def latent(self, index: int) -> Any:
        raise NotImplementedError


def test_the_metrics_take_any_coder_that_encodes_and_says_what_its_latents_add() -> None:
    labelled, rows = biased()
    dictionary = coder(torch.cat([BASIS, -BASIS]))
    for metric in (sparse_probing, absorption, spurious_removal):
        ours, theirs = (metric(Readings.of([one], labelled, rows)) for one in (dictionary, Own(dictionary)))
        assert ours == theirs


def test_a_score_per_text_is_a_measurement_with_one_value_per_text() -> None:
    labelled, rows = two_concepts()
    readings = Readings.of([coder(unit(31, 50, 4)), coder(unit(31, 50, 5))], labelled, rows)
    line = sparse_probing(readings)["latents", 5]
    (task,) = one_vs_rest(readings)
    assert line.measurement.n == len(task.test)
    assert set(line.measurement.values) <= {0.0, 0.5, 1.0}
    assert line.value == pytest.approx(np.mean(line.measurement.values))
    assert line.measurement.groups == {"group": tuple(labelled.groups[number] for number in task.test)}
    sizes = absorption(readings)["own latents"]
    assert (sizes.measurement.values, sizes.low) == (sizes.values, None)


# Removal and perturbation


def biased(n: int = 400) -> tuple[Labelled, Tensor]:
    """Texts with a label along one direction and a mark along another, stronger one; all four combinations."""
    label, mark = torch.arange(n) % 2 == 0, (torch.arange(n) // 2) % 2 == 0
    sign = lambda flags: (2.0 * flags - 1)[:, None]  # noqa: E731
    rows = 0.5 * sign(label) * BASIS[0] + 1.5 * sign(mark) * BASIS[1] + 0.25 * torch.randn(n, 50, generator=draw(2))
    labels, marks = (["yes" if flag else "no" for flag in flags] for flags in (label, mark))
    return concept(labels, marks=tuple(marks)), rows


def test_ablating_the_latent_of_the_mark_frees_the_biased_probe() -> None:
    labelled, rows = biased()
    found = spurious_removal(Readings.of([coder(torch.cat([BASIS, -BASIS]))], labelled, rows), ns=(1, 2))
    # The mark has a latent for each of its values.
    assert found["latents", 1].value < found["latents", 2].value
    assert found["latents", 2].value > 0.7
    assert found["difference"].value > 0.7
    assert abs(found["random", 2].value) < 0.3
    assert "2605.18229" in found.note and "right in 0." in found.note


def test_ablation_takes_what_the_latents_add_and_leaves_the_error() -> None:
    labelled, rows = biased(40)
    dictionary = coder(unit(12, 50, 5) * 2, encoder=unit(12, 50, 6))
    readings = Readings.of([dictionary], labelled, rows)
    chosen = np.array([2, 7])
    latents = dictionary.encode(rows)
    without = latents.clone()
    without[:, chosen] = 0
    wanted = dictionary.decode(without) + (rows - dictionary.decode(latents))  # type: ignore[operator]
    found = ablated(readings, 0, np.arange(40), chosen)
    assert np.allclose(found, wanted.numpy(), atol=1e-5)


def test_perturbation_finds_latents_that_hurt_their_own_class_only() -> None:
    labels = [f"c{number % 4}" for number in range(400)]
    rows = BASIS[[number % 4 for number in range(400)]] + 0.1 * torch.randn(400, 50, generator=draw(0))
    apart, mixed = coder(BASIS), coder(torch.cat([BASIS[:4].sum(0)[None] / 2, BASIS[20:30]]))
    found = targeted_perturbation(Readings.of([apart, mixed], concept(labels), rows), ns=(1,))
    assert found["latents", 1].values[0] > 0.3
    assert found["latents", 1].values[0] > found["latents", 1].values[1] + 0.2
    assert found["others", 1].values[0] < 0
    assert set(found["latents", 1].parts or {}) == {"c0", "c1", "c2", "c3"}


def test_what_the_metrics_need_is_said() -> None:
    labelled, rows = two_concepts()
    readings = Readings.of([coder(unit(8, 50))], labelled, rows)
    with pytest.raises(InputError, match=r"two labels and two marks \(a second column\); got 2 and 0"):
        spurious_removal(readings)
    with pytest.raises(InputError, match=r"at least 3 labels; it has 2\. See sparse_probing"):
        targeted_perturbation(readings)
    with pytest.raises(InputError, match=r"ks must be at least 1; got \[0\]"):
        sparse_probing(readings, ks=(0,))
    with pytest.raises(InputError, match="240 texts of set"):
        Readings.of([coder(unit(8, 50))], labelled, rows[:10])
    other = coder(unit(8, 50), in_sites=(Site("embed"),))
    with pytest.raises(InputError, match="read and reconstruct one site"):
        Readings.of([other], labelled, rows)
    together = concept(["a", "b"] * 20, marks=("x", "y") * 20)
    with pytest.raises(InputError, match="a combination of label and mark has 0 texts"):
        spurious_removal(Readings.of([coder(unit(8, 50))], together, rows[:40]))


@pytest.mark.parametrize("metric", [sparse_probing, absorption])
def test_scores_print_show_and_are_plain_json(metric: Callable[[Readings], Any]) -> None:
    labelled, rows, _ = family()
    found = metric(Readings.of([family_coder(True), family_coder(False)], labelled, rows))
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [line["method"] for line in stored["lines"]] == [line.method for line in found.lines]
    assert found.concept in repr(found) and "spread" in repr(found)
    assert "<table>" in found._repr_html_()
    with pytest.raises(KeyError):
        found["nothing"]


# Reading a model


@pytest.mark.demo_model
@pytest.mark.parametrize("at", ["mean", "last"])
def test_readings_are_those_of_each_text_alone(demo: vs.Model, at: str) -> None:
    texts = ("The cat sat.", "Dogs bark at night, loudly", "A city in France", "Rain", "It is late", "No", "Yes", "Tea")
    labelled = Labelled("set", texts, ("a", "b") * 4)
    site = Site.parse("layers.2.resid_post")
    dictionary = coder(unit(30, 576, 2), in_sites=(site,), out_sites=(site,))
    found = read_concept(dictionary, labelled, demo, at=at, batch_tokens=20)  # type: ignore[arg-type]
    for number, text in enumerate(texts):
        tokens = demo.tokens([text], bos="<|endoftext|>")
        rows = demo.run(tokens, capture=[site])[site][0, 1:]
        rows = rows[-1:] if at == "last" else rows
        assert np.allclose(found.rows[number], rows.double().mean(0).numpy(), atol=1e-4, rtol=1e-4)
        latents = dictionary.encode(rows).mean(0)
        assert np.allclose(found.latents[0][number], latents.numpy(), atol=1e-3, rtol=1e-3)


@pytest.mark.demo_model
def test_texts_that_cannot_be_read_are_refused(demo: vs.Model) -> None:
    site = Site.parse("layers.2.resid_post")
    dictionary = coder(unit(30, 576, 2), in_sites=(site,), out_sites=(site,))
    labelled = Labelled("set", ("a b c d e f g h",) * 8, ("a", "b") * 4)
    with pytest.raises(InputError, match=r"text 0 has \d+ tokens, more than context .4."):
        read_concept(dictionary, labelled, demo, at="last", context=4)
    with pytest.raises(UnknownNameError, match="known: last, mean"):
        read_concept(dictionary, labelled, demo, at="first")  # type: ignore[arg-type]

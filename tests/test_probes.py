"""Probes: what is planted is found and what is not is not; every control does what it is there for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vesalius as vs
from tiny_folder import tiny_folder
from vesalius.concepts import (
    Rows,
    distractor_test,
    fit_contrast,
    fit_probe,
    fit_probes,
    load_probe,
    probes_of,
    tagged_words,
    transfer,
)
from vesalius.concepts.classifier import folds, ridge
from vesalius.concepts.probe_controls import compression
from vesalius.concepts.probing import fitted
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.site import Site

SITE, OTHER = Site("module", module="a"), Site("module", module="b")


def rows_of(x: Any, labels: Any, splits: Any, **more: Any) -> Rows:
    """Rows of texts that stand for themselves."""
    texts = tuple(f"text {number}" for number in range(len(labels)))
    concept = vs.Concept("planted", texts, tuple(labels), splits=tuple(splits), **more)
    values = x if isinstance(x, dict) else {SITE: np.asarray(x, np.float32)}
    return Rows(concept, values, np.arange(len(labels)), "last")


def planted(n: int = 240, width: int = 12, gap: float = 3.0, classes: int = 2, seed: int = 0) -> Rows:
    """Half for discovery, half for validation; at OTHER there is nothing."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.normal(size=(n, width))
    x[np.arange(n), y] += gap
    splits = ["train" if number < n // 2 else "test" for number in rng.permutation(n)]
    return rows_of({SITE: x.astype(np.float32), OTHER: rng.normal(size=(n, width)).astype(np.float32)},
                   [f"class {label}" for label in y], splits)  # fmt: skip


@pytest.mark.parametrize("kind", ["logistic", "mass_mean", "lda", "svm", "sparse", "mlp"])
@pytest.mark.parametrize("classes", [2, 3])
def test_every_kind_finds_what_is_planted_and_nothing_else(kind: str, classes: int) -> None:
    found = probes_of(planted(classes=classes), kind=kind, sink=vs.silent)
    assert found.best.site == SITE
    report, nothing = found.best.report, found[OTHER].report
    assert report is not None and nothing is not None
    assert report.validation.estimate > 0.88 and report.p is not None and report.p < 1e-6
    assert nothing.validation.estimate < 1 / classes + 0.17 and nothing.p is not None and nothing.p > 0.01
    assert report.controls["shuffled"].value < 1 / classes + 0.2
    assert report.controls["majority"].value == pytest.approx(1 / classes, abs=0.1)
    assert {"compression", "bag_of_words"} <= set(report.controls)
    if kind in ("logistic", "mlp"):
        assert report.calibration_error is not None and report.calibration_error < 0.15


def test_a_pooling_probe_finds_the_one_token_that_tells() -> None:
    rng = np.random.default_rng(0)
    n, length, width = 160, 6, 10
    y, x = np.arange(n) % 2, rng.normal(size=(n, length, width))
    place = rng.integers(0, length, n)
    x[np.arange(n), place, 0] += 8.0  # which token it is
    x[np.arange(n), place, 1] += np.where(y, 4.0, -4.0)
    splits = ["train" if number % 4 < 2 else "test" for number in range(n)]
    concept = rows_of(x[:, 0], [str(label) for label in y], splits).concept
    rows = Rows(concept, {SITE: x.reshape(-1, width).astype(np.float32)}, np.repeat(np.arange(n), length), "tokens")
    found = probes_of(rows, kind="attention", sink=vs.silent)[0].report
    assert found.validation.estimate > 0.93
    with pytest.raises(InputError, match="at='tokens'"):
        probes_of(planted(), kind="attention", sink=vs.silent)


def test_numbers_are_predicted_by_ridge() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8))
    y = x[:, 0] * 2 + rng.normal(size=200) * 0.2
    rows = rows_of(x, [float(v) for v in y], ["train", "test"] * 100)
    probe = probes_of(rows, kind="ridge", sink=vs.silent)[0]
    assert probe.report.validation.estimate > 0.95 and probe.predict(x).shape == (200,)
    assert abs(float(probe.direction().vector[0])) > 0.99
    with pytest.raises(InputError, match="take kind='ridge'"):
        probes_of(rows, sink=vs.silent)
    wide = rng.normal(size=(30, 50))
    both = ridge(wide, wide[:, 0], [str(n) for n in range(30)]).scores(wide)
    assert np.corrcoef(both, wide[:, 0])[0, 1] > 0.9


def test_more_width_than_examples_is_flagged_and_fits_anything() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation([str(n % 2) for n in range(160)])
    rows = rows_of(rng.normal(size=(160, 200)), labels, ["train", "test"] * 80)
    report = probes_of(rows, kind="svm", sink=vs.silent)[0].report
    assert report.train == 1.0 and abs(report.validation.estimate - 0.5) < 0.16
    assert any("any labels could be told apart" in flag for flag in report.flags)


def test_a_planted_shortcut_is_flagged_and_the_concept_is_not() -> None:
    """In the splits the mark goes with the label; on `turned` it goes against it."""
    rng = np.random.default_rng(0)
    y = np.arange(300) % 2
    turned = np.arange(300) >= 200
    x = rng.normal(size=(300, 8))
    x[:, 0] += np.where(y == turned, -6.0, 6.0)
    splits = np.where(turned, "turned", np.where(np.arange(300) % 4 < 2, "train", "test"))
    report = probes_of(rows_of(x, [str(v) for v in y], splits), kind="mass_mean", sink=vs.silent)[0].report
    assert report.validation.estimate > 0.98 and report.shifted["turned"].estimate < 0.05
    assert any("a shortcut and not the concept" in flag for flag in report.flags)
    x[:, 0] = rng.normal(size=300) + np.where(y, 6.0, -6.0)
    honest = probes_of(rows_of(x, [str(v) for v in y], splits), kind="mass_mean", sink=vs.silent)
    assert honest[0].report.flags == () and honest[0].report.shifted["turned"].estimate > 0.98
    table = transfer(rows_of(x, [str(v) for v in y], splits), SITE, kind="mass_mean")
    assert set(table) == {"discovery", "validation", "turned"} and table["turned"]["discovery"].estimate > 0.95


def test_a_code_of_random_labels_is_no_shorter_and_one_of_clear_labels_is() -> None:
    rng = np.random.default_rng(0)
    clear, y = planted(n=480, width=10, gap=6.0), np.arange(480) % 2
    assert compression(clear, SITE).value > 4
    each = [compression(rows_of(rng.normal(size=(480, 10)), rng.permutation(y).astype(str), ["train", "test"] * 240),
                        SITE, seed=seed).value for seed in range(3)]  # fmt: skip
    assert np.mean(each) == pytest.approx(1.0, abs=0.05)


def test_selectivity_tells_a_plane_from_a_lookup_of_words() -> None:
    """Words of one-hot code: any labelling of types can be learned; the tag itself lies in one coordinate."""
    rng = np.random.default_rng(0)
    words = [(f"w{n}", "NOUN" if n % 2 else "VERB") for n in range(20)]
    concept = tagged_words([[words[n] for n in rng.permutation(20)[:5]] for _ in range(80)]).divided(seed=0)
    number = np.array([int(name[1:]) for name in concept.types])
    code = np.eye(20)[number] * 3
    tag = np.where(number % 2, 3.0, -3.0)[:, None] + rng.normal(size=(len(number), 4)) * 0.3
    for values, low, high in ((code, -0.1, 0.15), (tag, 0.25, 0.8)):
        rows = Rows(concept, {SITE: values.astype(np.float32)}, np.arange(len(number)), "span")
        found = probes_of(rows, sink=vs.silent)[0].report.controls["selectivity"]
        assert low <= found.value <= high


def test_the_site_is_chosen_without_validation() -> None:
    """At SITE validation is planted to be perfect and discovery to be noise: it must not be chosen for that."""
    rows = planted(seed=2)
    swapped = rows[SITE].copy()
    swapped[rows.of("train")] = np.random.default_rng(5).normal(size=(len(rows.of("train")), 12))
    trap = Rows(rows.concept, {SITE: swapped, OTHER: rows[SITE]}, rows.owner, "last")
    assert probes_of(trap, sink=vs.silent).best.site == OTHER


def test_folds_hold_whole_groups_out() -> None:
    groups = [f"g{n // 3}" for n in range(30)]
    labels = np.arange(30) // 3 % 2 == 0
    parts = folds(labels, groups)
    assert np.array(parts).sum(0).tolist() == [1] * 30
    for part in parts:
        assert not {groups[n] for n in np.flatnonzero(part)} & {groups[n] for n in np.flatnonzero(~part)}
    with pytest.raises(InputError, match="too few"):
        folds(np.array([True, False]), ["a", "a"])


def test_a_probe_keeps_its_numbers_in_a_file_and_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    rows = planted()
    for kind in ("logistic", "mlp"):
        probe = fitted(rows, SITE, kind)
        probe.save(tmp_path / "probe.json")
        again = load_probe(tmp_path / "probe.json")
        assert np.array_equal(again.scores(rows[SITE]), probe.scores(rows[SITE]))
        assert np.allclose(again.probabilities(rows[SITE]).sum(1), 1)
        with pytest.raises(InputError, match="reads rows"):
            again.predict(np.zeros((2, 5)))
    with pytest.raises(InputError, match="has no direction"):
        again.direction()
    probe = fitted(rows, SITE, "logistic")
    assert probe.direction("class 0").angle(probe.direction()) == pytest.approx(-1.0, abs=1e-6)
    with pytest.raises(UnknownNameError, match="class 7"):
        probe.direction("class 7")
    (tmp_path / "probe.json").write_text('{"schema": "other"}')
    with pytest.raises(FileFormatError, match="holds no probe"):
        load_probe(tmp_path / "probe.json")
    with pytest.raises(FileFormatError, match="holds no probe"):
        load_probe(tmp_path / "nothing.json")


def test_probes_of_a_model_stand_beside_one_with_random_weights(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    model = vs.load(tmp_path / "tiny")
    texts = tuple(f"the {animal} number {n} ran" for animal in ("fox", "cat") for n in range(20))
    concept = vs.Concept("animal", texts, ("fox",) * 20 + ("cat",) * 20, tuple(map(str, range(20))) * 2)
    random = vs.validate.reinitialised(model, 0)
    found = fit_probes(model, concept, "layers.*.resid_post", at="mean", random_model=random, sink=vs.silent)
    assert len(found) == model.architecture[1].n_layers and "random_weights" in found.best.report.controls
    frame = found.to_frame()
    assert len(frame) == len(found) and {"majority", "shuffled", "random_weights"} <= set(frame.columns)
    one = fit_probe(model, concept, found.best.site, at="mean", sink=vs.silent)
    assert np.allclose(one.readout.tensors["weights"], found.best.readout.tensors["weights"])
    assert any("random weights does as well" in flag for flag in found.best.report.flags)
    assert "bag of words" in found.best._repr_html_() and "majority" in repr(found.best)
    one.check(model)
    with pytest.raises(InputError, match="is of model"):
        one.check(random)


def contrast_pairs(loud: float, n: int = 120, width: int = 16, seed: int = 0) -> tuple[Any, Any, Any]:
    """Sides of statements: +- truth along one direction, whatever the wording adds to each side."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(n) % 2 == 0)
    sign = np.where(truth, 1.0, -1.0)[:, None]
    t = np.zeros(width)
    t[0] = loud
    shared = rng.normal(size=(n, width))
    noise = lambda: 0.3 * rng.normal(size=(n, width))  # noqa: E731
    return shared + sign * t + 3.0 + noise(), shared - sign * t - 3.0 + noise(), truth


@pytest.mark.parametrize("method", ["ccs", "crc_tpc", "mean_difference"])
def test_contrast_probes_find_truth_that_is_loud_and_a_distractor_that_is_louder(method: str) -> None:
    positive, negative, truth = contrast_pairs(2.0)
    fit, test = slice(0, 60), slice(60, 120)
    probe = fit_contrast(positive[fit], negative[fit], method, truth=truth[fit])
    found = probe.accuracy(positive[test], negative[test], truth[test])
    assert found.estimate > 0.9 and probe.signed
    loudness = 1.0 if method == "mean_difference" else 4.0
    fooled = distractor_test(positive, negative, truth, method, loudness=loudness)
    if method == "mean_difference":
        assert not fooled.fooled and fooled.truth.estimate > 0.8
    else:
        assert fooled.fooled and fooled.distractor.estimate > 0.95 and fooled.truth.estimate < 0.65


def test_without_labels_the_sign_stays_open() -> None:
    positive, negative, truth = contrast_pairs(2.0)
    probe = fit_contrast(positive, negative, "crc_tpc")
    assert not probe.signed and "up to sign" in probe.accuracy(positive, negative, truth).name
    with pytest.raises(InputError, match="truth="):
        fit_contrast(positive, negative, "mean_difference")
    with pytest.raises(UnknownNameError, match="ccs"):
        fit_contrast(positive, negative, "pca")
    assert torch.is_grad_enabled()

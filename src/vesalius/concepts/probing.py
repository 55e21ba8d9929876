"""Fitting probes: at one site or at many, from one pass over the examples, each with its controls.

A probe shows what can be read off, not what the model uses. Whatever it scores stands beside what is scored without
the model (the commonest label, a bag of words), without the concept (labels dealt out anew, labels by type), and
without training (the same network with random weights). The site is chosen on discovery, by cross-validation, and
what is reported of it comes from validation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vesalius.concepts import probe_controls as controls
from vesalius.concepts.classifier import folds
from vesalius.concepts.concept import DISCOVERY, VALIDATION, Concept
from vesalius.concepts.probe import Control, Probe, ProbeReport, of_split, probabilities_of, score_each, with_report
from vesalius.concepts.reading import Rows, read_sites
from vesalius.concepts.readouts import FITS, Floats, fit_readout
from vesalius.concepts.scores import share_of
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import Sink, track
from vesalius.jobs.frames import data_frame
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.site import Site
from vesalius.stats import Measurement, clustered_t, holm

if TYPE_CHECKING:
    import pandas

BINS = 10


def fit_probe(
    model: Model,
    concept: Concept,
    site: Site | str,
    *,
    kind: str = "logistic",
    at: str = "last",
    random_model: Model | None = None,
    seed: int = 0,
    sink: Sink | None = None,
) -> Probe:
    """A probe of a concept at one site, with its score on validation and every control.

    concept: with splits; one without is divided in halves by group. kind: "logistic" (its L2 penalty by
    cross-validation), "mass_mean", "lda", "svm", "sparse" (few coordinates), "mlp", "attention" (pooled over tokens,
    read at "tokens"); of a continuous concept "ridge". random_model: the same network with random weights, as a
    control (`vs.validate.reinitialised`). Raises UnknownNameError for an unknown kind, InputError for one that does not
    fit the concept, and as `read_sites`.
    """
    probes = fit_probes(model, concept, site, kind=kind, at=at, random_model=random_model, seed=seed, sink=sink)
    return probes[0]


def fit_probes(
    model: Model,
    concept: Concept,
    sites: Sequence[Site | str] | Site | str = "layers.*.resid_post",
    *,
    kind: str = "logistic",
    at: str = "last",
    random_model: Model | None = None,
    seed: int = 0,
    sink: Sink | None = None,
) -> Probes:
    """A probe at each of some sites, from one pass over the examples; see `fit_probe`.

    The best site's probe, chosen by cross-validation on discovery, has all controls, the others those that cost little.
    """
    divided = concept if concept.splits else concept.divided(seed=seed)
    with shown(sink) as progress:
        rows = read_sites(model, divided, sites, at=at, sink=progress)
        random = None if random_model is None else read_sites(random_model, divided, sites, at=at, sink=progress)
        return probes_of(rows, kind=kind, random=random, seed=seed, sink=progress)


def probes_of(
    rows: Rows, *, kind: str = "logistic", random: Rows | None = None, seed: int = 0, sink: Sink | None = None
) -> Probes:
    """Probes at every site of rows that were read before. random: of the network with random weights."""
    concept = rows.concept
    _check_kind(kind, concept, rows.at)
    missing = [name for name in (DISCOVERY, VALIDATION) if name not in concept.splits]
    if missing:
        raise InputError(f"{concept.name} has no {missing[0]} split; call divided(), or name its splits")
    made: list[Probe] = []
    with shown(sink) as progress:
        words = controls.without_model(concept)
        for site in track(rows.sites, f"{kind} probes of {concept.name}", sink=progress):
            probe = fitted(rows, site, kind, seed)
            found = {**words, **controls.at_site(rows, random, probe, seed)}
            made.append(with_report(probe, _report(probe, rows, found, seed)))
    made = _corrected(made, words)
    best = int(np.argmax([probe.report.selected for probe in made if probe.report is not None]))
    report = made[best].report
    assert report is not None
    more = controls.costly(rows, made[best], seed)
    made[best] = with_report(made[best], replace(report, controls={**report.controls, **more}))
    return Probes(tuple(made), best)


def fitted(rows: Rows, site: Site, kind: str, seed: int = 0, split: str = DISCOVERY) -> Probe:
    """A probe without report, fitted to one split."""
    concept, (some, place, examples) = rows.concept, of_split(rows, split)
    targets = targets_of(concept)[examples]
    groups = [concept.groups[example] for example in examples]
    readout = fit_readout(kind, rows[site][some], targets, groups, place, seed)
    return Probe(site, kind, concept.name, concept.classes, readout, rows.at, rows.model)


def targets_of(concept: Concept) -> Any:
    """[example] number of its class, or the number that it is labelled with."""
    return concept.numbers if concept.continuous else concept.numbers.astype(np.intp)


def selected_of(probe: Probe, rows: Rows, seed: int = 0) -> float:
    """Cross-validated score on discovery: by this, and nothing else, a site is chosen."""
    return _cross_validated(rows, probe, seed, DISCOVERY).estimate


def scored_on(probe: Probe, rows: Rows, split: str) -> Floats:
    """[example of the split] whose mean is the score."""
    some, place, examples = of_split(rows, split)
    labels = np.array(rows.concept.labels, dtype=object)[examples]
    return score_each(probe.predict(rows[probe.site][some], place), labels)


def measured_on(probe: Probe, rows: Rows, split: str) -> Measurement:
    """Score on a split, with its interval over groups."""
    groups = [rows.concept.groups[example] for example in rows.concept.rows(split)]
    share = bool(probe.classes)
    return share_of(f"{rows.concept.name} on {split}", scored_on(probe, rows, split), groups, share=share)


def transfer(
    rows: Rows, site: Site | str, *, kind: str = "logistic", seed: int = 0
) -> dict[str, dict[str, Measurement]]:
    """Probes fitted to each split and scored on every other: split fitted to -> split scored on -> score.

    On the split that a probe is fitted to it is scored by cross-validation. Splits with one label, or too few groups,
    are not fitted to.
    """
    where, found = Site.parse(site), dict[str, dict[str, Measurement]]()
    for own in rows.concept.split_names:
        try:
            probe = fitted(rows, where, kind, seed, own)
            line = {own: _cross_validated(rows, probe, seed, own)}
        except InputError:
            continue
        others = [split for split in rows.concept.split_names if split != own]
        found[own] = {**line, **{split: measured_on(probe, rows, split) for split in others}}
    return found


def _check_kind(kind: str, concept: Concept, at: str) -> None:
    if kind not in FITS:
        raise UnknownNameError("kind of probe", kind, FITS)
    if (kind == "ridge") != concept.continuous:
        raise InputError(f"{concept.name}: labels that are numbers take kind='ridge', classes any other; got {kind!r}")
    if kind == "attention" and at != "tokens":
        raise InputError(f"a probe that pools over tokens reads at='tokens'; got {at!r}")


def _report(probe: Probe, rows: Rows, found: Mapping[str, Control], seed: int) -> ProbeReport:
    shifted = {name: measured_on(probe, rows, name) for name in rows.concept.shifted}
    report = ProbeReport(
        train=float(scored_on(probe, rows, DISCOVERY).mean()),
        selected=selected_of(probe, rows, seed),
        validation=measured_on(probe, rows, VALIDATION),
        shifted=shifted,
        calibration_error=calibration_error(probe, rows, VALIDATION) if probe.classes else None,
        controls=found,
    )
    width = rows[probe.site].shape[1]
    return replace(report, flags=flags_of(report, len(rows.of(DISCOVERY)), width, len(probe.classes)))


def _cross_validated(rows: Rows, like: Probe, seed: int, split: str) -> Measurement:
    """Score on groups that a probe was not fitted to, over three parts of a split; with the penalties that the whole
    split chose, which flatters a little, and every site alike."""
    site, kind = like.site, like.kind
    concept, (some, place, examples) = rows.concept, of_split(rows, split)
    targets, values = targets_of(concept)[examples], rows[site][some]
    groups = [concept.groups[example] for example in examples]
    labels, each = np.array(concept.labels, dtype=object)[examples], np.full(len(examples), np.nan)
    for held in folds(targets > np.median(targets) if concept.continuous else targets == targets.max(), groups):
        seen = np.flatnonzero(~held[place])
        kept, local = np.unique(place[seen], return_inverse=True)
        readout = fit_readout(
            kind, values[seen], targets[kept], [groups[one] for one in kept], local, seed, like.readout
        )
        probe = Probe(site, kind, concept.name, concept.classes, readout, rows.at)
        mine = np.flatnonzero(held[place])
        each[held] = score_each(probe.predict(values[mine], place[mine]), labels[held])
    counted = ~np.isnan(each)
    of = [group for group, kept in zip(groups, counted, strict=True) if kept]
    return share_of(f"{concept.name} on {split}", each[counted], of, share=not concept.continuous)


def calibration_error(probe: Probe, rows: Rows, split: str) -> float:
    """Mean distance of the confidence in what is predicted from how often that is right, in ten bins of confidence."""
    some, place, _ = of_split(rows, split)
    sure = probabilities_of(probe.scores(rows[probe.site][some], place)).max(1)
    right = scored_on(probe, rows, split)
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right - sure)[bins == one].mean())) * float(np.mean(bins == one)) for one in np.unique(bins)]
    return float(sum(gaps))


def flags_of(report: ProbeReport, n: int, width: int, classes: int) -> tuple[str, ...]:
    """What to know before a score is believed, in sentences."""
    found, own = [], report.validation
    if n <= width:
        found.append(
            f"{n} examples of width {width}: any labels could be told apart where it was fitted, so that only the "
            "score on other examples says anything."
        )
    chance = 1 / max(classes, 1)
    for name, other in report.shifted.items():
        if other.high is None or own.low is None or not classes:
            continue
        if other.high < min(chance, own.low):
            found.append(
                f"On {name} it is wrong more often than chance ({other.estimate:.2f}): what it reads goes with the "
                "label here and against it there, a shortcut and not the concept."
            )
        elif other.high < own.low:
            found.append(f"On {name} it holds less ({other.estimate:.2f} against {own.estimate:.2f}).")
    random = report.controls.get("random_weights")
    if random is not None and own.low is not None and random.value >= own.low:
        found.append(
            f"The same network with random weights does as well ({random.value:.2f}): the label is in the words, and "
            "training need not have put it here."
        )
    words = report.controls.get("bag_of_words")
    if words is not None and own.low is not None and words.value >= own.low:
        found.append(f"A bag of words does as well ({words.value:.2f}).")
    return tuple(found)


def _corrected(made: Sequence[Probe], words: Mapping[str, Control]) -> list[Probe]:
    """With p-values of being right more often than the commonest label, by Holm over the sites."""
    chance = words["majority"].value if "majority" in words else 0.0
    reports = [probe.report for probe in made if probe.report is not None]
    each = [_beyond(report.validation, chance) for report in reports]
    return [with_report(probe, replace(report, p=p)) for probe, report, p in
            zip(made, reports, holm(each).tolist(), strict=True)]  # fmt: skip


def _beyond(found: Measurement, chance: float) -> float:
    values = np.array(found.values) - chance
    if float(np.ptp(values)) == 0.0:
        # A t test of values that are all the same is none; each group is right or wrong as a coin would be.
        return float(max(chance, 1e-12) ** found.n_groups) if values[0] > 0 else 1.0
    return clustered_t(values, found.groups["group"]).p_greater


@dataclass(frozen=True, eq=False, repr=False)
class Probes(Sequence[Probe]):
    """Probes of one concept at several sites. best: number of the one that cross-validation on discovery chose."""

    probes: tuple[Probe, ...]
    chosen: int

    def __getitem__(self, key: Any) -> Any:
        """By number, or by site."""
        if isinstance(key, str | Site):
            where = Site.parse(key)
            found = [probe for probe in self.probes if probe.site == where]
            if not found:
                raise UnknownNameError("site that was probed", str(where), [str(probe.site) for probe in self.probes])
            return found[0]
        return self.probes[key]

    def __len__(self) -> int:
        return len(self.probes)

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.probes)

    @property
    def best(self) -> Probe:
        """The one to go on with; its score on validation played no part in the choice."""
        return self.probes[self.chosen]

    def to_frame(self) -> pandas.DataFrame:
        """One row a site: scores and controls. Raises InputError where pandas is not installed."""
        return data_frame([_row(probe) for probe in self.probes])

    def to_json(self) -> dict[str, Any]:
        """Plain data, site after site."""
        first = self.probes[0]
        return {
            "concept": first.concept,
            "kind": first.kind,
            "at": first.at,
            "best": str(self.best.site),
            "sites": [{"site": str(probe.site), **probe.report.to_json()} for probe in self.probes if probe.report],
        }

    def __repr__(self) -> str:
        return f"Probes({len(self)} sites; best by cross-validation: {self.best!r})"

    def _repr_html_(self) -> str:
        return self.best._repr_html_()


def _row(probe: Probe) -> dict[str, Any]:
    report = probe.report
    assert report is not None
    return {
        "site": str(probe.site), "validation": report.validation.estimate, "low": report.validation.low,
        "high": report.validation.high, "cross_validated": report.selected, "train": report.train, "p": report.p,
        **{f"on {name}": found.estimate for name, found in report.shifted.items()},
        **{name: control.value for name, control in report.controls.items()},
    }  # fmt: skip

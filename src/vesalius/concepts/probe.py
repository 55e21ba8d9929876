"""Probe: a readout of a concept at a site, with what it scored and the controls beside that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.concepts.reading import Rows
from vesalius.concepts.readouts import Floats, Matrix, Network, Numbers, Planes, Pooled, Readout
from vesalius.directions import Direction
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.jobs import write_atomic
from vesalius.jobs.untrusted import UnreadableError, read_json, read_safetensors, understood
from vesalius.model import Model
from vesalius.protocol import canonical_json
from vesalius.site import Site
from vesalius.stats import Measurement

READOUTS: Mapping[str, type[Any]] = {cls.__name__.lower(): cls for cls in (Planes, Network, Pooled)}
SCHEMA = "vesalius/probe/1"


@dataclass(frozen=True)
class Control:
    """What a score is compared with. words: what it is; value: an accuracy, or what the words say."""

    words: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class ProbeReport:
    """What a probe scored: accuracies, or of a continuous concept shares of the variance explained.

    train: on the examples that it was fitted to. selected: cross-validated there, by which a site is chosen.
    validation, shifted: on the examples of the other splits. calibration_error: mean distance of its confidence from
    its accuracy, in ten bins (Naeini et al. 2015). controls: by name. flags: what to know before it is believed.
    """

    train: float
    selected: float
    validation: Measurement
    shifted: Mapping[str, Measurement]
    calibration_error: float | None
    controls: Mapping[str, Control]
    flags: tuple[str, ...] = ()
    p: float | None = None
    """Of H0: right no more often than the commonest label; corrected where several sites were probed."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        kept = ("estimate", "low", "high", "n", "n_groups")
        short = lambda found: {name: getattr(found, name) for name in kept}  # noqa: E731
        return {
            "train": self.train,
            "cross_validated": self.selected,
            "validation": short(self.validation),
            "shifted": {name: short(found) for name, found in self.shifted.items()},
            "calibration_error": self.calibration_error,
            "controls": {name: dict(vars(control)) for name, control in self.controls.items()},
            "flags": list(self.flags),
            "p": self.p,
        }


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """A readout of a concept at one site. classes: labels, in the order of its outputs; of two the second is scored.

    at: what was read, as in `read_sites`. model: hash of the model that it is of. report: what it scored.
    """

    site: Site
    kind: str
    concept: str
    classes: tuple[str, ...]
    readout: Readout
    at: str
    model: str = ""
    report: ProbeReport | None = None

    def scores(self, rows: Matrix, owner: Numbers | None = None) -> Floats:
        """[example, output] from activations [row, width]; owner: the example of each row, where several are of one.

        Raises InputError for rows of another width.
        """
        width = self.readout.tensors["weights" if isinstance(self.readout, Planes) else "centre"].shape[-1]
        if np.ndim(rows) != 2 or np.shape(rows)[1] != width:
            raise InputError(f"a probe of {self.site} reads rows [row, {width}]; got {list(np.shape(rows))}")
        return self.readout.scores(rows, owner)

    def predict(self, rows: Matrix, owner: Numbers | None = None) -> NDArray[Any]:
        """[example] labels, or numbers of a continuous concept."""
        return predicted_of(self.scores(rows, owner), self.classes)

    def probabilities(self, rows: Matrix, owner: Numbers | None = None) -> Floats:
        """[example, class]. Raises InputError for a continuous concept."""
        if not self.classes:
            raise InputError(f"{self.concept} is a matter of degree: its probe predicts numbers")
        return probabilities_of(self.scores(rows, owner))

    def score(self, rows: Matrix, labels: Sequence[Any] | NDArray[Any], owner: Numbers | None = None) -> float:
        """Share of examples whose label is predicted; of a continuous concept, share of the variance explained."""
        return float(np.mean(score_each(self.predict(rows, owner), np.asarray(labels))))

    def direction(self, label: str | None = None) -> Direction:
        """The direction in which a class's score rises; default the second of two classes, or a number.

        Raises InputError for a probe that is no plane, UnknownNameError for a label that it does not tell.
        """
        if not isinstance(self.readout, Planes):
            raise InputError(f"a probe of kind {self.kind!r} has no direction; use logistic, mass_mean, lda or svm")
        wanted = label if label is not None else (self.classes[-1] if len(self.classes) == 2 else None)
        if self.classes and wanted not in self.classes:
            raise UnknownNameError("label", str(label), self.classes, "Name the one to tell from the others.")
        weights, binary = self.readout.weights, len(self.classes) in (0, 2)
        sign = -1.0 if binary and self.classes and wanted == self.classes[0] else 1.0
        row = 0 if binary else self.classes.index(str(wanted))
        name = self.concept if not self.classes else f"{self.concept}: {wanted}"
        return Direction(self.site, (sign * weights[row]).float(), name)

    def check(self, model: Model) -> None:
        """Raises InputError when the probe is of another model."""
        if self.model and self.model != model.content_hash:
            raise InputError(
                f"this probe of {self.concept} is of model {self.model[:12]}, and {model.name} is "
                f"{model.content_hash[:12]}; fit it again"
            )

    def save(self, path: str | Path) -> None:
        """Write the probe as JSON and its numbers beside it, as `<path>.safetensors`; `load_probe` reads them."""
        # Late and here only: importing vesalius must stay light.
        from safetensors.torch import save as as_bytes

        about = {
            "schema": SCHEMA, "site": str(self.site), "kind": self.kind, "concept": self.concept, "at": self.at,
            "classes": list(self.classes), "model": self.model, "readout": type(self.readout).__name__.lower(),
            "report": None if self.report is None else self.report.to_json(),
        }  # fmt: skip
        numbers = {name: tensor.contiguous() for name, tensor in self.readout.tensors.items()}
        write_atomic(beside(Path(path)), as_bytes(numbers))
        write_atomic(path, canonical_json(about))

    def __repr__(self) -> str:
        if self.report is None:
            return f"Probe({self.concept} at {self.site}, {self.kind})"
        found = self.report.validation
        interval = "" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]"
        beside = ", ".join(f"{name} {control.value:.3f}" for name, control in self.report.controls.items())
        flags = "".join(f"\n  {flag}" for flag in self.report.flags)
        return f"Probe({self.concept} at {self.site}, {self.kind}: {found.estimate:.3f}{interval}; {beside}){flags}"

    def _repr_html_(self) -> str:
        """The score and its controls as a table."""
        if self.report is None:
            return escape(repr(self))
        lines = [("validation", self.report.validation.estimate), ("fitted to", self.report.train),
                 *((f"on {name}", found.estimate) for name, found in self.report.shifted.items()),
                 *((control.words, control.value) for control in self.report.controls.values())]  # fmt: skip
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{value:.3f}</td></tr>" for name, value in lines)
        flags = "".join(f"<p>{escape(flag)}</p>" for flag in self.report.flags)
        title = f"{self.concept} at {self.site}, {self.kind}"
        return f"<table><caption>{escape(title)}</caption>{rows}</table>{flags}"


def load_probe(path: str | Path) -> Probe:
    """The probe that `Probe.save` wrote, without its report's values. Raises FileFormatError for what is none."""
    where = Path(path)
    what = f"{where} holds no probe"
    try:
        about, tensors = read_json(where), read_safetensors(beside(where))
    except (OSError, UnreadableError) as error:
        raise FileFormatError(f"{what}: {error}") from error
    with understood(what):
        if about["schema"] != SCHEMA:
            raise FileFormatError(f"{what}: its schema is {about['schema']!r}")
        kind = READOUTS[about["readout"]]
        # Outputs would otherwise be of a shape that says nothing of the classes.
        _check_shapes(tensors, about["classes"], what)
        return Probe(Site.parse(about["site"]), str(about["kind"]), str(about["concept"]), tuple(about["classes"]),
                     kind(**tensors), str(about["at"]), str(about["model"]))  # fmt: skip


def _check_shapes(tensors: Mapping[str, Tensor], classes: Sequence[str], what: str) -> None:
    outputs = 1 if len(classes) in (0, 2) else len(classes)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(shapes["bias"]) != 1 or len(shapes["weights"]) != 2 or shapes["weights"][0] != shapes["bias"][0] != outputs:
        raise FileFormatError(f"{what}: weights {shapes['weights']} do not fit {len(classes)} classes")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise FileFormatError(f"{what}: its numbers hold NaN or infinity")


def beside(path: Path) -> Path:
    """Where the numbers of a JSON file are."""
    return path.with_name(path.name + ".safetensors")


def probabilities_of(scores: Floats) -> Floats:
    """[example, class] from scores: of one output by the logistic function, of several by softmax."""
    logits = np.concatenate([np.zeros_like(scores), scores], 1) if scores.shape[1] == 1 else scores
    raised = np.exp(logits - logits.max(1, keepdims=True))
    found: Floats = raised / raised.sum(1, keepdims=True)
    return found


def predicted_of(scores: Floats, classes: Sequence[str]) -> NDArray[Any]:
    """[example] labels of scores [example, output]; without classes the numbers themselves."""
    if not classes:
        return scores[:, 0]
    number = (scores[:, 0] > 0).astype(int) if scores.shape[1] == 1 else scores.argmax(1)
    return np.array(classes)[number]


def score_each(predicted: NDArray[Any], labels: NDArray[Any]) -> Floats:
    """[example] whose mean is the score: whether a label is right, or 1 - (error / spread)^2 of a number."""
    if predicted.dtype.kind != "f":
        return np.asarray(predicted == labels.astype(str), dtype=np.float64)
    numbers = labels.astype(np.float64)
    found: Floats = 1 - (predicted - numbers) ** 2 / max(float(numbers.var()), 1e-300)
    return found


def with_report(probe: Probe, report: ProbeReport) -> Probe:
    """The probe with what it scored."""
    return replace(probe, report=report)


def of_split(rows: Rows, split: str) -> tuple[Numbers, Numbers, Numbers]:
    """Of a split: numbers of its rows, for each row the place of its example, and the examples' numbers."""
    some = rows.of(split)
    examples, place = np.unique(rows.owner[some], return_inverse=True)
    return some, place, examples

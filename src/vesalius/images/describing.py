"""Descriptions of channels: kinds of image that excite them, and curve detectors, as predictions that can be tested.

Both are made on the discovery half of a set of images of which much is known (labels), and predict `selects`: on fresh
images of the same kinds the channel is larger on some than on others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.describe import Description, Discovery, Prediction
from vesalius.errors import InputError
from vesalius.images.stimuli import LINE
from vesalius.parts import Part
from vesalius.quantities import SELECTS, Runs
from vesalius.quantities.selects import image_values, in_words, labels_of, picked

LEAST = 0.15
"""AUROC over one half that is worth claiming."""
FEWEST = 6
"""Images of each kind, at least."""
NEAR, AWAY = 20.0, 40.0
"""Degrees within which an orientation is the preferred one, and from which on it is another."""
OF_CURVES, NONE = "curve detector", "none"
_PRICE = 0.01
"""AUROC that a second label has to bring."""
Rule = Mapping[str, Sequence[str]]


def predicted(runs: Runs, part: Part, some: Rule, others: Rule, words: str, statement: str) -> Prediction:
    """That a part is larger on some images than on others: at least `LEAST` over one half, and over labels dealt out
    anew and over other channels."""
    parameters = {"some": {key: list(v) for key, v in some.items()}, "others": {k: list(v) for k, v in others.items()}}
    mean = runs.mean(SELECTS.measure(runs, part, parameters))
    return Prediction(
        quantity=SELECTS.name,
        parameters=parameters,
        mean=mean,
        strength=min(1.0, max(0.0, 0.5 * mean / LEAST)),
        words=f"{words} (AUROC {mean + 0.5:.2f})",
        statement=statement,
        size=LEAST,
        scale=0.5,
        nulls=(("shuffled", LEAST / 2),),
    )


@dataclass(frozen=True)
class Kinds:
    """The kind of image that best tells where a channel is large: one label's value, or two together.

    labels: those that may be named; default all. pairs: whether two labels may be named together.
    """

    labels: tuple[str, ...] = ()
    pairs: bool = True
    name: str = "kind"
    needs: tuple[str, ...] = ()

    def prepare(self, discovery: Discovery, parts: Sequence[Part]) -> None:
        """All parts in one pass."""
        image_values(discovery.runs, parts, "max")

    def describe(self, discovery: Discovery, part: Part) -> Description | None:
        """None when there are no two kinds with images enough."""
        runs = discovery.runs
        rules = runs.once(("kinds", self), lambda: self.rules(runs))
        if not rules:
            return None
        masks = runs.once(
            ("masks of kinds", self), lambda: torch.stack([picked(labels_of(runs), rule) for rule in rules])
        )
        (values,) = image_values(runs, [part], "max")
        areas = areas_under(values, masks) - _PRICE * torch.tensor([len(rule) - 1 for rule in rules])
        order = areas.argsort(descending=True, stable=True)[:5].tolist()
        best = rules[order[0]]
        made = predicted(runs, part, best, {}, f"larger on {in_words(best)}", f"is larger on {in_words(best)}")
        rivals = [{"some": rules[number], "auroc": float(areas[number])} for number in order[1:]]
        return Description(part, self.name, (made,), name=str(part), rivals=tuple(rivals))

    def rules(self, runs: Runs) -> list[dict[str, list[str]]]:
        """Kinds with `FEWEST` images in and out."""
        known = labels_of(runs)
        labels = self.labels or tuple(known)
        single = [{label: [value]} for label in labels for value in dict.fromkeys(known[label]) if value != NONE]
        both = [{**one, **two} for one, two in itertools.combinations(single, 2) if set(one) != set(two)]
        return [rule for rule in [*single, *(both if self.pairs else [])] if _enough(picked(labels_of(runs), rule))]


def _enough(mask: Bool[Tensor, " image"]) -> bool:
    return FEWEST <= int(mask.sum()) <= len(mask) - FEWEST


def areas_under(values: Float[Tensor, " image"], masks: Bool[Tensor, "rule image"]) -> Float[Tensor, " rule"]:
    """AUROC of values for each rule's images against all others; equal values count half."""
    _, place, count = values.double().unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    ranks = ((2 * last - count + 1).double() / 2)[place]
    size = masks.sum(1).double()
    return ((masks.double() @ ranks) - size * (size + 1) / 2) / (size * (masks.shape[1] - size))


@dataclass(frozen=True, eq=False)
class Tuning:
    """Mean response of one channel. curves: [radius, orientation], lines: [orientation]."""

    radii: tuple[str, ...]
    orientations: tuple[str, ...]
    curves: Float[Tensor, "radius orientation"]
    lines: Float[Tensor, " orientation"]

    @property
    def preferred(self) -> int:
        """Number of the orientation with the largest response to curves, as a mean over neighbours (20 degrees)."""
        mean, step = self.curves.mean(0), 360.0 / len(self.orientations)
        reach = int(NEAR // step)
        return int(sum(mean.roll(shift) for shift in range(-reach, reach + 1)).argmax())  # type: ignore[union-attr]

    def within(self, least: float, most: float) -> list[str]:
        """Orientations whose distance from the preferred one is in these bounds, in degrees."""
        own = float(self.orientations[self.preferred])
        away = {name: abs((float(name) - own + 180) % 360 - 180) for name in self.orientations}
        return [name for name, distance in away.items() if least <= distance <= most]


def tuning_of(runs: Runs, part: Part) -> Tuning:
    """A channel's tuning on curves and lines (`stimuli.curves`). Raises InputError for other images."""
    groups = labels_of(runs)
    if not {"family", "radius", "orientation"} <= set(groups) or LINE not in groups["family"]:
        raise InputError("tuning is measured on curves and lines of every radius and orientation, images.curves(...)")
    (values,) = image_values(runs, [part], "max")
    radii = sorted({one for one in groups["radius"] if one not in (LINE, NONE)}, key=float)
    orientations = sorted({one for one in groups["orientation"] if one != NONE}, key=float)
    rows = {name: number for number, name in enumerate([*radii, LINE])}
    total, count = torch.zeros(2, len(rows), len(orientations))
    for value, radius, orientation in zip(values.tolist(), groups["radius"], groups["orientation"], strict=True):
        at = rows[radius], orientations.index(orientation)
        total[at] += value
        count[at] += 1
    mean = total / count.clamp_min(1)
    return Tuning(tuple(radii), tuple(orientations), mean[:-1], mean[-1])


@dataclass(frozen=True)
class Curves:
    """A curve detector: tuned to the way a curve bulges, and larger on curves than on lines of the same contrast.

    Three predictions (after Cammarata et al. 2020, "Curve Detectors"): curves near the preferred orientation against
    all others; against those that bulge the other way, which have the same edges; and against lines.
    """

    name: str = OF_CURVES
    needs: tuple[str, ...] = ()

    def prepare(self, discovery: Discovery, parts: Sequence[Part]) -> None:
        """All parts in one pass."""
        image_values(discovery.runs, parts, "max")

    def describe(self, discovery: Discovery, part: Part) -> Description:
        """Whatever the channel is like; it fits where all three predictions hold on discovery."""
        runs, found = discovery.runs, tuning_of(discovery.runs, part)
        near, own = found.within(0, NEAR), found.orientations[found.preferred]
        some = {"family": ["curve"], "orientation": near}
        said = f"curves that bulge at {own} degrees"
        made = [
            predicted(
                runs, part, some, others, f"larger on {said} than on {words}", f"is larger on {said} than {words}"
            )
            for others, words in (
                ({"family": ["curve"], "orientation": found.within(AWAY, 180)}, "curves of other orientations"),
                (
                    {"family": ["curve"], "orientation": found.within(180 - NEAR, 180)},
                    "curves that bulge the other way",
                ),
                ({"family": [LINE], "orientation": near}, "lines of the same contrast"),
            )
        ]
        return Description(part, self.name, tuple(made), name=str(part))

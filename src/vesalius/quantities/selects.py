"""Selects: how well a part's activation tells some images from others, by what is known of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.data.forward import captured
from vesalius.errors import InputError, PairsError, UnknownNameError
from vesalius.inputs import Corpus
from vesalius.jobs import track
from vesalius.parts import Channel, Part, places
from vesalius.quantities.base import PROBABILITY, Parameters, PerExample, Quantity, control_parts
from vesalius.quantities.matching import Matched
from vesalius.quantities.pseudo_values import auroc, groups_of, scored
from vesalius.quantities.runs import Runs
from vesalius.seeds import generator_for

POOLED = ("max", "mean")
MATCHED = 8
"""Channels of the same map that one is compared with."""
_TOGETHER = 32
Rule = Mapping[str, Sequence[str]]


class Selects(Quantity):
    """AUROC less one half: how much likelier than a coin it is that the part is larger on one kind of image.

    Parameters: `some` and `others`, two kinds of image, each as label -> its allowed values among the labels of the
    images (`{"family": ["curve"], "orientation": ["40", "50"]}`; others {} are all that are not some); `at`, the
    "max" (default) or "mean" over rows and columns. Per image: its pseudo-value. Null `shuffled`: the same with
    the two kinds dealt out anew. Matched: other channels of the same map.
    """

    name = "selects"
    kind = "predictive"
    scale = PROBABILITY

    def unit(self, runs: Runs) -> str:
        return "AUROC over .5"

    def phrase(self, parameters: Parameters) -> str:
        others = parameters.get("others")
        return f"is larger on {in_words(parameters['some'])} than on {in_words(others) if others else 'other images'}"

    def refuses(self, runs: Runs, part: Part) -> str:
        """It is measured on images."""
        return "" if isinstance(runs.data, Corpus) and runs.data.kind == "images" else "it is measured on images"

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return self._score(runs, part, parameters, *kinds(runs, parameters))

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        """All parts in one pass over the images."""
        by_place: dict[str, list[Part]] = {}
        for part, parameters in wanted:
            here = by_place.setdefault(str(parameters.get("at", "max")), [])
            here += [part, *control_parts(parameters.get("control", {}), part)]
        for at, parts in by_place.items():
            image_values(runs, parts, at)

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """One half: what telling them all apart would give."""
        return 0.5

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        """Other channels of the same map, drawn; members of the study may be among them, the part itself not."""
        if not isinstance(part, Channel):
            return Matched("there are no parts like it to compare with", ())
        width = runs.once(("channels", part.site), lambda: _width(runs, part))
        drawn = torch.randperm(width, generator=generator_for("selects", runs.seed, part.index)).tolist()
        others = [index for index in drawn if index != part.index][:MATCHED]
        found = tuple(Channel(part.site, index) for index in others)
        return Matched(f"{len(found)} other channels of {part.site.module}", found)

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        some, others = kinds(runs, parameters)
        either = (some | others).nonzero()[:, 0]
        dealt = either[torch.randperm(len(either), generator=generator_for("selects", runs.seed))]
        first, second = torch.zeros_like(some), torch.zeros_like(others)
        first[dealt[: int(some.sum())]] = True
        second[dealt[int(some.sum()) :]] = True
        return {"shuffled": self._score(runs, part, parameters, first, second)}

    def _score(self, runs: Runs, part: Part, parameters: Parameters, some: Tensor, others: Tensor) -> PerExample:
        (values,) = image_values(runs, [part], str(parameters.get("at", "max")))
        return scored(groups_of(runs), values, some, others, auroc)


def image_values(runs: Runs, parts: Sequence[Part], at: str) -> list[Float[Tensor, " example"]]:
    """Each part's largest or mean value on every image, in one pass up to the last of the sites; kept with the runs."""
    if at not in POOLED:
        raise UnknownNameError("place to read an image's value at", at, POOLED)
    if not isinstance(runs.data, Corpus):
        raise InputError(f"this is measured on images; got {runs.data!r}")
    kept: dict[tuple[Part, str], Tensor] = runs.once("image values", dict)
    missing = [part for part in dict.fromkeys(parts) if (part, at) not in kept]
    if missing:
        raw, sites = runs.data.raw, places(missing)
        found = torch.zeros(len(missing), runs.n)
        for rows in track(torch.arange(runs.n).split(_TOGETHER), f"read {len(missing)} parts", sink=runs.sink):
            with torch.no_grad():
                seen = captured(runs.model, raw.take(rows), sites)
                for number, part in enumerate(missing):
                    value = part.value(seen).flatten(1).float()
                    found[number, rows] = (value.amax(1) if at == "max" else value.mean(1)).cpu()
        kept |= {(part, at): values for part, values in zip(missing, found, strict=True)}
    return [kept[part, at] for part in parts]


def kinds(runs: Runs, parameters: Parameters) -> tuple[Bool[Tensor, " example"], Bool[Tensor, " example"]]:
    """Which images are of the two kinds. Raises PairsError when there are none of one, InputError for an overlap."""
    known = labels_of(runs)
    some = picked(known, parameters["some"])
    others = picked(known, parameters["others"]) if parameters.get("others") else ~some
    if bool((some & others).any()):
        raise InputError("some images are of both kinds that are to be told apart")
    if not bool(some.any()) or not bool(others.any()):
        raise PairsError(f"{int(some.sum())} images of one kind and {int(others.sum())} of the other; both are needed")
    return some, others


def labels_of(runs: Runs) -> Mapping[str, Sequence[str]]:
    """What is known of the images."""
    if not isinstance(runs.data, Corpus):
        raise InputError(f"this is measured on images; got {runs.data!r}")
    return runs.data.labels


def picked(known: Mapping[str, Sequence[str]], rule: Rule) -> Bool[Tensor, " example"]:
    """Images that have one of the allowed values of every label. Raises UnknownNameError for a label not there."""
    found: Tensor | None = None
    for label, allowed in rule.items():
        if label not in known:
            raise UnknownNameError("label of images", label, known)
        wanted = {str(one) for one in allowed}
        here = torch.tensor([value in wanted for value in known[label]], dtype=torch.bool)
        found = here if found is None else found & here
    if found is None:
        raise InputError("a kind of image is said by one label at least")
    return found


def in_words(rule: Rule) -> str:
    """ "family curve, orientation 40 or 50"."""
    return ", ".join(f"{label} {_listed(list(allowed))}" for label, allowed in rule.items())


def _listed(values: Sequence[str]) -> str:
    return " or ".join(map(str, values)) if len(values) < 4 else f"{values[0]} to {values[-1]}"


def _width(runs: Runs, part: Channel) -> int:
    assert isinstance(runs.data, Corpus)
    with torch.no_grad():
        seen = captured(runs.model, runs.data.raw.take(torch.arange(1)), [part.site])
    return int(seen[part.site].shape[1])

"""Erasers of a concept in a model: fitted at one site, or at one after the other; applied in `run` and `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vesalius.concepts.concept import DISCOVERY, VALIDATION, Concept
from vesalius.concepts.erasure import Eraser, fit_rows
from vesalius.concepts.probe import beside
from vesalius.concepts.probing import fitted, measured_on, scored_on, targets_of
from vesalius.concepts.reading import Rows, read_sites, sites_named
from vesalius.errors import FileFormatError, InputError
from vesalius.intervention import Erase, Positions
from vesalius.jobs import Sink, write_atomic
from vesalius.jobs.progress import shown
from vesalius.jobs.untrusted import UnreadableError, read_json, read_safetensors, understood
from vesalius.model import Model
from vesalius.protocol import canonical_json
from vesalius.site import Site
from vesalius.stats import Measurement

SCHEMA = "vesalius/eraser/1"


@dataclass(frozen=True, eq=False, repr=False)
class ConceptEraser(Mapping[Site, Eraser]):
    """Erasers of one concept by site. at: what each was fitted to (see `read_sites`); model: the model's hash."""

    erasers: Mapping[Site, Eraser]
    concept: str
    at: str
    model: str = ""

    def __getitem__(self, site: Site | str) -> Eraser:
        return self.erasers[Site.parse(site)]

    def __iter__(self) -> Any:
        return iter(self.erasers)

    def __len__(self) -> int:
        return len(self.erasers)

    def edits(self, positions: Positions = None) -> list[Erase]:
        """Interventions that erase the concept in `run`, `generate`, sweeps' plain runs; positions: default all."""
        return [
            Erase(site, reads=eraser.reads, writes=eraser.writes, centre=eraser.centre, positions=positions)
            for site, eraser in self.erasers.items()
        ]

    def check(self, model: Model) -> None:
        """Raises InputError when the eraser is of another model."""
        if self.model and self.model != model.content_hash:
            raise InputError(
                f"this eraser of {self.concept} is of model {self.model[:12]}, and {model.name} is "
                f"{model.content_hash[:12]}; fit it again"
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, and its numbers beside it as `<path>.safetensors`; `load_eraser` reads them."""
        # Late and here only: importing vesalius must stay light.
        from safetensors.torch import save as as_bytes

        numbers = {
            f"{number} {part}": getattr(eraser, part).contiguous().clone()
            for number, eraser in enumerate(self.erasers.values())
            for part in ("reads", "writes", "centre")
        }
        about = {
            "schema": SCHEMA, "concept": self.concept, "at": self.at, "model": self.model,
            "sites": [str(site) for site in self], "methods": [eraser.method for eraser in self.erasers.values()],
        }  # fmt: skip
        write_atomic(beside(Path(path)), as_bytes(numbers))
        write_atomic(path, canonical_json(about))

    def __repr__(self) -> str:
        ranks = ", ".join(f"{site} rank {eraser.rank}" for site, eraser in list(self.erasers.items())[:4])
        more = f" and {len(self) - 4} more sites" if len(self) > 4 else ""
        return f"ConceptEraser({self.concept}: {ranks}{more})"


def load_eraser(path: str | Path) -> ConceptEraser:
    """The erasers that `ConceptEraser.save` wrote. Raises FileFormatError for what is none."""
    where, what = Path(path), f"{path} holds no eraser"
    try:
        about, numbers = read_json(where), read_safetensors(beside(where))
    except (OSError, UnreadableError) as error:
        raise FileFormatError(f"{what}: {error}") from error
    with understood(what):
        if about["schema"] != SCHEMA:
            raise FileFormatError(f"{what}: its schema is {about['schema']!r}")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in numbers.values()):
            raise FileFormatError(f"{what}: its numbers hold NaN or infinity")
        found = {}
        for number, (name, method) in enumerate(zip(about["sites"], about["methods"], strict=True)):
            reads, writes, centre = (numbers[f"{number} {part}"] for part in ("reads", "writes", "centre"))
            # Made now, so that shapes that do not fit are refused here.
            Erase(name, reads=reads, writes=writes, centre=centre)
            found[Site.parse(name)] = Eraser(reads, writes, centre, str(method))
        return ConceptEraser(found, str(about["concept"]), str(about["at"]), str(about["model"]))


def fit_eraser(
    model: Model,
    concept: Concept,
    sites: Sequence[Site | str] | Site | str,
    *,
    method: str = "leace",
    at: str = "last",
    sink: Sink | None = None,
    **options: Any,
) -> ConceptEraser:
    """Erasers of a concept, fitted to its discovery examples (or all, where it has no splits).

    method: "leace", "mean_projection" or "inlp", with their options. Of several sites each is fitted to activations
    from which the concept was erased at the sites before it (concept scrubbing: Belrose et al. 2023, section 6), one
    pass each; at="tokens" then fits every token. Raises as `read_sites` and `fit_rows`.
    """
    found: dict[Site, Eraser] = {}
    wanted = sites_named(model, sites)
    seen = concept.subset(concept.rows(DISCOVERY)) if concept.splits else concept
    with shown(sink) as progress:
        for site in wanted:
            before = ConceptEraser(dict(found), concept.name, at).edits()
            rows = read_sites(model, seen, site, at=at, interventions=before, sink=progress)
            found[site] = erased_rows(rows, site, method, **options)
    return ConceptEraser(found, concept.name, at, model.content_hash)


def erased_rows(rows: Rows, site: Site, method: str = "leace", **options: Any) -> Eraser:
    """An eraser fitted to rows that were read before: those of discovery where there are splits."""
    concept = rows.concept
    some = rows.of(DISCOVERY) if concept.splits else np.arange(len(rows.owner))
    labels = targets_of(concept)[rows.owner[some]]
    return fit_rows(rows[site][some], labels, method, **options)


@dataclass(frozen=True)
class Leak:
    """What a reader finds before and after erasure: fitted and scored on the same examples, and on fresh ones."""

    kind: str
    before: Measurement
    after: Measurement
    fitted_before: float
    fitted_after: float


def leaks(
    eraser: Eraser, rows: Rows, site: Site | str, *, kinds: Sequence[str] = ("logistic", "mlp"), seed: int = 0
) -> tuple[Leak, ...]:
    """What readers find at a site after erasure, each fitted anew. A linear one should find nothing where the eraser
    was fitted; what a non-linear one still finds there is in the activations, and out of a linear eraser's reach."""
    where, found = Site.parse(site), []
    erased = eraser(torch.from_numpy(rows[where])).numpy()
    after = Rows(rows.concept, {where: erased}, rows.owner, rows.at, rows.model)
    for kind in kinds:
        probes = [(given, fitted(given, where, kind, seed)) for given in (rows, after)]
        fresh = [measured_on(probe, given, VALIDATION) for given, probe in probes]
        own = [float(scored_on(probe, given, DISCOVERY).mean()) for given, probe in probes]
        found.append(Leak(kind, fresh[0], fresh[1], own[0], own[1]))
    return tuple(found)
